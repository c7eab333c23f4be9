"""The norms that `normfx bench kernels` compares: specification, inputs, exact results, and what an error may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from normfx.kernels.cost import backward_cost, forward_cost
from normfx.kernels.spec import Spec

Arguments = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""x, residual, weight, bias; None for what a norm has not."""

EPS = 1e-5
PASSES = ("forward", "backward")

OPS = {
    "rms_norm": ("weight",),
    "layer_norm": ("centre", "weight", "bias"),
    "add_rms_norm": ("residual", "weight"),
    "add_layer_norm": ("residual", "centre", "weight", "bias"),
    "rms_norm_plain": (),
    "add_rms_norm_plain": ("residual",),
    "crms_norm": ("compressed",),
    "add_crms_norm": ("compressed", "residual"),
}
"""What each is made of. "plain" norms have no weight: what is left of a norm that was folded into its readers."""

ALLOWED = {
    # of the size of a row; float32: a sum over a row, or over the rows of a program, one after the other
    "float32": 64 * 2.0**-24,
    # five roundings: of the sum, x̂, its product with γ, the result, and one of an intermediate in the dtype
    "bfloat16": 5 * 2.0**-8,
    "float16": 5 * 2.0**-11,
}
"""The largest error of a right result, by dtype."""

EXACT_ENTRIES = 2**24
"""Entries of the rows whose exact results are computed at a time: about 1 GB in float64 with everything in between."""


@dataclass(frozen=True)
class Cell:
    """One norm, forward or backward, over rows of `width` features."""

    op: str
    task: str
    dtype: str
    rows: int
    width: int
    device: str

    def __str__(self) -> str:
        return f"{self.op} {self.task} {self.dtype} {self.rows}x{self.width}"

    @property
    def backward(self) -> bool:
        return self.task == "backward"

    @property
    def spec(self) -> Spec:
        parts = OPS[self.op]

        def dtype(part: str) -> str | None:
            return self.dtype if part in parts else None

        return Spec(
            width=self.width,
            centre="centre" in parts,
            x=self.dtype,
            out=self.dtype,
            weight=dtype("weight"),
            bias=dtype("bias"),
            residual=dtype("residual"),
            sum=dtype("residual"),
            compressed="compressed" in parts,
        )

    @property
    def bytes(self) -> int:
        """That have to be moved: every tensor once, without statistics in forward, without partial sums in backward."""
        spec, rows = self.spec, sympy.Integer(self.rows)
        if self.backward:
            return int(backward_cost(spec, rows, spec.sum is not None, sympy.Integer(0)).bytes)
        return int(forward_cost(spec, rows, statistics=False).bytes)

    @property
    def results(self) -> list[str]:
        """Names of what a call returns, in its order."""
        if not self.backward:
            return ["out", "sum"] if self.spec.sum else ["out"]
        return ["x_grad", *(f"{name}_grad" for name in ("residual", "weight", "bias") if getattr(self.spec, name))]


@dataclass(frozen=True)
class Inputs:
    """tensors: x, residual, weight, bias, those that there are; grads: of the output, and of the sum if it is stored"""

    tensors: dict[str, Tensor]
    grads: tuple[Tensor, ...]

    @property
    def arguments(self) -> Arguments:
        get = self.tensors.get
        return self.tensors["x"], get("residual"), get("weight"), get("bias")

    @classmethod
    def of(cls, cell: Cell) -> Inputs:
        """Random, the same at every call. Rows have a mean as large as their deviation: a kernel that forgets to
        subtract it is wrong. Compressed rows need none: the entry that is not stored is as large as all others
        together."""
        spec = cell.spec
        dtype = getattr(torch, cell.dtype)
        generator = torch.Generator(cell.device).manual_seed(0)

        def random(*shape: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=cell.device, dtype=dtype)
            return drawn.mul_(deviation).add_(mean)

        full = (cell.rows, spec.entries)
        mean = 0.0 if spec.compressed else 1.0
        tensors = {"x": random(*full, mean=mean)}
        if spec.residual:
            tensors["residual"] = random(*full, mean=mean)
        if spec.weight:
            tensors["weight"] = random(spec.entries, mean=1.0, deviation=0.5)
        if spec.bias:
            tensors["bias"] = random(spec.entries)
        return cls(tensors, tuple(random(*full) for _ in range(2 if spec.sum else 1)))


def definition(
    spec: Spec, x: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The norm, and the sum if there is a residual, by the formulas of kernels/spec.py, in the tensors' own dtype."""
    s = x if residual is None else x + residual
    z = s - s.mean(-1, keepdim=True) if spec.centre else s
    squares = z.square().sum(-1, keepdim=True)
    if spec.compressed:
        squares = squares + z.sum(-1, keepdim=True).square()
    y = z * torch.rsqrt(squares / spec.width + EPS)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return (y,) if residual is None else (y, s)


def exact(cell: Cell, inputs: Inputs) -> list[Tensor]:
    """The results in float64, some rows at a time: in one piece, they and all in between may not fit into memory."""
    step = max(1, EXACT_ENTRIES // cell.spec.entries)
    pieces = []
    for begin in range(0, cell.rows, step):
        rows = slice(begin, begin + step)
        leaves = {
            name: (t[rows] if t.ndim == 2 else t).double().requires_grad_(cell.backward)
            for name, t in inputs.tensors.items()
        }
        with torch.set_grad_enabled(cell.backward):
            found = definition(cell.spec, **leaves)
            if cell.backward:
                grads = [g[rows].double() for g in inputs.grads]
                found = torch.autograd.grad(found, list(leaves.values()), grads)
        pieces.append(found)
    # rows follow one another; gradients of vectors are sums over all rows
    joined = (torch.cat(p) if p[0].ndim == 2 else torch.stack(p).sum(0) for p in zip(*pieces, strict=True))
    return list(joined)


def errors(cell: Cell, inputs: Inputs, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """The largest error of a row, by result, as a part of that row's size. NaN where something was not written.

    By rows, because in the norm of everything one wrong row of many would not show.
    """
    result = {}
    for name, got, want in zip(cell.results, found, wanted, strict=True):
        if got.shape != want.shape or got.dtype != getattr(torch, cell.dtype):
            raise TypeError(f"{name} is {got.dtype} {tuple(got.shape)}, not {cell.dtype} {tuple(want.shape)}")
        # the gradient of x is a difference of terms as large as dy, which may cancel
        size = inputs.grads[0] if name in ("x_grad", "residual_grad") else want
        result[name] = _row_error(got, want, size)
    return result


def _row_error(got: Tensor, want: Tensor, size: Tensor) -> float:
    """‖got − want‖ of a row over ‖want‖, or over the usual ‖size‖ of a row where that is larger."""
    off = torch.linalg.vector_norm(got.double() - want, dim=-1)
    usual = torch.linalg.vector_norm(size.double(), dim=-1).square().mean().sqrt()
    scale = torch.maximum(torch.linalg.vector_norm(want, dim=-1), usual)
    return float((off / scale.clamp_min(1e-300)).max())


def wrong(cell: Cell, found: dict[str, float]) -> str:
    """What is wrong with results of these errors, "" if nothing is."""
    allowed = ALLOWED[cell.dtype]
    return "; ".join(
        f"wrong: {name} is off by {error:.1e} of a row, {allowed:.1e} is allowed"
        for name, error in found.items()
        if not error <= allowed  # NaN is not
    )
