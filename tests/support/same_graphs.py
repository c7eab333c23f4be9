"""Writes down what normfx makes of every model of the tests, to show that a change of its code changes no graph.

    python tests/support/same_graphs.py before.json                   # with the old code
    python tests/support/same_graphs.py after.json --against before.json

Each model is captured in eval without gradients and in training, and transformed under each of SETTINGS. Kept are the
text of the graph that Inductor gets, the arguments of normfx's own ops, the decisions and the predicted bytes. The
examples of the rules are rewritten as exported programs, too.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES
from stream_models import ROWS, built
from torch import nn
from torch.fx import Graph, GraphModule

import normfx
from normfx.backend import Transformed, transform
from normfx.graph.names import module_path
from normfx.graph.nodes import arguments, op_name
from normfx.lower import packed
from normfx.lower import triton as lowering
from normfx.options import Options
from normfx.printing.printer import print_graph
from normfx.rules import RULES

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "eval": {
        "default": {},
        "drop": {"rules": "all", "crms_basis": "drop"},
        "fewer rules": {"rules": "all,-pre_rms_norm"},
    },
    "train": {
        "default": {},
        "kernels": {"rules": "all", "lowering": "triton", "fold": "live"},
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where to write the texts, as JSON")
    parser.add_argument("--against", type=Path, help="an earlier file to compare with")
    parser.add_argument("--only", default="", help="models whose name matches this regular expression")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    lowering.has_kernels = lambda fake: True  # as if there were kernels for the CPU
    packed.mkl_is_faster = lambda: False
    packed.packed_is_faster = lambda product: True  # not what this machine's clock says
    found: dict[str, str] = {}
    for name, make in _models():
        if re.search(given.only, name):
            texts = dict(_texts(name, make))
            found.update(texts)
            print(f"{name}: {hashlib.sha256(''.join(texts.values()).encode()).hexdigest()[:12]}", flush=True)
            given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return _compare(json.loads(given.against.read_text(encoding="utf-8")), found) if given.against else 0


def _models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]]:
    for rule in RULES:
        for example in (rule.example, *rule.counterexamples):
            yield f"rule {rule.name}/{example.name}", partial(_made, example.build, example.inputs)
    for case in CASES:
        yield f"model {case.name}", partial(_made, case.make, case.inputs)
    for row in ROWS:
        yield f"stream {row}", partial(built, row)


def _made(build: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]]) -> tuple[nn.Module, tuple[Any, ...]]:
    return build(), inputs()


def _texts(name: str, make: Callable[[], tuple[nn.Module, tuple[Any, ...]]]) -> Iterator[tuple[str, str]]:
    """Under name, mode and settings, what became of the model."""
    torch.manual_seed(0)
    try:
        model, inputs = make()
    except pytest.skip.Exception as skipped:
        yield name, f"skipped: {skipped}"
        return
    for mode, every in SETTINGS.items():
        seen: list[tuple[str, Transformed]] = []

        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            for key, options in every.items():  # noqa: B023
                settings = Options.parse({"strict": True, **options}, environ={"NORMFX_VERIFY": "1"})
                seen.append((key, transform(gm, example_inputs, settings)))  # noqa: B023
            run: Callable[..., Any] = gm.forward
            return run

        torch._dynamo.reset()
        torch.manual_seed(0)
        model.train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            torch.compile(model, backend=backend)(*inputs)
        for i, (key, ready) in enumerate(seen):
            yield f"{name}, {mode}, {key}, {i // len(every)}", _text(ready)
    if name.startswith("rule "):
        model.eval()
        for rules in ("default", "all"):
            program = torch.export.export(model, inputs)
            yield f"{name}, exported, {rules}", str(normfx.rewrite(program, {"rules": rules, "fold": "live"}).graph)


def _text(ready: Transformed) -> str:
    graph, report = ready.graph_module.graph, ready.report
    sites = "".join(
        f"{s.name} {s.kind}: {', '.join(s.rules)} | {s.lowering} | {s.shares} | {s.source}\n"
        + "".join(f"    {r.rule} {r.code}: {r.detail} | {r.hint} | {', '.join(r.nodes)}\n" for r in s.refusals)
        for s in (*report.sites, *report.composed)
    )
    counts = f"{report.folds} folds, {report.centrings} centrings, {report.stored_sums} stored, {report.failure}\n"
    sizes = "".join(f"{rule}: {b} -> {a}, {report.saved[rule]}\n" for rule, (b, a) in report.bytes.items())
    kernels = "".join(f"{name} {hashlib.sha256(t.encode()).hexdigest()[:12]}\n" for name, t in report.kernels.items())
    sites = re.sub(r"\.py:\d+", ".py", sites)  # moved lines are no difference
    parts = (sites, counts, sizes, kernels, report.before, report.after, _printed(graph, ready.weights))
    return "\n".join((*parts, "".join(map(_own, _normfx_calls(graph)))))


def _printed(graph: Graph, weights: frozenset[Any]) -> str:
    known = {n for n in graph.nodes if "val" in n.meta or n.op == "output"}
    if len(known) < len(graph.nodes):  # a graph as Dynamo gave it
        return str(graph)
    return print_graph(graph, {}, weights, module_path)


def _normfx_calls(graph: Graph) -> Iterator[Mapping[str, Any]]:
    for node in graph.nodes:
        if op_name(node).startswith("normfx::"):
            yield {"op": op_name(node), "name": node.name, **arguments(node)}


def _own(call: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(call.items())) + "\n"


def _compare(before: Mapping[str, str], after: Mapping[str, str]) -> int:
    """Print what differs; 1 if anything does."""
    different = [key for key in after if before.get(key) != after[key]]
    for key in different:
        old, new = before.get(key, "").splitlines(), after[key].splitlines()
        print(f"--- {key}", *difflib.unified_diff(old, new, n=1, lineterm=""), sep="\n")
    print(f"{len(different)} of {len(after)} graphs differ")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
