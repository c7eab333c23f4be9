"""Records of norms, and of the feature axis that they run over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from normfx.errors import NormfxError
from normfx.ir.form import EpsPlace, Form, Kind
from normfx.ir.linears import Linear

NormKind = Literal["LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "Affine"]


@dataclass(frozen=True)
class Axis:
    """The feature axis inside a value: `dim` seen as (outer, size, inner), and of these the middle one.

    A whole dimension has outer = inner = 1. Per-head features of a (tokens, heads·size) value have inner = 1 and
    outer = heads; strided heads (tokens, size·heads) have inner = heads.
    """

    dim: int
    size: int
    inner: int = 1

    def at(self, dim: int) -> Axis:
        return Axis(dim, self.size, self.inner)


@dataclass(frozen=True, eq=False)
class Norm:
    """One normalisation: output = weight ⊙ (x − mean)·rstd + bias, without the mean for an RMSNorm.

    name:          module path ("path#2" for its second call), or "layer_norm", "rms_norm_1"… for a function call
    input, output: the values before and after; `nodes` are all nodes that compute it, output included
    dims:          normalised dimensions of `input`, non-negative, ascending
    size:          number of normalised entries d (0 where unknown or symbolic)
    eps:           as written in the graph; `eps_place` says where: rstd = 1/sqrt(var + eps) is "inside",
                   1/(sqrt(var) + eps) "outside", 1/sqrt(max(var, eps)) "clamped"
    correction:    0 for the biased variance (every nn.LayerNorm), 1 for torch.var's default
    weight, bias:  parameter-only nodes of shape (d,) up to size-1 dimensions, or None; `1 + w` is one node
    compute_dtype: dtype of the statistics; out_dtype: dtype of `output`
    obstacle:      why no rule may touch this norm ("" when nothing speaks against it)
    """

    name: str
    kind: NormKind
    source: str
    input: Node
    output: Node
    nodes: frozenset[Node]
    dims: tuple[int, ...]
    size: int
    eps: float
    eps_place: EpsPlace
    correction: int
    weight: Node | None
    bias: Node | None
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    obstacle: str = ""

    @property
    def axis(self) -> Axis | None:
        """The feature axis, when the norm runs over exactly one dimension of static size ≥ 2."""
        return Axis(self.dims[0], self.size) if len(self.dims) == 1 and self.size >= 2 else None

    @property
    def fixed(self) -> str:
        """Why no canonical op says what it computes; "" where one does. A rule must leave a fixed norm as it is."""
        if self.obstacle:
            return self.obstacle
        return "" if len(self.dims) == 1 else f"it runs over the dimensions {self.dims}"

    @property
    def form(self) -> Form:
        """The norm as a canonical op. Raises NormfxError for a fixed one."""
        if self.fixed:
            raise NormfxError(f"normfx: no canonical op computes the norm {self.name}: {self.fixed}")
        kind: Kind = "rms_norm" if self.kind == "RMSNorm" else "layer_norm"
        given = (self.eps, self.eps_place, self.correction)
        return Form(kind, self.dims[0], *given, 1.0, self.compute_dtype, self.out_dtype)


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A BatchNorm and the linear or convolution that it reads.

    mean, var: the statistics that it is given; None: it takes those of the batch
    writer:    the linear or convolution whose output features are its channels, with nothing but row-preserving ops
               between; None: what it reads is something else
    others:    readers, other than the BatchNorm, of the writer or of what lies between
    apart:     why the writer cannot take the map on ("" when nothing speaks against it)
    copies:    the BatchNorm's output leaves the graph and, without it, would be a view
    live:      whether the folded weight is computed in every call, at a price
    obstacle:  code of what forbids touching it at all ("" when nothing does), with the nodes in the way
    """

    norm: Norm
    mean: Node | None
    var: Node | None
    writer: Linear | None = None
    others: tuple[Node, ...] = ()
    apart: str = ""
    copies: bool = False
    live: bool = False
    obstacle: str = ""
    nodes: tuple[Node, ...] = ()

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,)
