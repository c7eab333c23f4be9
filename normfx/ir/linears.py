"""Records of linears and convolutions, and of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear that reads a value: node = value · weightᵀ + bias over one dimension of the value.

    weight_arg, bias_arg: names of schema arguments (bias_arg None: the op has no bias slot)
    in_dim:               dimension of the weight that runs over the input features
    groups:               of a convolution (0: it is none); its in_dim runs over the channels of one group
    part:                 where weight_arg is a list, the weight's place in it
    out_dims:             for each dimension of the weight but in_dim, the dimension of the node that it becomes; None:
                          the last ones, as in the weight
    takes_shift:          whether a value that does not depend on the row may be added to all rows: Wβ
    lookup:               the op that reads a stack of weights, where each row has its own: `weight` is the stack then
    """

    node: Node
    value: Node
    weight: Node
    bias: Node | None
    weight_arg: str
    bias_arg: str | None
    in_dim: int
    groups: int = 0
    part: int | None = None
    out_dims: tuple[int, ...] | None = None
    takes_shift: bool = True
    lookup: Node | None = None

    @property
    def unusual(self) -> bool:
        """Whether it is a product other than rows times a weight, or looks its weight up."""
        return self.part is not None or self.out_dims is not None or self.lookup is not None

    @property
    def holder(self) -> Node:
        """The node whose argument `weight_arg` is the weight."""
        return self.node if self.lookup is None else self.lookup


@dataclass(frozen=True, eq=False)
class Pair:
    """A linear or convolution that reads the output of another one, with nothing between.

    outer:  a linear, or a convolution whose kernel is a single entry
    others: readers of the inner one's output, other than the outer one
    live:   whether the product of the weights is computed in every call, at a price
    """

    inner: Linear
    outer: Linear
    others: tuple[Node, ...] = ()
    live: bool = False
    kind: ClassVar[str] = "Linear"

    @property
    def node(self) -> Node:
        return self.outer.node

    @property
    def norms(self) -> tuple[Pair, ...]:
        return (self,)


@dataclass(frozen=True, eq=False)
class Composed:
    """A weight that the graph computes from parameters alone.

    nodes:    what computes it, views left aside; itself included
    live:     parameters it is computed from that want its gradient, or all of them where folds are live
    obstacle: code of what forbids keeping its value ("" when nothing does)
    """

    node: Node
    nodes: tuple[Node, ...]
    live: tuple[Node, ...] = ()
    obstacle: str = ""
    kind: ClassVar[str] = "Weight"

    @property
    def norms(self) -> tuple[Composed, ...]:
        return (self,)
