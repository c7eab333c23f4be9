"""What is said while models compile: through torch's logging, its structured traces, and NORMFX_DEBUG.

TORCH_LOGS is read while torch is imported, before a backend could register names of its own; what it takes then is the
name of a module of any package. So the loggers are named after modules: `normfx.plan` has the plan of each graph
(INFO), `normfx.printing` the graphs (DEBUG), `normfx.kernels` the generated kernels (DEBUG). Tried on torch 2.11,
2.13 and 2.14.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

from normfx.compat.dynamo import trace_artifact
from normfx.records import GraphReport
from normfx.report import Report

PLAN, GRAPHS, KERNELS = (logging.getLogger(f"normfx.{name}") for name in ("plan", "printing", "kernels"))


def say(report: GraphReport, debug: int) -> None:
    """Say what became of a graph, to whom it is asked for. debug: the level of NORMFX_DEBUG."""
    if PLAN.isEnabledFor(logging.INFO):
        PLAN.info("%s", _plan(report))
    if GRAPHS.isEnabledFor(logging.DEBUG):
        GRAPHS.debug("before:\n%s\nafter:\n%s", report.before, report.after)
    if KERNELS.isEnabledFor(logging.DEBUG):
        KERNELS.debug("%s", "\n".join(_kernels(report)))
    if debug >= 1:
        print(f"normfx: {_plan(report)}")
    if debug >= 2:
        print(f"normfx: before\n{report.before}\nnormfx: after\n{report.after}")
    if debug >= 3:
        print("\n".join(f"normfx: {text}" for text in _kernels(report)))
    trace_artifact("normfx_plan", "string", lambda: _plan(report))
    trace_artifact("normfx_report", "json", lambda: Report((report,)).to_json())
    trace_artifact("normfx_graph_before", "string", lambda: report.before)
    trace_artifact("normfx_graph_after", "string", lambda: report.after)
    for name, source in report.kernels.items():
        trace_artifact(f"normfx_kernel_{name}", "string", partial(str, source))


def _plan(report: GraphReport) -> str:
    stages = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in report.seconds.items())
    return f"{Report((report,))}\nstages: {stages}" if stages else str(Report((report,)))


def _kernels(report: GraphReport) -> Iterator[str]:
    """What each norm runs on, and the sources."""
    for site in report.sites:
        yield f"{site.name} runs on {site.lowering}"
    for name, source in report.kernels.items():
        yield f"kernel {name}\n{source}"
    if report.sites and not report.kernels:
        yield "no kernel was generated: Inductor runs these norms, and TORCH_LOGS=output_code shows its code"
