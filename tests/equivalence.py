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

from normfx.backend import transform
from normfx.options import Options
from normfx.report import GraphReport, Report

FLOAT64 = 1e-10
"""Relative to the largest entry of an output; of a gradient: to its own, or to 1e-3 of the largest gradient's."""


class EagerBackend:
    """A backend that runs normfx's stages strictly, with graph checks, and then the rewritten graph eagerly."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.settings = Options.parse({"strict": True, **(options or {})}, environ={"NORMFX_VERIFY": "1"})
        self.graphs: list[GraphReport] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten, report = transform(gm, example_inputs, self.settings)
        self.graphs.append(report)
        return rewritten.forward  # type: ignore[no-any-return]

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
    model: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any] | None = None, tolerance: float = FLOAT64
) -> Report:
    """Outputs and every gradient of the rewritten model equal eager's in float64; a None gradient stays None."""
    model = copy.deepcopy(model).double()
    inputs = tuple(_double(x) for x in inputs)
    backend = EagerBackend(options)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected, expected_grads = outputs_and_grads(model, model, inputs)
    actual, actual_grads = outputs_and_grads(compiled, model, inputs)
    assert len(backend.graphs) == 1
    for want, got in zip(expected, actual, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        _close(got, want, want.abs().max().item(), tolerance, "output")
    largest = max((g.abs().max().item() for g in expected_grads.values() if g is not None and g.numel()), default=0.0)
    for name, want in expected_grads.items():
        got = actual_grads[name]
        assert (got is None) == (want is None), f"gradient of {name}: {got} in place of {want}"
        if want is not None and got is not None:
            _close(got, want, max(want.abs().max().item(), 1e-3 * largest), tolerance, f"gradient of {name}")
    return backend.report


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
