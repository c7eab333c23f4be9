"""find_norms: every spelling of a norm gives the record that recomputes it, look-alikes give none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from normfx.ir.graph import op_name, parameter_only
from normfx.ir.sites import Norm
from normfx.recognize.norms import find_norms
from normfx.recognize.rows import CASTS

D = 8
EPS = 1e-3
Parameters = dict[str, Tensor]


def trace(
    fn: Callable[..., Any], parameters: Parameters, *inputs: Tensor
) -> tuple[GraphModule, tuple[Norm, ...]]:
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
    var = x.square().sum(norm.dims, keepdim=True) / (
        math.prod(x.shape[k] for k in norm.dims) - norm.correction
    )
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
        torch.testing.assert_close(
            recompute(norm, run.env[norm.input], weight, bias), expected, rtol=1e-12, atol=1e-12
        )


# ---------------------------------------------------------------- spellings


@dataclass(frozen=True)
class Case:
    """A function of (parameters, x) with one norm, and what is expected of it; shapes default to (2, 3, D)."""

    fn: Callable[[Parameters, Tensor], Tensor]
    kind: str
    eps: float = EPS
    place: str = "inside"
    correction: int = 0
    affine: str = ""
    dims: tuple[int, ...] = (2,)
    shape: tuple[int, ...] = (2, 3, D)
    dtype: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    extra: dict[str, Any] = field(default_factory=dict)


def mean(x: Tensor, dim: int = -1) -> Tensor:
    return x.mean(dim, keepdim=True)


def centre(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def _two_pass(p: Parameters, x: Tensor) -> Tensor:
    u = mean(x)
    s = mean((x - u).pow(2))
    return p["w"] * ((x - u) / torch.sqrt(s + EPS)) + p["b"]


def _moments(p: Parameters, x: Tensor) -> Tensor:
    u = mean(x)
    return (x - u) * torch.rsqrt(mean(x * x) - u * u + EPS) * p["w"]


def _folded_affine(p: Parameters, x: Tensor) -> Tensor:
    var, u = torch.var_mean(x, -1, correction=0, keepdim=True)
    scale = torch.rsqrt(var + EPS) * p["w"]
    return x * scale + (p["b"] - u * scale)


def _var_mean(p: Parameters, x: Tensor) -> Tensor:
    var, u = torch.var_mean(x, dim=-1, unbiased=False)
    return (x - u.unsqueeze(-1)) * (var[..., None] + EPS) ** -0.5


def _channels_first(p: Parameters, x: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return p["w"][:, None, None] * ((x - u) / torch.sqrt(s + EPS)) + p["b"][:, None, None]


def _llama(p: Parameters, x: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(mean(h.pow(2)) + EPS)
    return p["w"] * h.to(x.dtype)


def _gemma(p: Parameters, x: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(mean(h.pow(2)) + EPS)
    return (h * (1.0 + p["w"].float())).type_as(x)


def _t5(p: Parameters, x: Tensor) -> Tensor:
    variance = mean(x.to(torch.float32).pow(2))
    h = x * torch.rsqrt(variance + EPS)
    return p["w"] * h.to(p["w"].dtype)


def _rstd_cast(p: Parameters, x: Tensor) -> Tensor:
    return x * torch.rsqrt(mean(x.float().square()) + EPS).to(x.dtype) * p["w"]


def _dropped(p: Parameters, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1) + EPS).sqrt().unsqueeze(-1)


def _viewed(p: Parameters, x: Tensor) -> Tensor:
    rstd = (x.square().mean(-1) + EPS).rsqrt()
    return x * rstd.view(2, 3, 1).expand(2, 3, D) * p["w"]


BF16 = torch.bfloat16
SPELLINGS: dict[str, Case] = {
    "F.layer_norm": Case(lambda p, x: F.layer_norm(x, (D,), p["w"], p["b"], EPS), "LayerNorm", affine="wb"),
    "F.layer_norm, two dims": Case(
        lambda p, x: F.layer_norm(x, (3, D), None, None, EPS), "LayerNorm", dims=(1, 2)
    ),
    "native_layer_norm": Case(
        lambda p, x: torch.native_layer_norm(x, [D], p["w"], None, EPS)[0], "LayerNorm", affine="w"
    ),
    "F.rms_norm": Case(lambda p, x: F.rms_norm(x, (D,), p["w"], EPS), "RMSNorm", affine="w"),
    "layer_norm in bf16": Case(
        lambda p, x: F.layer_norm(x, (D,), p["w"], p["b"], EPS), "LayerNorm", affine="wb", dtype=BF16
    ),
    "two-pass": Case(_two_pass, "LayerNorm", affine="wb"),
    "mean computed twice": Case(
        lambda p, x: centre(x) / torch.sqrt(mean(centre(x) ** 2) + EPS) * p["w"] + p["b"], "LayerNorm", affine="wb"
    ),
    "moments E[x²] − μ²": Case(_moments, "LayerNorm", affine="w"),
    "γ, β multiplied into rstd": Case(
        lambda p, x: centre(x) * (torch.rsqrt(x.var(-1, keepdim=True, correction=0) + EPS) * p["w"]) + p["b"],
        "LayerNorm", affine="wb",
    ),
    "x·scale + (β − μ·scale)": Case(_folded_affine, "LayerNorm", affine="wb"),
    "var_mean, keepdim=False": Case(_var_mean, "LayerNorm"),
    "unbiased var": Case(
        lambda p, x: centre(x) / torch.sqrt(x.var(-1, keepdim=True) + EPS) * p["w"], "LayerNorm", correction=1, affine="w"
    ),
    "unbiased by hand": Case(
        lambda p, x: centre(x) / (centre(x).square().sum(-1, keepdim=True) / (D - 1) + EPS).sqrt(),
        "LayerNorm", correction=1,
    ),
    "std + eps (annotated transformer)": Case(
        lambda p, x: p["w"] * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + p["b"],
        "LayerNorm", place="outside", correction=1, affine="wb",
    ),
    "biased std² + eps": Case(
        lambda p, x: centre(x) / (x.std(-1, keepdim=True, unbiased=False) ** 2 + EPS).sqrt(), "LayerNorm"
    ),
    "var of the centred": Case(lambda p, x: centre(x) * torch.rsqrt(centre(x).var(-1, False, keepdim=True) + EPS), "LayerNorm"),
    "rms of the centred": Case(lambda p, x: F.rms_norm(centre(x), (D,), None, EPS), "RMSNorm"),
    "variance clamped at 0": Case(
        lambda p, x: centre(x) / ((mean(x * x) - mean(x) ** 2).clamp(min=0) + EPS).sqrt(), "LayerNorm"
    ),
    "channels first": Case(_channels_first, "LayerNorm", affine="wb", dims=(1,), shape=(2, D, 3, 3)),
    "channels first, (1, d, 1, 1)": Case(
        lambda p, x: centre(x, 1) / (x.var(1, False, keepdim=True) + EPS).sqrt() * p["w"].view(1, D, 1, 1),
        "LayerNorm", affine="w", dims=(1,), shape=(2, D, 3, 3),
    ),
    "one row": Case(lambda p, x: x * (x.pow(2).mean() + EPS).rsqrt(), "RMSNorm", dims=(0,), shape=(D,)),
    "middle axis": Case(lambda p, x: x * (mean(x.square(), -2) + EPS).rsqrt(), "RMSNorm", dims=(1,)),
    "llama": Case(_llama, "RMSNorm", affine="w"),
    "llama in bf16": Case(_llama, "RMSNorm", affine="w", dtype=BF16),
    "gemma in bf16": Case(_gemma, "RMSNorm", affine="w", dtype=BF16),
    "t5 in bf16": Case(_t5, "RMSNorm", affine="w", dtype=BF16),
    "rstd cast back": Case(_rstd_cast, "RMSNorm", affine="w", dtype=BF16),
    "statistics in bf16": Case(
        lambda p, x: x * torch.rsqrt(mean(x * x) + EPS), "RMSNorm", dtype=BF16, compute=BF16
    ),
    "mean with dtype=": Case(
        lambda p, x: x / torch.sqrt(torch.mean(x * x, -1, keepdim=True, dtype=torch.float32) + EPS), "RMSNorm", dtype=BF16
    ),
    "sum·(1/n)": Case(lambda p, x: x / ((x * x).sum(-1, keepdim=True) * (1 / D) + EPS).sqrt(), "RMSNorm"),
    "sum/n": Case(lambda p, x: x * (1.0 / ((x * x).sum(-1, True) / D + EPS).sqrt()) * p["w"], "RMSNorm", affine="w"),
    "eps in the sum": Case(
        lambda p, x: math.sqrt(D) * x * ((x * x).sum(-1, keepdim=True) + EPS).rsqrt(), "RMSNorm", eps=EPS / D
    ),
    "unsqueeze": Case(_dropped, "RMSNorm"),
    "view and expand": Case(_viewed, "RMSNorm", affine="w"),
    "eps outside": Case(lambda p, x: x / (mean(x.pow(2)).sqrt() + EPS), "RMSNorm", place="outside"),
    "clamped mean square": Case(lambda p, x: x * mean(x.pow(2)).clamp(min=EPS).rsqrt(), "RMSNorm", place="clamped"),
    "F.normalize·√d": Case(
        lambda p, x: F.normalize(x, dim=-1, eps=EPS) * D**0.5 * p["w"], "RMSNorm", EPS**2 / D, "clamped", affine="w"
    ),
    "γ·√d after F.normalize": Case(
        lambda p, x: F.normalize(x, dim=-1, eps=EPS) * p["w"] * D**0.5, "RMSNorm", EPS**2 / D, "clamped", affine="w"
    ),
    "‖x‖/√d + eps": Case(
        lambda p, x: p["w"] * x / (x.norm(dim=-1, keepdim=True) * D**-0.5 + EPS), "RMSNorm", place="outside", affine="w"
    ),
    "no eps": Case(lambda p, x: x / torch.linalg.norm(x, dim=-1, keepdim=True) * D**0.5, "RMSNorm", eps=0.0),
    "reciprocal": Case(lambda p, x: x * (mean(x.square()) + EPS).sqrt().reciprocal(), "RMSNorm"),
    "div by rsqrt": Case(lambda p, x: x / (mean(x.square()) + EPS).rsqrt().reciprocal(), "RMSNorm"),
    "addcmul": Case(
        lambda p, x: torch.addcmul(p["b"], p["w"], centre(x) * (x.var(-1, False, keepdim=True) + EPS).rsqrt()),
        "LayerNorm", affine="wb",
    ),
    "scalar γ": Case(lambda p, x: p["g"] * x * (mean(x.square()) + EPS).rsqrt(), "RMSNorm", affine="g"),
    "only β": Case(lambda p, x: x * (mean(x**2) + EPS).rsqrt() + p["b"], "RMSNorm", affine="b"),
    "per head, view": Case(
        lambda p, x: F.rms_norm(x.view(2, 3, 2, 4), (4,), None, EPS), "RMSNorm", dims=(3,)
    ),
}  # fmt: skip


def parameters(dtype: torch.dtype = torch.float32) -> Parameters:
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (D,), "b": (D,), "g": (1,)}
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}


@pytest.mark.parametrize("case", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spelling(case: Case) -> None:
    p = parameters(case.dtype)
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(2)).to(case.dtype)
    gm, norms = trace(case.fn, p, x)
    (norm,) = norms
    assert (norm.kind, norm.eps_place, norm.correction, norm.dims) == (
        case.kind, case.place, case.correction, case.dims,
    )  # fmt: skip
    assert norm.eps == pytest.approx(case.eps, rel=1e-12)
    assert (norm.weight is not None, norm.bias is not None) == (
        "w" in case.affine or "g" in case.affine,
        "b" in case.affine,
    )
    assert (norm.compute_dtype, norm.out_dtype) == (case.compute, norm.output.meta["val"].dtype)
    assert norm.size == math.prod(norm.input.meta["val"].shape[k] for k in norm.dims)
    assert norm.obstacle == "" and norm.output in norm.nodes and norm.input not in norm.nodes
    assert norm.output in gm.graph.output_node().all_input_nodes
    assert_recomputes(gm, norms, *p.values(), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_default_eps_of_rms_norm_is_what_torch_does(dtype: torch.dtype) -> None:
    """x/y at a tiny x tells the epsilon: (x/y)² = x² + eps."""
    x = torch.full((1, 4), 2.0**-11 if dtype != torch.float64 else 2.0**-26, dtype=dtype)
    _, (norm,) = trace(lambda p, x: F.rms_norm(x, (4,)), {}, x)
    exact = x.double() / F.rms_norm(x, (4,)).double()
    assert norm.eps == pytest.approx(float((exact.square() - x.double().square())[0, 0]), rel=2e-3)
    assert norm.compute_dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ---------------------------------------------------------------- look-alikes


def _rms(x: Tensor, of: Tensor | None = None) -> Tensor:
    return x * torch.rsqrt(mean((x if of is None else of).square()) + EPS)


def _no_grad_statistics(p: Parameters, x: Tensor) -> Tensor:
    with torch.no_grad():
        rstd = torch.rsqrt(mean(x.square()) + EPS)
    return x * rstd


def _autocast_statistics(p: Parameters, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        rstd = torch.rsqrt(mean(x.square()) + EPS)
    return x * rstd


def _masked(p: Parameters, x: Tensor) -> Tensor:
    keep = (x > -1).to(x.dtype)
    count = keep.sum(-1, keepdim=True)
    u = (x * keep).sum(-1, keepdim=True) / count
    var = ((x - u).square() * keep).sum(-1, keepdim=True) / count
    return (x - u) / torch.sqrt(var + EPS)


def _prefix(p: Parameters, x: Tensor) -> Tensor:
    return x / (x[..., : D // 2].norm(dim=-1, keepdim=True) * (D // 2) ** -0.5 + EPS)


def _groups(p: Parameters, x: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.unflatten(-1, (2, D // 2)).square().mean(-1) + EPS)
    return x * rstd.repeat_interleave(D // 2, -1)


def _written(p: Parameters, x: Tensor) -> Tensor:
    var = mean(x.square())
    rstd = torch.rsqrt(var + EPS)
    var.add_(1)
    return x * rstd


def _written_input(p: Parameters, x: Tensor) -> Tensor:
    h = x + 1
    rstd = torch.rsqrt(mean(h.square()) + EPS)
    h.view(-1).add_(1)
    return h * rstd


LOOKALIKES: dict[str, Callable[[Parameters, Tensor], Tensor]] = {
    "BiasFree LN": lambda p, x: x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * p["w"],
    "centred over rms": lambda p, x: centre(x) * torch.rsqrt(mean(x.square()) + EPS),
    "pRMSNorm": _prefix,
    "masked": _masked,
    "F.normalize": lambda p, x: F.normalize(x, dim=-1) * p["w"],
    "ScaleNorm": lambda p, x: p["g"] * x / (x.norm(dim=-1, keepdim=True) + EPS),
    "groups inside a row": _groups,
    "statistics of another axis": lambda p, x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS).mT,
    "mean of another axis": lambda p, x: (
        (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + EPS)
    ),
    "variance of another axis": lambda p, x: (
        centre(x) * torch.rsqrt(x.var(1, keepdim=True, correction=0) + EPS)
    ),
    "statistics of another value": lambda p, x: _rms(x, of=x + p["b"]),
    "statistics of relu(x)": lambda p, x: _rms(x, of=F.relu(x)),
    "detached statistics": lambda p, x: _rms(x, of=x.detach()),
    "detached mean": lambda p, x: (x - mean(x).detach()) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
    "no_grad statistics": _no_grad_statistics,
    "statistics in another autocast region": _autocast_statistics,
    "batch statistics": lambda p, x: (x - x.mean(0)) * torch.rsqrt(x.var(0, unbiased=False) + EPS),
    "BatchNorm by hand": lambda p, x: (x - x.mean((0, 1))) * torch.rsqrt(x.var((0, 1), unbiased=False) + EPS),
    "narrowed statistics": lambda p, x: _rms(x, of=x.to(torch.bfloat16)),
    "two epsilons": lambda p, x: x / (torch.sqrt(mean(x.square()) + EPS) + EPS),
    "cube root": lambda p, x: x * (mean(x.square()) + EPS) ** (-1 / 3),
    "mean of |x|": lambda p, x: x / (mean(x.abs()) + EPS),
    "wrong count": lambda p, x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) / (D + 1) + EPS),
    "subtracted epsilon": lambda p, x: x * torch.rsqrt(mean(x.square()) - EPS),
    "epsilon from data": lambda p, x: x * torch.rsqrt(mean(x.square()) + x[..., :1].abs()),
    "softmax": lambda p, x: x.softmax(-1) * p["w"] + p["b"],
    "variance written in place": _written,
    "input written in place": _written_input,
}


@pytest.mark.parametrize("fn", LOOKALIKES.values(), ids=LOOKALIKES.keys())
def test_lookalike(fn: Callable[[Parameters, Tensor], Tensor]) -> None:
    _, norms = trace(fn, parameters(), torch.randn(2, D, D))
    assert norms == ()


# ---------------------------------------------------------------- where a norm begins and ends


def norms_of(fn: Callable[..., Any], *inputs: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Norm, ...]:
    """Norms of a function of (parameters, *inputs), each checked against its record."""
    p = parameters(dtype)
    gm, norms = trace(fn, p, *inputs)
    assert_recomputes(gm, norms, *p.values(), *inputs)
    return norms


def test_data_dependent_scale_is_outside() -> None:
    (norm,) = norms_of(lambda p, x, s: _rms(x) * (1 + s) + p["b"], torch.randn(2, 3, D), torch.randn(2, 1, D))
    assert (norm.weight, norm.bias, norm.obstacle) == (None, None, "")
    assert op_name(norm.output) == "aten::mul.Tensor"


def test_per_token_parameter_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: _rms(x) + p["w"].view(1, D, 1), torch.randn(2, D, D))
    assert norm.bias is None


def test_a_norm_read_before_its_affine_ends_there() -> None:
    (norm,) = norms_of(lambda p, x: [(z := _rms(x)) * p["w"], z * p["b"]], torch.randn(2, 3, D))
    assert (norm.weight, norm.obstacle) == (None, "")


def test_second_scale_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: _rms(x) * p["w"] * p["g"] * 2.0, torch.randn(2, 3, D))
    assert norm.weight is not None and norm.weight.name.startswith("p")


def test_number_factor_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: _rms(x) * 2.0 * 0.5, torch.randn(2, 3, D))
    assert norm.output.name == "mul"


@pytest.mark.parametrize(
    ("fn", "role"),
    [
        (lambda p, x: [(c := x - (u := mean(x))) / (mean(c**2) + EPS).sqrt(), u], "the mean"),
        (lambda p, x: [(c := centre(x)) / (mean(c**2) + EPS).sqrt(), c], "the centred value"),
        (lambda p, x: [x / ((v := mean(x**2)) + EPS).sqrt(), v], "the variance"),
        (lambda p, x: [x * (r := (mean(x**2) + EPS).rsqrt()) * p["w"], r], "the reciprocal deviation"),
        (lambda p, x: [x * (mean(q := x * x) + EPS).rsqrt(), q], "a row-sized intermediate"),
    ],
)
def test_what_is_inside_and_read_elsewhere_is_an_obstacle(fn: Callable[..., Any], role: str) -> None:
    (norm,) = norms_of(fn, torch.randn(2, 3, D))
    assert norm.obstacle.startswith(role) and norm.obstacle.endswith("read by output")


def test_upcast_read_elsewhere_is_the_input() -> None:
    (norm,) = norms_of(lambda p, x: [_rms(h := x.float()), h], torch.randn(2, 3, D).bfloat16())
    assert op_name(norm.input) in CASTS and norm.input not in norm.nodes and norm.obstacle == ""


def test_upcast_of_the_statistics_read_elsewhere_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: [_rms(x, of=(h := x.float())), h], torch.randn(2, 3, D).bfloat16())
    assert norm.input.op == "placeholder" and norm.obstacle == ""
    assert not any(op_name(n) in CASTS for n in norm.nodes)


def test_a_widening_cast_after_the_norm_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: (_rms(x) * p["w"]).float(), torch.randn(2, 3, D).bfloat16(), dtype=BF16)
    assert norm.out_dtype == BF16


def test_two_norms_of_one_value() -> None:
    def fn(p: Parameters, x: Tensor) -> list[Tensor]:
        return [_rms(x) * p["w"], _rms(x) * p["b"]]

    first, second = norms_of(fn, torch.randn(2, 3, D))
    assert (first.name, second.name) == ("rms_norm", "rms_norm_1")
    assert first.input is second.input and not first.nodes & second.nodes


def test_chain_of_norms_in_graph_order() -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        h = _rms(x) * p["w"]
        h = h + F.layer_norm(h, (D,))
        return centre(h) / (h.var(-1, keepdim=True) + EPS).sqrt()

    norms = norms_of(fn, torch.randn(2, 3, D))
    assert [(n.kind, n.name) for n in norms] == [
        ("RMSNorm", "rms_norm"), ("LayerNorm", "layer_norm"), ("LayerNorm", "layer_norm_1"),
    ]  # fmt: skip


def test_names() -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        return _rms(F.layer_norm(_rms(x), (D,)))

    gm, _ = trace(fn, {}, torch.randn(2, 3, D))
    norms = find_norms(gm.graph, frozenset(), lambda n: "block.ln", lambda n: f"model.py:{n.name}")
    assert [n.name for n in norms] == ["block.ln", "block.ln#2", "block.ln#3"]
    assert norms[1].source == "model.py:layer_norm"


@pytest.mark.parametrize("switch", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_whole_norm_inside_a_region(switch: Callable[[], Any]) -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        with switch():
            y = _rms(x + 1)
        return y * p["w"]

    (norm,) = norms_of(fn, torch.randn(2, 3, D, requires_grad=True))
    assert norm.weight is None


def test_symbolic_batch() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D, EPS), _Spelled())
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(4, 3, D),), dynamic_shapes=[{0: batch}], strict=False)
    norms = find_norms(program.graph_module.graph, frozenset(), lambda n: "", lambda n: "")
    assert [(n.kind, n.dims, n.size) for n in norms] == [("RMSNorm", (2,), D), ("LayerNorm", (2,), D)]


def test_symbolic_width() -> None:
    width = torch.export.Dim("width", min=2)
    program = torch.export.export(
        _Spelled(), (torch.randn(4, 3, D),), dynamic_shapes=[{2: width}], strict=False
    )
    (norm,) = find_norms(program.graph_module.graph, frozenset(), lambda n: "", lambda n: "")
    assert (norm.kind, norm.size, norm.correction) == ("LayerNorm", 0, 0)


class _Spelled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        var, u = torch.var_mean(x, -1, correction=0)
        return (x - u[..., None]) * torch.rsqrt(var + EPS)[..., None]


# ---------------------------------------------------------------- whole ops with obstacles


@pytest.mark.parametrize(
    ("fn", "kind", "obstacle"),
    [
        (
            lambda p, x: F.layer_norm(x, (D,), x[0, 0]),
            "LayerNorm",
            "its weight (select_1) is computed from data",
        ),
        (lambda p, x: torch.native_layer_norm(x, [D], None, None, EPS)[:2], "LayerNorm", "its statistics"),
        (
            lambda p, x: F.layer_norm(x + 1, (D,)).add_(x),
            "LayerNorm",
            "its output (layer_norm) is written in place",
        ),
        (
            lambda p, x: F.batch_norm(x.mT, None, None, training=True),
            "BatchNorm",
            "it takes its statistics over the batch",
        ),
        (
            lambda p, x: F.batch_norm(x.mT, p["w"], p["w"], p["b"], p["b"]),
            "BatchNorm",
            "with running statistics it is an affine map of each channel",
        ),
        (
            lambda p, x: F.group_norm(x.mT, 2, p["w"], p["b"]),
            "GroupNorm",
            "it normalises 2 groups of channels",
        ),
        (
            lambda p, x: F.instance_norm(x.mT, eps=EPS),
            "InstanceNorm",
            "it normalises each channel over positions",
        ),
    ],
)
def test_whole_op_with_obstacle(fn: Callable[..., Any], kind: str, obstacle: str) -> None:
    _, (norm,) = trace(fn, parameters(), torch.randn(2, 3, D))
    assert norm.kind == kind and norm.obstacle.startswith(obstacle)


# ---------------------------------------------------------------- real classes


def _hf(module: str, name: str) -> Callable[[int], nn.Module]:
    def make(d: int) -> nn.Module:
        found = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
        return getattr(found, name)(d)

    return make


def _channels_first_convnext(d: int) -> nn.Module:
    found = pytest.importorskip("transformers.models.convnext.modeling_convnext")
    return found.ConvNextLayerNorm(d, data_format="channels_first")


def _timm(name: str) -> Callable[[int], nn.Module]:
    return lambda d: getattr(pytest.importorskip("timm.layers"), name)(d)


def _torchvision(d: int) -> nn.Module:
    return pytest.importorskip("torchvision.models.convnext").LayerNorm2d(d)


TOKENS, IMAGES = (2, 3, D), (2, D, 3, 3)
CLASSES: dict[str, tuple[Callable[[int], nn.Module], str, float, tuple[int, ...]]] = {
    "nn.LayerNorm": (nn.LayerNorm, "LayerNorm", 1e-5, TOKENS),
    "nn.RMSNorm": (nn.RMSNorm, "RMSNorm", torch.finfo(torch.float32).eps, TOKENS),
    "T5LayerNorm": (_hf("t5", "T5LayerNorm"), "RMSNorm", 1e-6, TOKENS),
    "LlamaRMSNorm": (_hf("llama", "LlamaRMSNorm"), "RMSNorm", 1e-6, TOKENS),
    "Gemma2RMSNorm": (_hf("gemma2", "Gemma2RMSNorm"), "RMSNorm", 1e-6, TOKENS),
    "Olmo2RMSNorm": (_hf("olmo2", "Olmo2RMSNorm"), "RMSNorm", 1e-6, TOKENS),
    "ConvNextLayerNorm": (_channels_first_convnext, "LayerNorm", 1e-6, IMAGES),
    "timm LayerNorm2d": (_timm("LayerNorm2d"), "LayerNorm", 1e-6, IMAGES),
    "timm RmsNorm": (_timm("RmsNorm"), "RMSNorm", 1e-6, TOKENS),
    "timm RmsNorm2d": (_timm("RmsNorm2d"), "RMSNorm", 1e-6, IMAGES),
    "torchvision LayerNorm2d": (_torchvision, "LayerNorm", 1e-5, IMAGES),
}


IN_ITS_OWN_DTYPE = {"timm RmsNorm2d"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_real_class(name: str, dtype: torch.dtype) -> None:
    make, kind, eps, shape = CLASSES[name]
    model = make(D).to(dtype)
    p = {k: torch.randn_like(v) for k, v in model.named_parameters()}
    x = torch.randn(shape).to(dtype)
    gm, (norm,) = trace(lambda p, x: functional_call(model, p, (x,)), p, x)
    assert (norm.kind, norm.eps_place, norm.correction, norm.obstacle) == (kind, "inside", 0, "")
    assert norm.eps == pytest.approx(eps) and norm.size == D and (norm.weight is not None) == ("weight" in p)
    assert (
        norm.compute_dtype == (dtype if name in IN_ITS_OWN_DTYPE else torch.float32)
        and norm.out_dtype == dtype
    )
    assert_recomputes(gm, (norm,), *p.values(), x)


def test_timm_simple_norm_is_not_centred_and_no_norm() -> None:
    model = _timm("SimpleNorm")(D)
    _, norms = trace(
        lambda p, x: functional_call(model, p, (x,)), dict(model.named_parameters()), torch.randn(TOKENS)
    )
    assert norms == ()


# ---------------------------------------------------------------- any combination of choices

CENTRES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "subtract": lambda x: x - x.mean(-1, keepdim=True),
    "unsqueeze": lambda x: x - x.mean(-1).unsqueeze(-1),
    "sum": lambda x: x - x.sum(2, keepdim=True) / D,
    "var_mean": lambda x: x - torch.var_mean(x, -1, keepdim=True)[1],
    "add": lambda x: -x.mean(-1, keepdim=True) + x,
}
SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "pow": lambda c: c.pow(2), "mul": lambda c: c * c, "square": lambda c: c.square(), "**": lambda c: c**2.0,
}  # fmt: skip
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda q: q.mean(-1, keepdim=True),
    "dropped": lambda q: q.mean(dim=2)[:, :, None],
    "sum": lambda q: q.sum(-1, keepdim=True) / D,
    "times": lambda q: (1.0 / D) * q.sum(-1, keepdim=True),
}
DIVIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rsqrt": lambda c, v: c * torch.rsqrt(v),
    "swapped": lambda c, v: torch.rsqrt(v) * c,
    "sqrt": lambda c, v: c / torch.sqrt(v),
    "reciprocal": lambda c, v: c * (1.0 / v.sqrt()),
    "pow": lambda c, v: c * v ** (-0.5),
    "root": lambda c, v: c / v**0.5,
    "expand": lambda c, v: c / torch.sqrt(v).expand_as(c),
}
AFFINES: dict[str, Callable[[Tensor, Parameters], Tensor]] = {
    "": lambda z, p: z,
    "w": lambda z, p: z * p["w"],
    "ww": lambda z, p: p["w"] * z,
    "+": lambda z, p: (1 + p["w"]) * z,
    "wb": lambda z, p: z * p["w"] + p["b"],
    "bw": lambda z, p: torch.addcmul(p["b"], z, p["w"]),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    *(st.sampled_from(sorted(table)) for table in (CENTRES, CENTRES, SQUARES, MEANS, DIVIDES, AFFINES)),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_combination_gives_the_same_record(
    numerator: str,
    inner: str,
    square: str,
    average: str,
    divide: str,
    affine: str,
    upcast: bool,
    dtype: torch.dtype,
) -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        h = x.float() if upcast else x
        variance = MEANS[average](SQUARES[square](CENTRES[inner](h)))
        return AFFINES[affine](DIVIDES[divide](CENTRES[numerator](h), variance + EPS).to(x.dtype), p)

    p, x = parameters(dtype), torch.randn(2, 3, D).to(dtype)
    gm, norms = trace(fn, p, x)
    if (numerator == "none") != (inner == "none"):
        assert norms == ()
        return
    (norm,) = norms
    assert norm.kind == ("RMSNorm" if inner == "none" else "LayerNorm")
    assert (norm.eps, norm.eps_place, norm.correction, norm.dims, norm.size) == (EPS, "inside", 0, (2,), D)
    assert (norm.weight is not None, norm.bias is not None) == (affine != "", "b" in affine)
    assert norm.input.name == "x_1" and norm.obstacle == ""
    assert norm.compute_dtype == (torch.float32 if upcast else dtype) and norm.out_dtype == dtype
    assert_recomputes(gm, norms, *p.values(), x)
