"""normfx.explain: what the backend would do to a model, without compiling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from normfx.backend import transform
from normfx.options import Options
from normfx.report import GraphReport, Report


def explain(model: Callable[..., Any], options: Mapping[str, Any] | None = None) -> Callable[..., Report]:
    """A function that runs `model` once, eagerly, on its arguments and returns the Report of what normfx would do.

    Like torch._dynamo.explain it resets Dynamo: functions compiled before compile anew at their next call.
    Plans under the grad mode, autocast state and training flags it is called in, exactly as compiling there would.

        report = normfx.explain(model)(input_ids)
        print(report)

    Raises OptionError for bad options.
    """
    settings = Options.parse(options)
    model = getattr(model, "_orig_mod", model)

    def run(*args: Any, **kwargs: Any) -> Report:
        graphs: list[GraphReport] = []

        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(transform(gm, example_inputs, settings).report)
            return gm.forward  # type: ignore[no-any-return]  # the untouched graph, run eagerly

        torch._dynamo.reset()  # else earlier compilations of the same code may use up its recompile limit
        try:
            torch.compile(model, backend=backend)(*args, **kwargs)
        finally:
            torch._dynamo.reset()
        return Report(tuple(graphs), max(len(graphs) - 1, 0))  # as torch._dynamo.explain counts breaks

    return run
