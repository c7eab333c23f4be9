"""Frozen records of what was found in a canonical graph. Rules see these, never `node.args[i]`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch.fx import Node

from normfx.ir.affine import Affine
from normfx.ir.branches import Branch as Branch
from normfx.ir.branches import Branches as Branches
from normfx.ir.linears import Composed as Composed
from normfx.ir.linears import Linear as Linear
from normfx.ir.linears import Pair as Pair
from normfx.ir.norms import Axis as Axis
from normfx.ir.norms import BatchNorm as BatchNorm
from normfx.ir.norms import Norm as Norm
from normfx.ir.norms import NormKind as NormKind

LeafKind = Literal["parameter", "centred", "scaled", "piece", "embedding", "norm", "sharded", "raw", "packed", "value"]


@dataclass(frozen=True, eq=False)
class Block:
    """Some of the output features of a linear.

    axis:   of the rows in all of them
    period: the features are seen as runs of so many, as (head, part, feature) are of 3 · 64 if q, k and v are the parts
    places: first and end, in each run
    """

    linear: Node
    axis: Axis
    period: int
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A value that enters a stream from outside; the stream reads a centred copy of it.

    parameter: depends on parameters only: centre it where it is used (a weight, bias or table)
    centred:   output of a LayerNorm without weight and bias, or zeros: its mean is 0 already
    scaled:    λ ⊙ (Wa + b) with a parameter λ: fold λ, then centre (M11)
    piece:     a piece of Wa + b that nothing else reads: centre the rows of W and b that compute it (`block`)
    embedding: looked-up rows: centre the rows
    norm:      output of another norm, which has a mean
    sharded:   rows put together from features that were spread over processes
    packed:    output of a product whose weight is stored packed: centred, the weight would be stored unpacked
    raw:       a value of the stream whose original is read too ("observer" reads it)
    value:     any other activation or graph input
    path:      of a scaled leaf, the linear and what stands between it and the product, with the feature axis in each
    obstacle:  code of what forbids centring it at all ("" when nothing does)
    """

    node: Node
    axis: Axis
    kind: LeafKind
    users: tuple[Node | Norm, ...]
    observer: Node | None = None
    scale: Node | None = None
    linear: Node | None = None
    path: tuple[tuple[Node, Axis], ...] = ()
    alone: bool = False
    obstacle: str = ""
    block: Block | None = None

    @property
    def weights(self) -> list[Node]:
        """The values that are centred once where they are parameters: of the linear that writes it, or itself."""
        written = self.block.linear if self.block is not None else self.linear
        return [self.node] if written is None else written.all_input_nodes

    @property
    def explicit(self) -> bool:
        """Whether it must be centred while the model runs, at the cost of a pass over it."""
        return self.kind not in ("parameter", "centred", "scaled", "piece")


@dataclass(frozen=True, eq=False)
class Stream:
    """Values read only by norms that ignore their mean: they may be stored centred.

    nodes:   values inside the stream, each a linear map (M3) of others and of leaves
    norms:   LayerNorms that read it
    leaves:  what enters it
    reads:   for each norm and each value inside, the values and leaves it is made of
    dropped: (node, argument name) pairs: additive terms constant along the features; their centred form is 0
    joins:   values are added or joined on the way; otherwise one writer feeds the norms (M4)
    live:    values of parameters alone whose folds would be computed in every call
    axes:    the feature axis inside of each value
    obstacle: code of what forbids it as a whole ("" when nothing does), with a detail
    """

    norms: tuple[Norm, ...]
    leaves: tuple[Leaf, ...]
    reads: Mapping[Norm | Node, tuple[Node | Leaf, ...]] = field(default_factory=dict)
    dropped: tuple[tuple[Node, str], ...] = ()
    joins: bool = True
    live: frozenset[Node] = frozenset()
    axes: Mapping[Node, Axis] = field(default_factory=dict)
    obstacle: str = ""
    detail: str = ""

    def of_parameters(self) -> Stream:
        """The stream, of which only what parameters alone decide may be centred, and rows looked up in a table."""
        barred = {
            leaf: replace(leaf, obstacle="packed_weight" if leaf.kind == "packed" else "uncentred_input")
            for leaf in self.leaves
            if leaf.explicit and not leaf.obstacle and leaf.kind != "embedding"
        }
        reads = {
            reader: tuple(barred.get(item, item) if isinstance(item, Leaf) else item for item in operands)
            for reader, operands in self.reads.items()
        }
        return replace(self, leaves=tuple(barred.get(leaf, leaf) for leaf in self.leaves), reads=reads)

    def part(self, norms: Iterable[Norm]) -> Stream:
        """The part of the stream that feeds these norms."""
        chosen = tuple(norms)
        reached: dict[Norm | Node | Leaf, None] = dict.fromkeys(chosen)
        work: list[Norm | Node | Leaf] = list(chosen)
        while work:
            item = work.pop()
            fresh = [r for r in (() if isinstance(item, Leaf) else self.reads[item]) if r not in reached]
            reached.update(dict.fromkeys(fresh))
            work += fresh
        return replace(
            self,
            norms=chosen,
            leaves=tuple(
                replace(leaf, users=tuple(u for u in leaf.users if u in reached))
                for leaf in self.leaves
                if leaf in reached
            ),
            dropped=tuple((node, name) for node, name in self.dropped if node in reached),
            axes={node: axis for node, axis in self.axes.items() if node in reached},
        )


@dataclass(frozen=True, eq=False)
class Scaled:
    """norm(x)·k with a number k; of those in `Sites.scaled` only the multiplication reads the norm."""

    norm: Norm
    node: Node
    factor: float

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,)


@dataclass(frozen=True, eq=False)
class Readers:
    """Everything that reads one norm's output through row-preserving ops.

    linears: (Linear, axis of the norm's features inside the linear's weight, product of numbers multiplied on the way)
    path:    the row-preserving nodes between
    axes:    the norm's features inside of its output and of each node between
    others:  readers that are not linears over the feature axis
    packed:  products with a weight that is stored packed, by ops that are no linear; not among the others
    padded:  of the others, convolutions over the features that cannot take β: at a border they do not add all of Wβ
    shared:  readers whose weight is also read after another norm with other γ or β
    live:    values of parameters alone whose folds would be computed in every call
    affine:  of a scaling and shift that belongs to no norm, the ops that compute it
    adds_apart: as of graph.facts.Facts
    """

    norm: Norm
    linears: tuple[tuple[Linear, Axis, float], ...]
    path: tuple[Node, ...]
    others: tuple[Node, ...]
    padded: tuple[Node, ...] = ()
    packed: tuple[Node, ...] = ()
    shared: tuple[Node, ...] = ()
    live: frozenset[Node] = frozenset()
    axes: Mapping[Node, Axis] = field(default_factory=dict)
    computed: frozenset[Node] = frozenset()
    affine: Affine | None = None
    adds_apart: bool = False

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,)

    @property
    def vectors(self) -> tuple[Node, ...]:
        """The values of parameters that γ and β are."""
        if self.affine is not None:
            return self.affine.operands
        return tuple(vector for vector in (self.norm.weight, self.norm.bias) if vector is not None)

    def of_parameters(self) -> Readers:
        """The readers, of which only those may take γ and β on whose weights parameters alone decide.

        Not einsum and the like either: the module that multiplies so has no place for Wβ.
        """
        return self._without(lambda linear: linear.weight in self.computed or linear.unusual)

    def without_weights(self, barred: frozenset[Node]) -> Readers:
        """The readers, of which those with one of these weights count as something other than a linear."""
        return self._without(lambda linear: linear.weight in barred)

    def _without(self, barred: Callable[[Linear], bool]) -> Readers:
        others = tuple(linear.node for linear, _, _ in self.linears if barred(linear))
        kept = tuple(found for found in self.linears if not barred(found[0]))
        return replace(self, linears=kept, others=(*self.others, *others)) if others else self


@dataclass(frozen=True, eq=False)
class Residual:
    """A norm and the sum of two activations that it reads: s = x + alpha·residual.

    node:     the add
    argument: of the add that is the residual
    alpha:    its factor in the add; scaled: a product with a number before that, read by the add alone
    inner:    the norm whose output is x, read by the add alone
    obstacle: code of what forbids one op for all of it ("" when nothing does), with a detail
    """

    norm: Norm
    node: Node
    argument: Literal["self", "other"]
    alpha: float
    scaled: Node | None = None
    inner: Norm | None = None
    obstacle: str = ""
    detail: str = ""

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,) if self.inner is None else (self.inner, self.norm)


Composition = Composed | Pair | Branches  # what rules decide of weights


@dataclass(frozen=True)
class Sites:
    """All facts about one graph."""

    norms: tuple[Norm, ...]
    streams: tuple[Stream, ...] = ()
    affines: tuple[Readers, ...] = ()
    readers: Mapping[Norm, Readers] = field(default_factory=dict)
    scaled: Mapping[Norm, Scaled] = field(default_factory=dict)
    residuals: tuple[Residual, ...] = ()
    composed: tuple[Composed, ...] = ()
    pairs: tuple[Pair, ...] = ()
    branches: tuple[Branches, ...] = ()
    batch_norms: tuple[BatchNorm, ...] = ()
