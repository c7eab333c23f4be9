"""find_norms: any mix of spellings gives one record, and any mix of right and wrong parts only true ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_records import EPS, D, Parameters, assert_recomputes, centre, mean, parameters, trace
from torch import Tensor

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
    "pow": lambda c: c.pow(2),
    "mul": lambda c: c * c,
    "square": lambda c: c.square(),
    "**": lambda c: c**2.0,
}
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


# ---------------------------------------------------------------- whatever is found is true

BASES: tuple[Callable[[Parameters, Tensor], Tensor], ...] = (
    lambda p, x: x,
    lambda p, x: 2 * x,
    lambda p, x: -x,
    lambda p, x: x * p["w"],
    lambda p, x: centre(x),
)
NUMERATORS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    centre,
    lambda x: 2 * centre(x),
    lambda x: mean(x) - x,
    lambda x: x - 2 * mean(x),
    lambda x: x - mean(x * x),
)
STATISTICS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda c: mean(c * c),
    lambda c: mean(centre(c) ** 2),
    lambda c: c.square().sum(-1, keepdim=True),
    lambda c: c.square().sum(-1, keepdim=True) / (D - 1),
    lambda c: mean(c * c) - mean(c) ** 2,
    lambda c: (mean(c * c) - mean(c) * mean(c)).clamp(min=0),
    lambda c: c.var(-1, keepdim=True),
    lambda c: c.std(-1, keepdim=True, unbiased=False) ** 2,
    lambda c: c.norm(dim=-1, keepdim=True) ** 2 / D,
    lambda c: c.amax(-1, keepdim=True) ** 2,
)
EPSILONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda v: v,
    lambda v: v + EPS,
    lambda v: 2 * v + EPS,
    lambda v: v - EPS,
    lambda v: v.clamp(min=EPS),
    lambda v: v.clamp(min=EPS) + EPS,
    lambda v: torch.add(v, EPS, alpha=3),
)
ROOTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda v: v.rsqrt(),
    lambda v: 1 / v.sqrt(),
    lambda v: 1 / (v.sqrt() + EPS),
    lambda v: 1 / (2 * v.sqrt() + EPS),
    lambda v: v.sqrt().clamp(min=EPS).reciprocal(),
    lambda v: v**-0.25,
    lambda v: v.sqrt(),
    lambda v: 1 / v,
)
SCALES = (1.0, 1.0, -1.0, 2.0, 0.5, D**0.5, (D - 1) ** 0.5, ((D - 1) / D) ** 0.5)
OUTPUTS: tuple[Callable[[Parameters, Tensor], Tensor], ...] = (
    lambda p, z: z,
    lambda p, z: z * p["w"],
    lambda p, z: z * p["w"] + p["b"],
    lambda p, z: (z + p["b"]) * p["w"],
    lambda p, z: p["b"] - z * p["w"],
    lambda p, z: z + z * p["w"],
    lambda p, z: z * (2 * p["w"]),
    lambda p, z: z / p["w"],
    lambda p, z: torch.addcmul(p["b"], z, p["w"], value=2),
    lambda p, z: z * p["b"][:3, None],
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    *(st.sampled_from(table) for table in (BASES, NUMERATORS, NUMERATORS, STATISTICS, EPSILONS, ROOTS, SCALES, OUTPUTS))
)
def test_right_and_wrong_parts_mixed_yield_only_true_records(
    base: Any, numerator: Any, inner: Any, statistic: Any, epsilon: Any, root: Any, scale: float, output: Any
) -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        h = base(p, x)
        return output(p, numerator(h) * root(epsilon(statistic(inner(h)))) * scale)

    p, x = parameters(), torch.randn(2, 3, D, generator=torch.Generator().manual_seed(3))
    gm, norms = trace(fn, p, x)
    assert_recomputes(gm, norms, *p.values(), x)
