"""find_norms: every spelling of a norm gives the record that recomputes it, look-alikes give none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import EagerBackend, assert_low_precision
from norm_records import EPS, D, Parameters, assert_recomputes, centre, mean, parameters, rms, trace
from torch import Tensor, nn

BF16 = torch.bfloat16

# ---------------------------------------------------------------- spellings


@dataclass(frozen=True)
class Case:
    """A function of (parameters, x) with one norm, and what is expected of the norm."""

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


SPELLINGS: dict[str, Case] = {
    "F.layer_norm": Case(lambda p, x: F.layer_norm(x, (D,), p["w"], p["b"], EPS), "LayerNorm", affine="wb"),
    "F.layer_norm, two dims": Case(lambda p, x: F.layer_norm(x, (3, D), None, None, EPS), "LayerNorm", dims=(1, 2)),
    "native_layer_norm": Case(
        lambda p, x: torch.native_layer_norm(x, [D], p["w"], None, EPS)[0], "LayerNorm", affine="w"
    ),
    "F.rms_norm": Case(lambda p, x: F.rms_norm(x, (D,), p["w"], EPS), "RMSNorm", affine="w"),
    "layer_norm in bf16": Case(
        lambda p, x: F.layer_norm(x, (D,), p["w"], p["b"], EPS), "LayerNorm", affine="wb", dtype=BF16
    ),
    "F.layer_norm, then γ + 1": Case(
        lambda p, x: F.layer_norm(x, (D,), eps=EPS) * (p["w"] + 1), "LayerNorm", affine="w"
    ),
    "F.layer_norm, then γ and β": Case(
        lambda p, x: torch.addcmul(p["b"], p["w"], F.layer_norm(x, (D,), eps=EPS)), "LayerNorm", affine="wb"
    ),
    "native_layer_norm, then γ": Case(
        lambda p, x: torch.native_layer_norm(x, [D], None, None, EPS)[0] * p["w"], "LayerNorm", affine="w"
    ),
    "F.rms_norm, then β": Case(lambda p, x: F.rms_norm(x, (D,), p["w"], EPS) + p["b"].exp(), "RMSNorm", affine="wb"),
    "F.rms_norm in bf16, then γ in float32": Case(
        lambda p, x: F.rms_norm(x, (D,), None, EPS) * p["w"].float(), "RMSNorm", affine="w", dtype=BF16
    ),
    "F.layer_norm in float32, cast, then γ": Case(
        lambda p, x: F.layer_norm(x.float(), (D,), eps=EPS).to(x.dtype) * p["w"], "LayerNorm", affine="w", dtype=BF16
    ),
    "F.layer_norm, then a scalar γ": Case(
        lambda p, x: p["g"] * F.layer_norm(x, (D,), None, None, EPS), "LayerNorm", affine="g"
    ),
    "two-pass": Case(_two_pass, "LayerNorm", affine="wb"),
    "mean computed twice": Case(
        lambda p, x: centre(x) / torch.sqrt(mean(centre(x) ** 2) + EPS) * p["w"] + p["b"],
        "LayerNorm",
        affine="wb",
    ),
    "moments E[x²] − μ²": Case(_moments, "LayerNorm", affine="w"),
    "γ, β multiplied into rstd": Case(
        lambda p, x: centre(x) * (torch.rsqrt(x.var(-1, keepdim=True, correction=0) + EPS) * p["w"]) + p["b"],
        "LayerNorm",
        affine="wb",
    ),
    "x·scale + (β − μ·scale)": Case(_folded_affine, "LayerNorm", affine="wb"),
    "var_mean, keepdim=False": Case(_var_mean, "LayerNorm"),
    "unbiased var": Case(
        lambda p, x: centre(x) / torch.sqrt(x.var(-1, keepdim=True) + EPS) * p["w"],
        "LayerNorm",
        correction=1,
        affine="w",
    ),
    "unbiased by hand": Case(
        lambda p, x: centre(x) / (centre(x).square().sum(-1, keepdim=True) / (D - 1) + EPS).sqrt(),
        "LayerNorm",
        correction=1,
    ),
    "std + eps (annotated transformer)": Case(
        lambda p, x: p["w"] * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + p["b"],
        "LayerNorm",
        place="outside",
        correction=1,
        affine="wb",
    ),
    "biased std² + eps": Case(
        lambda p, x: centre(x) / (x.std(-1, keepdim=True, unbiased=False) ** 2 + EPS).sqrt(), "LayerNorm"
    ),
    "var of the centred": Case(
        lambda p, x: centre(x) * torch.rsqrt(centre(x).var(-1, False, keepdim=True) + EPS), "LayerNorm"
    ),
    "rms of the centred": Case(lambda p, x: F.rms_norm(centre(x), (D,), None, EPS), "RMSNorm"),
    "variance clamped at 0": Case(
        lambda p, x: centre(x) / ((mean(x * x) - mean(x) ** 2).clamp(min=0) + EPS).sqrt(), "LayerNorm"
    ),
    "channels first": Case(_channels_first, "LayerNorm", affine="wb", dims=(1,), shape=(2, D, 3, 3)),
    "channels first, (1, d, 1, 1)": Case(
        lambda p, x: centre(x, 1) / (x.var(1, False, keepdim=True) + EPS).sqrt() * p["w"].view(1, D, 1, 1),
        "LayerNorm",
        affine="w",
        dims=(1,),
        shape=(2, D, 3, 3),
    ),
    "one row": Case(lambda p, x: x * (x.pow(2).mean() + EPS).rsqrt(), "RMSNorm", dims=(0,), shape=(D,)),
    "middle axis": Case(lambda p, x: x * (mean(x.square(), -2) + EPS).rsqrt(), "RMSNorm", dims=(1,)),
    "llama": Case(_llama, "RMSNorm", affine="w"),
    "llama in bf16": Case(_llama, "RMSNorm", affine="w", dtype=BF16),
    "gemma in bf16": Case(_gemma, "RMSNorm", affine="w", dtype=BF16),
    "t5 in bf16": Case(_t5, "RMSNorm", affine="w", dtype=BF16),
    "rstd cast back": Case(_rstd_cast, "RMSNorm", affine="w", dtype=BF16),
    "statistics in bf16": Case(lambda p, x: x * torch.rsqrt(mean(x * x) + EPS), "RMSNorm", dtype=BF16, compute=BF16),
    "mean with dtype=": Case(
        lambda p, x: x / torch.sqrt(torch.mean(x * x, -1, keepdim=True, dtype=torch.float32) + EPS),
        "RMSNorm",
        dtype=BF16,
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
        lambda p, x: F.normalize(x, dim=-1, eps=EPS) * D**0.5 * p["w"],
        "RMSNorm",
        EPS**2 / D,
        "clamped",
        affine="w",
    ),
    "γ·√d after F.normalize": Case(
        lambda p, x: F.normalize(x, dim=-1, eps=EPS) * p["w"] * D**0.5,
        "RMSNorm",
        EPS**2 / D,
        "clamped",
        affine="w",
    ),
    "F.normalize": Case(
        lambda p, x: F.normalize(x, dim=-1, eps=EPS) * p["w"],
        "RMSNorm",
        EPS**2,
        "clamped",
        correction=D - 1,
        affine="w",
    ),
    "ScaleNorm": Case(
        lambda p, x: x / (x.norm(dim=-1, keepdim=True) + EPS) * p["w"], "RMSNorm", EPS, "outside", D - 1, affine="w"
    ),
    "‖x‖/√d + eps": Case(
        lambda p, x: p["w"] * x / (x.norm(dim=-1, keepdim=True) * D**-0.5 + EPS),
        "RMSNorm",
        place="outside",
        affine="w",
    ),
    "no eps": Case(lambda p, x: x / torch.linalg.norm(x, dim=-1, keepdim=True) * D**0.5, "RMSNorm", eps=0.0),
    "reciprocal": Case(lambda p, x: x * (mean(x.square()) + EPS).sqrt().reciprocal(), "RMSNorm"),
    "div by rsqrt": Case(lambda p, x: x / (mean(x.square()) + EPS).rsqrt().reciprocal(), "RMSNorm"),
    "addcmul": Case(
        lambda p, x: torch.addcmul(p["b"], p["w"], centre(x) * (x.var(-1, False, keepdim=True) + EPS).rsqrt()),
        "LayerNorm",
        affine="wb",
    ),
    "float16 variance": Case(
        lambda p, x: centre(x) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt(), "LayerNorm", dtype=torch.float16
    ),
    "float16 length": Case(
        lambda p, x: x / x.norm(dim=-1, keepdim=True), "RMSNorm", eps=0.0, correction=D - 1, dtype=torch.float16
    ),
    "float16 squares": Case(
        lambda p, x: x * (mean(x.square()) + EPS).rsqrt(), "RMSNorm", dtype=torch.float16, compute=torch.float16
    ),
    "factors beyond float64's squares": Case(
        lambda p, x: x * 1e200 * (mean(x.square()) + EPS).rsqrt() * 1e-200,
        "RMSNorm",
        dtype=torch.float64,
        compute=torch.float64,
    ),
    "scalar γ": Case(lambda p, x: p["g"] * x * (mean(x.square()) + EPS).rsqrt(), "RMSNorm", affine="g"),
    "only β": Case(lambda p, x: x * (mean(x**2) + EPS).rsqrt() + p["b"], "RMSNorm", affine="b"),
    "per head, view": Case(lambda p, x: F.rms_norm(x.view(2, 3, 2, 4), (4,), None, EPS), "RMSNorm", dims=(3,)),
}


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


class Lengths(nn.Module):
    """Rows over their length, or deviation, of which the squares are beyond float16."""

    def __init__(self, deviation: bool) -> None:
        super().__init__()
        self.deviation, self.write, self.read = deviation, nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(x)
        y = y - y.mean(-1, keepdim=True)
        scale = y.std(-1, correction=0, keepdim=True) if self.deviation else y.norm(dim=-1, keepdim=True)
        out: Tensor = self.read(y / scale)
        return out


@pytest.mark.parametrize("deviation", [False, True])
def test_ops_that_square_themselves_are_wide_inside(deviation: bool) -> None:
    torch.manual_seed(0)
    model = Lengths(deviation)
    with torch.no_grad():
        model.write.bias[1] += 600.0
    backend = EagerBackend()
    assert_low_precision(model, [(torch.randn(8, 16, D),) for _ in range(4)], backend, torch.float16)
    assert len(backend.report.sites) == 1


# ---------------------------------------------------------------- look-alikes


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
    "groups inside a row": _groups,
    "statistics of another axis": lambda p, x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS).mT,
    "mean of another axis": lambda p, x: (
        (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + EPS)
    ),
    "variance of another axis": lambda p, x: centre(x) * torch.rsqrt(x.var(1, keepdim=True, correction=0) + EPS),
    "statistics of another value": lambda p, x: rms(x, of=x + p["b"]),
    "statistics of relu(x)": lambda p, x: rms(x, of=F.relu(x)),
    "detached statistics": lambda p, x: rms(x, of=x.detach()),
    "detached mean": lambda p, x: (x - mean(x).detach()) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
    "no_grad statistics": _no_grad_statistics,
    "statistics in another autocast region": _autocast_statistics,
    "statistics of another axis, unsqueezed": lambda p, x: x * (x.square().mean(1) + EPS).rsqrt().unsqueeze(-1),
    "statistics broadcast over rows": lambda p, x: x * (x.square().mean(-1) + EPS).rsqrt(),
    "statistics expanded over rows": lambda p, x: x * (x.square().mean(-1) + EPS).rsqrt().expand_as(x),
    "mean broadcast over rows": lambda p, x: (x - x.mean(-1)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
    "variance of another axis, unsqueezed": lambda p, x: (
        centre(x) * (x.var(1, correction=0) + EPS).rsqrt().unsqueeze(-1)
    ),
    "batch statistics, keepdim": lambda p, x: x * torch.rsqrt(x.square().mean(0, keepdim=True) + EPS),
    "batch statistics": lambda p, x: (x - x.mean(0)) * torch.rsqrt(x.var(0, unbiased=False) + EPS),
    "BatchNorm by hand": lambda p, x: (x - x.mean((0, 1))) * torch.rsqrt(x.var((0, 1), unbiased=False) + EPS),
    "narrowed statistics": lambda p, x: rms(x, of=x.to(torch.bfloat16)),
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
    _, norms = trace(fn, parameters(), torch.randn(D, D, D))
    assert norms == ()
