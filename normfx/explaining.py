"""normfx.explain: what the backend would do to a model, without compiling it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from normfx.allocator import advice
from normfx.backend import parse, transform
from normfx.compat.modules import original, uncompiled
from normfx.dynamo import is_disabled, recording_breaks
from normfx.environment import environment
from normfx.report import GraphBreak, GraphReport, Report

NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)


def explain(model: Callable[..., Any], options: Mapping[str, Any] | None = None) -> Callable[..., Report]:
    """A function that runs `model` once, eagerly, on its arguments and returns the Report of what normfx would do.

    Like torch._dynamo.explain it resets Dynamo: functions compiled before compile again at their next call.
    Plans under the grad mode, autocast state and training flags it is called in, exactly as compiling there would.

        report = normfx.explain(model)(input_ids)
        print(report)

    Of a model that is compiled already, also in place by `model.compile()`, it explains the model itself.

    Raises OptionError for bad options.
    """
    settings = parse(options)
    model = original(model)

    def run(*args: Any, **kwargs: Any) -> Report:
        graphs: list[GraphReport] = []

        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(transform(gm, example_inputs, settings).report)
            untouched: Callable[..., Any] = gm.forward  # run eagerly
            return untouched

        torch.compiler.reset()  # else earlier compilations of the same code may use up its recompile limit
        try:
            with uncompiled(model), recording_breaks() as breaks:
                torch.compile(model, backend=backend)(*args, **kwargs)
        finally:
            torch.compiler.reset()
        count = max(len(graphs) - 1, len(breaks))  # torch._dynamo.explain counts those alone that end a graph with ops
        note = _missed(model, graphs) if graphs and breaks else "" if graphs else _why_empty(model, breaks)
        note = note or advice(max((graph.largest_result for graph in graphs), default=0))
        return Report(tuple(graphs), count, tuple(breaks), note, environment(settings))

    return run


def _missed(model: Callable[..., Any], graphs: Sequence[GraphReport]) -> str:
    """How many norm modules ran outside of the graphs."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    missed = sum(isinstance(m, NORMS) for m in modules) - sum(len(graph.sites) for graph in graphs)
    if missed <= 0:
        return ""
    them = f"{missed} more norm" if missed == 1 else f"{missed} more norms"
    return f"The model has at least {them}, outside of the graphs: Dynamo compiled nothing there."


def _why_empty(model: Callable[..., Any], breaks: Sequence[GraphBreak]) -> str:
    if is_disabled():
        return "torch.compile is switched off in this process (torch._dynamo.config.disable, TORCHDYNAMO_DISABLE)."
    if inspect.isclass(model):
        name = model.__name__
        return (
            f"{name} is a class, and calling it makes an instance. Explain the instance: normfx.explain({name}(…))(…)."
        )
    if breaks:
        return "Dynamo compiled nothing of this call: it gave it up at a graph break, which is listed below."
    return "Dynamo traced no operation on tensors. Is the model compiled, or wrapped in torch.compiler.disable?"
