"""Norm records checked: small functions are traced, and recomputed in float64 from the record alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from normfx.graph.nodes import op_name, parameter_only
from normfx.ir.sites import Norm
from normfx.recognize.norms import find_norms
from normfx.recognize.rows import CASTS

D = 8
EPS = 1e-3
Parameters = dict[str, Tensor]


def trace(fn: Callable[..., Any], parameters: Parameters, *inputs: Tensor) -> tuple[GraphModule, tuple[Norm, ...]]:
    """Canonical graph of fn(parameters, *inputs) and its norms."""
    gm = make_fx(fn, pre_dispatch=True, tracing_mode="fake")(parameters, *inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    known = [*placeholders[: len(parameters)], *gm.graph.find_nodes(op="get_attr")]
    norms = find_norms(gm.graph, parameter_only(gm.graph, known), lambda n: "", lambda n: "")
    return gm, norms


class Float64(Interpreter):
    """Runs a graph in float64 throughout: casts do nothing. Keeps every value."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def run_node(self, n: Node) -> Any:
        if op_name(n) in CASTS:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        result = super().run_node(n)
        return result.double() if isinstance(result, Tensor) else result

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
        if target is torch.ops.aten.rms_norm.default and len(args) < 4:
            kwargs["eps"] = torch.finfo(torch.float32).eps  # eps=None means another number in float64
        return super().call_function(target, args, kwargs)


def recompute(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What the record's fields say, in the words of its docstring."""
    if norm.kind == "LayerNorm":
        x = x - x.mean(norm.dims, keepdim=True)
    var = x.square().sum(norm.dims, keepdim=True) / (math.prod(x.shape[k] for k in norm.dims) - norm.correction)
    root = {
        "inside": lambda: (var + norm.eps).sqrt(),
        "outside": lambda: var.sqrt() + norm.eps,
        "clamped": lambda: var.clamp(min=norm.eps).sqrt(),
    }[norm.eps_place]()
    z = x / root
    z = z if weight is None else z * weight
    return z if bias is None else z + bias


def assert_recomputes(gm: GraphModule, norms: tuple[Norm, ...], *values: Tensor) -> None:
    run = Float64(gm)
    run.run(*(v.double() if v.is_floating_point() else v for v in values))
    for norm in norms:
        weight, bias = (None if n is None else run.env[n] for n in (norm.weight, norm.bias))
        expected = run.env[norm.output]
        torch.testing.assert_close(recompute(norm, run.env[norm.input], weight, bias), expected, rtol=1e-12, atol=1e-12)


def mean(x: Tensor, dim: int = -1) -> Tensor:
    return x.mean(dim, keepdim=True)


def centre(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def rms(x: Tensor, of: Tensor | None = None) -> Tensor:
    return x * torch.rsqrt(mean((x if of is None else of).square()) + EPS)


def parameters(dtype: torch.dtype = torch.float32) -> Parameters:
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (D,), "b": (D,), "g": (1,)}
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}


def norms_of(fn: Callable[..., Any], *inputs: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Norm, ...]:
    """Norms of a function of (parameters, *inputs), each checked against its record."""
    p = parameters(dtype)
    gm, norms = trace(fn, p, *inputs)
    assert_recomputes(gm, norms, *p.values(), *inputs)
    return norms
