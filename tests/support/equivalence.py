"""Run normfx's own stages on a model, and prove in float64 that nothing but the graph changed.

The rewritten graph is run eagerly: the bodies of the canonical ops are the meaning, and the float64 proof needs no
compiler. What Inductor makes of the graph is checked where Inductor is run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from normfx.backend import transform
from normfx.lower.folded import fed
from normfx.options import Options
from normfx.report import GraphReport, Report

FLOAT64 = 1e-10
"""Relative to the largest entry of an output; of a gradient: to its own, or to `floor` times the largest gradient's."""


def promote(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph in which float32, where the model asks for it by name, is float64.

    Many RMSNorms compute in float32 whatever the model's dtype. With this their own round-off is out of the way.
    """
    graph = copy.deepcopy(gm.graph)
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "float":
            node.target = "double"
        node.args, node.kwargs = (map_aggregate(a, _wider) for a in (node.args, node.kwargs))
    wide = GraphModule(gm, graph)
    wide.meta.update(gm.meta)
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder"), strict=True):
        if hasattr(old, "_dynamo_source"):  # else a buffer would look like an input
            new._dynamo_source = old._dynamo_source
    return wide


def _wider(arg: Any) -> Any:
    return torch.float64 if arg is torch.float32 else arg


class EagerBackend:
    """A backend that runs normfx's stages strictly, with graph checks, and then the rewritten graph eagerly."""

    def __init__(self, options: Mapping[str, Any] | None = None, promoted: bool = False) -> None:
        self.promoted = promoted
        self.settings = Options.parse(
            {"strict": True, "fold": "live", **(options or {})}, environ={"NORMFX_VERIFY": "1"}
        )
        self.graphs: list[GraphReport] = []
        self.modules: list[GraphModule] = []
        self.kept = 0  # values that leave the graphs and are kept between calls

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        ready = transform(promote(gm) if self.promoted else gm, example_inputs, self.settings)
        self.graphs.append(ready.report)
        self.modules.append(ready.graph_module)
        run: Callable[..., Any] = ready.graph_module.forward
        self.kept += len(ready.folding.inputs) if ready.folding else 0
        return fed(run, ready.folding) if ready.folding else run

    @property
    def report(self) -> Report:
        return Report(tuple(self.graphs))


def transformed(
    model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any] | None = None
) -> tuple[Any, Report]:
    """Outputs of the rewritten model and the report; one graph, no breaks."""
    torch._dynamo.reset()
    backend = EagerBackend(options)
    outputs = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    assert len(backend.graphs) == 1
    return outputs, backend.report


def assert_same_float64(
    model: nn.Module,
    inputs: tuple[Any, ...],
    options: Mapping[str, Any] | None = None,
    tolerance: float = FLOAT64,
    promoted: bool = False,
    floor: float = 1e-3,
) -> Report:
    """Outputs and every gradient of the rewritten model equal eager's in float64; a None gradient stays None.

    floor: gradients smaller than this part of the largest one are compared at its scale: where a gradient is 0 in exact
    arithmetic (a shift that a norm removes), both sides are left-over round-off of the terms that cancel.
    promoted: both sides compute in float64 where the model asks for float32 by name.
    """
    model = copy.deepcopy(model).double()
    inputs = tuple(_double(x) for x in inputs)
    backend = EagerBackend(options, promoted)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    reference = exact(model) if promoted else model
    expected, expected_grads = outputs_and_grads(reference, model, inputs)
    actual, actual_grads = outputs_and_grads(compiled, model, inputs)
    assert len(backend.graphs) == 1
    assert_same_results(expected, expected_grads, actual, actual_grads, tolerance, floor)
    if "fold" not in (options or {}):
        _assert_kept_folds_agree(model, inputs, options, tolerance, promoted)
    return backend.report


def assert_same_results(
    expected: Sequence[Tensor],
    expected_grads: Mapping[str, Tensor | None],
    actual: Sequence[Tensor],
    actual_grads: Mapping[str, Tensor | None],
    tolerance: float = FLOAT64,
    floor: float = 1e-3,
) -> None:
    """Outputs and gradients, as outputs_and_grads returns them, are the same; None stays None."""
    for want, got in zip(expected, actual, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        _close(got, want, want.abs().max().item(), tolerance, "output")
    largest = max((g.abs().max().item() for g in expected_grads.values() if g is not None and g.numel()), default=0.0)
    for name, want in expected_grads.items():
        got = actual_grads[name]
        assert (got is None) == (want is None), f"gradient of {name}: {got} instead of {want}"
        if want is not None and got is not None:
            _close(got, want, max(want.abs().max().item(), floor * largest), tolerance, f"gradient of {name}")


def _assert_kept_folds_agree(
    model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any] | None, tolerance: float, promoted: bool
) -> None:
    """Without gradients the folds are inputs of the graph; same outputs."""
    torch._dynamo.reset()
    backend = EagerBackend({**(options or {}), "fold": "cached"}, promoted)
    with torch.no_grad():
        kept = torch.compile(model, backend=backend, fullgraph=True)
        reference = exact(model) if promoted else model
        for want, got in zip(_outputs(reference, inputs), _outputs(kept, inputs), strict=True):
            _close(got, want, want.abs().max().item(), tolerance, "output with kept folds")


def _outputs(call: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Floating outputs, from a fixed random state and fresh inputs."""
    torch.manual_seed(1)
    fresh = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)
    return [o for o in pytree.tree_leaves(call(*fresh)) if _is_float(o)]


def exact(model: nn.Module) -> Callable[..., Any]:
    """The model run eagerly with every float32 that it asks for by name made float64."""
    compiled: Callable[..., Any] = torch.compile(model, backend=lambda gm, _: promote(gm).forward, fullgraph=True)
    return compiled


LOW_PRECISION = {
    torch.float32: 2.0,  # reordered sums: as good as another order of eager's own
    torch.bfloat16: 1.25,  # folds are rounded once more than eager's weights: sqrt(2) at one op, diluted by the rest
}
"""Largest error against float64, as a multiple of eager's own error in that dtype; float16 as bfloat16."""


def assert_low_precision(
    model: nn.Module, batches: Sequence[tuple[Any, ...]], backend: Any, dtype: torch.dtype
) -> tuple[float, float]:
    """The error against float64, relative in the 2-norm over all outputs of all batches, is at most eager's own times
    LOW_PRECISION. Returns both errors. One norm over many entries: a maximum would compare two random outliers."""
    torch._dynamo.reset()
    low = copy.deepcopy(model).to(dtype)
    true = exact(copy.deepcopy(low).double())
    compiled = torch.compile(low, backend=backend, fullgraph=True)
    eager_error = own_error = 0.0
    with torch.no_grad():
        for inputs in batches:
            rounded = tuple(x.to(dtype) if _is_float(x) else x for x in inputs)
            want = _flat(true(*(_double(x) for x in rounded)))
            eager_error += (_flat(low(*rounded)) - want).square().sum().item()
            own_error += (_flat(compiled(*rounded)) - want).square().sum().item()
    eager_error, own_error = eager_error**0.5, own_error**0.5
    bound = LOW_PRECISION[torch.bfloat16 if dtype == torch.float16 else dtype]
    assert own_error <= bound * eager_error, f"{dtype}: {own_error:.3g} against eager's {eager_error:.3g}"
    return own_error, eager_error


def _flat(outputs: Any) -> Tensor:
    return torch.cat([o.double().flatten() for o in pytree.tree_leaves(outputs) if _is_float(o)])


def outputs_and_grads(
    call: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Floating outputs and the gradients of parameters and inputs under a fixed random cotangent."""
    model.zero_grad(set_to_none=True)
    fresh = tuple(x.detach().clone().requires_grad_() if _is_float(x) else x for x in inputs)
    torch.manual_seed(1)
    outputs = [o for o in pytree.tree_leaves(call(*fresh)) if _is_float(o)]
    generator = torch.Generator().manual_seed(2)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads.update({f"input {i}": x.grad for i, x in enumerate(fresh) if _is_float(x)})
    return [o.detach() for o in outputs], {k: g.detach().clone() if g is not None else None for k, g in grads.items()}


def _close(got: Tensor, want: Tensor, scale: float, tolerance: float, what: str) -> None:
    assert torch.equal(torch.isfinite(got), torch.isfinite(want)), f"{what}: other non-finite entries"
    error = (got - want).nan_to_num().abs().max().item() if want.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-300), f"{what}: error {error:.3g} at scale {scale:.3g}"


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _double(x: Any) -> Any:
    return x.double() if _is_float(x) else x
