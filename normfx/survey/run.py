"""One family of the zoo through normfx: what became of its norms, and the error in float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from normfx.backend import transform
from normfx.compat import pytree
from normfx.compat.dynamo import config as dynamo_config
from normfx.errors import VerifyError
from normfx.lower.folded import fed
from normfx.options import Options
from normfx.report import GraphReport, Report
from normfx.survey.family import Family

EXACT = 1e-9
"""Largest error of a rewritten graph in float64, relative to the largest entry of each output."""

CAPTURED = 1e-3
"""Largest error of the compiled model, every float32 in its graphs made float64, against the model itself."""

RECOMPILES = 64
"""Graphs of one function before Dynamo gives up. Its 8 are fewer than the layers of a model whose graph breaks."""


@dataclass(frozen=True)
class Outcome:
    """What became of a family's norms.

    error:  the largest of the rewritten graphs' outputs, relative to the output's largest entry
    missed: LayerNorms that the model calls and that are in none of Dynamo's graphs
    """

    report: Report
    error: float
    missed: int
    seconds: float


class _Calls(TorchFunctionMode):
    """Counts calls of torch.nn.functional.layer_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is nn.functional.layer_norm
        return func(*args, **(kwargs or {}))


class _Backend:
    """Runs normfx's stages strictly on each graph, then both graphs, eagerly: no compiler comes between."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.settings = Options.parse({"strict": True, **options}, environ={"NORMFX_VERIFY": "1"})
        self.graphs: list[GraphReport] = []
        self.error = 0.0
        self.captured = 0

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.captured += sum(node.target is nn.functional.layer_norm for node in gm.graph.nodes)
        ready = transform(promoted(gm), example_inputs, self.settings)
        self.graphs.append(ready.report)
        run: Callable[..., Any] = ready.graph_module.forward
        if ready.folding:
            run = fed(run, ready.folding)

        def both(*inputs: Any) -> Any:
            state = torch.get_rng_state()
            with torch.no_grad():
                expected = gm.forward(*(x.detach().clone() if isinstance(x, Tensor) else x for x in inputs))
            torch.set_rng_state(state)
            actual = run(*inputs)
            self.error = max(self.error, _difference("the rewritten graph", _floats(actual), _floats(expected), EXACT))
            return actual

        return both


DEFER = {"rules": "default,+defer_norm", "defer_means": "small"}
"""Options that defer norms, LayerNorms too, as if all means were small."""


def survey(family: Family, train: bool = False, defer: bool = False) -> Outcome:
    """Build a family, run it as it is and rewritten, and compare. Raises what its model, Dynamo or normfx raise, and
    VerifyError where a rewritten graph, or the whole, gives something else.

    train: record gradients and plan as then, with dropout off and the work of folding not counted: at a zoo's few rows
           it would outweigh everything
    defer: with the options DEFER
    """
    begin = time.perf_counter()
    backend = _Backend({**({"fold": "live"} if train else {}), **(DEFER if defer else {})})
    with _float64(), torch.set_grad_enabled(train), dynamo_config.patch(recompile_limit=RECOMPILES):
        model, inputs = _widened(family.make()), family.inputs()
        with _Calls() as calls:
            plain = _outputs(model, inputs)
        torch.compiler.reset()
        rewritten = _outputs(torch.compile(model, backend=backend), inputs)
    torch.compiler.reset()
    _difference("the compiled model", [x.double() for x in rewritten], [x.double() for x in plain], CAPTURED)
    if not plain or not all(x.any() for x in plain):
        raise VerifyError("an output is missing or all 0, which shows nothing")
    report = Report(tuple(backend.graphs), max(len(backend.graphs) - 1, 0))
    return Outcome(report, backend.error, max(0, calls.count - backend.captured), time.perf_counter() - begin)


@contextmanager
def _float64() -> Iterator[None]:
    """float64 where nothing else is said: what a model makes on the way is as exact as its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widened(model: nn.Module) -> nn.Module:
    """The model in float64, tensors that its modules keep as plain attributes included."""
    for module in model.double().modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, Tensor) and held.dtype == torch.float32:
                setattr(module, name, held.double())
    return model


def _outputs(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Floating outputs on fresh inputs, from a fixed random state."""
    torch.manual_seed(1)
    return _floats(call(*(x.clone() for x in inputs)))


def _floats(outputs: Any) -> list[Tensor]:
    return [x.detach() for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _difference(what: str, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> float:
    """The largest error relative to each output's largest entry. Raises VerifyError where it is above the tolerance."""
    shapes, wanted = ([(x.dtype, x.shape) for x in outputs] for outputs in (actual, expected))
    if shapes != wanted:
        raise VerifyError(f"{what} returns {shapes} instead of {wanted}")
    worst = 0.0
    for got, want in zip(actual, expected, strict=True):
        if not torch.equal(got.isfinite(), want.isfinite()):
            raise VerifyError(f"{what} has other infinite entries")
        if got.numel():
            scale = max(want.nan_to_num().abs().max().item(), 1e-300)
            worst = max(worst, (got - want).nan_to_num().abs().max().item() / scale)
    if worst > tolerance:
        raise VerifyError(f"{what} is off by {worst:.1e} of its largest entry")
    return worst


def promoted(gm: GraphModule) -> GraphModule:
    """A Dynamo graph, changed in place: float32, where the model asks for it by name, is float64.

    Many norms, softmaxes and rotary tables are computed in float32 whatever the model's dtype: 1e-7, which would hide
    errors of the same size. In place, because a copy loses what Dynamo knows of the inputs.
    """
    for inner in gm.modules():
        if isinstance(inner, GraphModule):
            for node in inner.graph.nodes:
                if node.op == "call_method" and node.target == "float":
                    node.target = "double"
                node.args, node.kwargs = (map_aggregate(a, _wider) for a in (node.args, node.kwargs))
            inner.recompile()
    return gm


def _wider(arg: Any) -> Any:
    return torch.float64 if arg is torch.float32 else arg
