"""Pieces of what one linear computes, of which some are normalised and others not: q, k and v of one product.

The rows of a weight that compute a piece can be centred by themselves: the block of P on these rows, the identity on
the others (maths M4).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple

from torch.fx import Node

from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, entry_readers, is_getitem, op_name, shape, value
from normfx.ir.sites import Axis, Block
from normfx.recognize.flow import PARTS, Constants, flow

_PICKS = frozenset({"aten::select.int", "aten::slice.Tensor", "aten::narrow"})


class _Pick(NamedTuple):
    """The entries from `first` to `end` along a dimension of a value."""

    source: Node
    dim: int
    first: int
    end: int


def block_of(node: Node, axis: Axis, readers: Collection[Node], facts: Facts, constants: Constants) -> Block | None:
    """Which output features of a linear a value holds, or is all that these readers pick of a value, where all of the
    weight and bias are parameters and nothing else sees these features; None where that is not so.

    axis: the feature axis inside of the value
    """
    picks = _picks(node, readers)
    if not picks:
        return None
    source, dim = picks[0].source, picks[0].dim
    whole = shape(source)[dim]
    if not isinstance(whole, int) or any(pick[:2] != (source, dim) for pick in picks):
        return None
    unit = math.gcd(whole, *(n for pick in picks for n in (pick.first, pick.end)))
    part, rows, at = Axis(dim, whole // unit, unit), axis, node
    while at is not source:  # a piece, and the split that it is of
        found = _back(at, rows, constants)
        if found is None or at in facts.written:
            return None
        at, rows = found
    while True:
        if source in facts.written or facts.modes[source] != facts.modes[node] or value(source) is None:
            return None
        if op_name(source) in ("aten::linear", "aten::addmm"):
            break
        moved, inside = _back(source, part, constants), _back(source, rows, constants)
        if op_name(source) not in _MOVES or moved is None or inside is None:
            return None
        (operand, part), (_, rows) = moved, inside
        if entry_readers(operand) != [source]:
            return None
        source = operand
    last = len(shape(source)) - 1
    if part.dim != last or rows.dim != last or not isinstance(shape(source)[last], int):
        return None
    row, period = rows.size * rows.inner, part.size * part.inner
    places = [(pick.first // unit * part.inner, pick.end // unit * part.inner) for pick in picks]
    if rows.size == 1 or period % row or any(n % row for place in places for n in place):
        return None
    return Block(source, rows, period, tuple(places)) if _of_parameters(source, rows, facts, constants) else None


def _back(node: Node, axis: Axis, constants: Constants) -> tuple[Node, Axis] | None:
    """The one operand whose entries a value is made of, and the axis there."""
    step = flow(node, axis, constants)
    return None if step is None or len(step.carried) != 1 or step.dropped else step.carried[0]


_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "view", "reshape", "_unsafe_view", "unflatten.int", "flatten.using_ints", "permute", "transpose.int",
        "movedim.int", "unsqueeze", "squeeze.dim", "contiguous", "clone",
    )
)  # fmt: skip


def _of_parameters(linear: Node, axis: Axis, facts: Facts, constants: Constants) -> bool:
    step = flow(linear, axis, constants)
    if step is None or step.dropped or not all(operand in facts.parameters for operand, _ in step.carried):
        return False
    given = arguments(linear)
    bias = given["bias" if "bias" in given else "self"]
    features = shape(linear)[-1]
    return bias is None or (value(bias) is not None and tuple(shape(bias)) == (features,))


def _picks(node: Node, readers: Collection[Node]) -> list[_Pick]:
    """What of another value this node is, or what its readers pick of it; empty where anything else reads it."""
    if is_getitem(node):
        found = [_piece(node)] if set(entry_readers(node)) <= set(readers) else []
    else:
        others = [_picked(user, node) for user in entry_readers(node)]
        found = [_picked(user, node) for user in readers]
        if None in others or not _apart([pick for pick in others if pick is not None]):
            return []
    return [pick for pick in found if pick is not None] if None not in found else []


def _piece(node: Node) -> _Pick | None:
    """A piece of a split."""
    split: Any = node.args[0]
    index: Any = node.args[1]
    if op_name(split) not in PARTS or not isinstance(index, int):
        return None
    source = arguments(split)["self"]
    dim = arguments(split)["dim"] % len(shape(source))
    pieces = split.meta["val"]
    index = index % len(pieces)
    read = [user.args[1] for user in split.users if is_getitem(user)]
    again = [i for i in read if not isinstance(i, int) or i % len(pieces) == index]
    if entry_readers(source) != [split] or len(read) != len(split.users) or len(again) != 1:
        return None  # something else may read this piece
    if op_name(split) == "aten::unbind.int":
        return _Pick(source, dim, index, index + 1)
    sizes = [piece.shape[dim] for piece in pieces]
    if not all(isinstance(size, int) for size in sizes):
        return None
    first = sum(sizes[:index])
    return _Pick(source, dim, first, first + sizes[index])


def _picked(user: Node, node: Node) -> _Pick | None:
    """What a select or slice picks of a value."""
    if op_name(user) not in _PICKS:
        return None
    args = arguments(user)
    dim = args["dim"] % len(shape(node))
    whole = shape(node)[dim]
    if args["self"] is not node or not isinstance(whole, int) or args.get("step", 1) != 1:
        return None
    if op_name(user) == "aten::select.int":
        first, length = args["index"], 1
    else:
        first, length = args["start"] or 0, shape(user)[dim]
    if not isinstance(first, int) or not isinstance(length, int):
        return None
    first = first + whole if first < 0 else first
    return _Pick(node, dim, first, first + length)


def _apart(picks: list[_Pick]) -> bool:
    """Whether picks of one value share no entry."""
    ordered = sorted(picks, key=lambda pick: pick.first)
    if len({pick.dim for pick in ordered}) > 1:
        return False
    return all(before.end <= after.first for before, after in pairwise(ordered))
