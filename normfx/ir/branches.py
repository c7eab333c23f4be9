"""Records of sums whose terms are linear in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from normfx.ir.linears import Linear
from normfx.ir.norms import BatchNorm


@dataclass(frozen=True, eq=False)
class Branch:
    """One term of a sum: factor · BN(layer(layer(x))), without the parts that it does not have.

    top:     the operand of the sum, before numbers multiply it
    factor:  the product of the numbers that multiply it on its way into the sum
    path:    from what reads it to the whole sum: sums, and products with numbers
    layers:  the outer one first; two where the outer one reads the inner one alone, at one place; none: x itself
    norm:    the BatchNorm that reads x or the outer layer
    nodes:   what computes it from x, `top` included
    offsets: where its kernel begins in the host's, along each spatial dimension; None: it does not lie in that
    """

    top: Node
    factor: float
    path: tuple[Node, ...]
    layers: tuple[Linear, ...]
    norm: BatchNorm | None
    nodes: tuple[Node, ...]
    offsets: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Branches:
    """Terms of one sum that are linear in the same value x, one of them a layer that reads it.

    node:    the sum, which may have other terms
    source:  x
    host:    the term that is one layer, with the largest kernel; rest: the other ones
    others:  readers of what lies between x and the sum, other than the sum
    apart:   terms in another mode or region than the sum, on another device, or with a weight that is computed too late
    written: values of these that are written in place
    live:    weights from which the merged one would be computed in every call
    """

    node: Node
    source: Node
    host: Branch
    rest: tuple[Branch, ...]
    others: tuple[Node, ...] = ()
    apart: tuple[Node, ...] = ()
    written: tuple[Node, ...] = ()
    live: tuple[Node, ...] = ()
    kind: ClassVar[str] = "Branches"

    @property
    def norms(self) -> tuple[Branches, ...]:
        return (self,)
