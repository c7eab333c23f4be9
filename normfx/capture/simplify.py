"""Equal forms of a canonical graph in which less is computed, and less is read of more values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from normfx.capture.cleanup import drop_dead_code
from normfx.capture.multiples import gather_multiples
from normfx.graph.aliasing import is_identity_dropout, may_leave, mutated, storages_of
from normfx.graph.nodes import (
    arguments,
    grad_modes,
    is_getitem,
    is_row_major,
    op_name,
    reads_entries,
    shape,
    tensor,
    value,
)
from normfx.graph.views import settle

_JOINS = frozenset({"aten::cat", "aten::concat", "aten::concatenate"})
_SPLITS = frozenset({"aten::chunk", "aten::split.Tensor", "aten::split.sizes", "aten::split_with_sizes"})
_CASTS = frozenset({"aten::to.dtype", "aten::to.dtype_layout", "aten::to.device", "aten::to.other", "aten::type_as"})


def simplify(gm: GraphModule, weights: frozenset[Node], changes_ops: bool = True) -> None:
    """All of these forms, in place. changes_ops: else what modules of torch.nn compute stays in them."""
    drop_identities(gm)
    written = mutated(gm.graph)
    changes = read_joined(gm, written) + read_parts(gm, written)
    changes += gather_multiples(gm, weights) if changes_ops else 0
    if changes:
        drop_dead_code(gm.graph)


def drop_identities(gm: GraphModule) -> int:
    """Ops that return their operand itself go, in place: casts to the dtype and device at hand, dropout of nothing.
    Returns how many.

    A model in float32 that asks for float32 has such a cast at each norm. The operand's gradient passes even where none
    are recorded, which is so of no other op.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if is_identity_dropout(node) or op_name(node) == "aten::positive" or _casts_to_itself(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
            count += 1
    if count:
        settle(gm)
    return count


def _casts_to_itself(node: Node) -> bool:
    if op_name(node) not in _CASTS:
        return False
    args = arguments(node)
    now, before = value(node), value(args["self"])
    if now is None or before is None or args.get("copy") or args.get("memory_format") is not None:
        return False
    return (now.dtype, now.device, now.layout) == (before.dtype, before.device, before.layout)


def read_parts(gm: GraphModule, written: frozenset[Node]) -> int:
    """Slices of a concatenation that lie inside one of its parts become slices of that part, in place. Returns their
    number.

    cat([a, b])[len(a):] is b: what reads it does not read a. Left alone: values that are written in place
    (`written`), slices whose memory leaves the graph, which would then be that of the part, and parts laid out
    otherwise than the whole, of which a view may be impossible.
    """
    modes, storages = grad_modes(gm.graph), storages_of(gm.graph)
    found: dict[Node, list[tuple[Node, tuple[Node, int, int]]]] = {}
    for node in gm.graph.nodes:
        place = _part(node)
        if place is None or not written.isdisjoint({node, place[0], *node.all_input_nodes}):
            continue
        joined = arguments(node)["self"]
        if modes[node] == modes[joined] and not may_leave(node, storages):
            found.setdefault(joined, []).append((node, place))
    count = 0
    for joined, readers in found.items():
        others = set(joined.users) - {node for node, _ in readers}
        if _returns_gradients(joined, others, modes):  # else a part might lose its own, which is 0
            for node, (part, start, end) in readers:
                args = arguments(node)
                rest = (args["dim"], start) if "index" in args else (args["dim"], start, end)
                node.args, node.kwargs = (part, *rest), {}
            count += len(readers)
    if count:
        settle(gm)
    return count


def read_joined(gm: GraphModule, written: frozenset[Node]) -> int:
    """What is joined and split again at the same places is read directly, in place. Returns the number of splits.

    cat([a, b]).chunk(2) is (a, b): reversible networks pass two streams on as one. Left alone: as in `read_parts`, and
    splits in a part of the graph that records no gradients, of which the graph has others: read directly, a value would
    get gradients there.
    """
    modes, storages = grad_modes(gm.graph), storages_of(gm.graph)
    unrecorded = not any(modes.values())
    count = 0
    for split in list(gm.graph.nodes):
        pieces = _pieces(split)
        if not pieces or not (unrecorded or modes[split]):
            continue
        joined = arguments(split)["self"]
        nodes = {split, joined, *(node for pair in pieces for node in pair)}
        if any(modes[piece] != modes[joined] or may_leave(piece, storages) for piece, _ in pieces) or nodes & written:
            continue
        parts = arguments(joined)["tensors"]
        passed = {part for piece, part in pieces if _returns_gradients(piece, piece.users, modes)}
        others = set(joined.users) - {split}
        if not passed.issuperset(parts) and not _returns_gradients(joined, others, modes):
            continue  # a part might lose its gradient, which is 0
        for piece, part in pieces:
            piece.replace_all_uses_with(part)
        count += 1
    if count:
        settle(gm)
    return count


def _pieces(split: Node) -> list[tuple[Node, Node]]:
    """The parts of a split that are read, each with the part of a concatenation that it is; empty where one is none."""
    if op_name(split) not in _SPLITS or op_name(arguments(split)["self"]) not in _JOINS:
        return []
    args = arguments(split)
    joined = args["self"]
    ndim = len(shape(joined))
    dim = args["dim"] % ndim
    if arguments(joined)["dim"] % ndim != dim:
        return []
    parts = {(first, end): part for part, first, end in _places(arguments(joined)["tensors"], dim, ndim)}
    begins = [0]
    for piece in split.meta["val"]:
        if piece.ndim != ndim or not isinstance(piece.shape[dim], int):
            return []
        begins.append(begins[-1] + piece.shape[dim])
    found = []
    for piece in split.users:
        if not is_getitem(piece) or not isinstance(piece.args[1], int):
            return []
        index = piece.args[1] % (len(begins) - 1)
        part = parts.get((begins[index], begins[index + 1]))
        if part is None or not _laid_out_alike(part, joined, 0):
            return []
        found.append((piece, part))
    return found


def _returns_gradients(joined: Node, readers: Iterable[Node], modes: Mapping[Node, bool]) -> bool:
    """Whether something the graph returns is made of the value by some of its readers, so that its gradient is not None
    whatever the others do."""
    work = [(joined, user) for user in readers]
    seen = set()
    while work:
        operand, user = work.pop()
        if user.op == "output":
            return True
        if user not in seen and _passes_gradients(operand, user, modes):
            seen.add(user)
            work += [(user, reader) for reader in user.users]
    return False


def _passes_gradients(operand: Node, user: Node, modes: Mapping[Node, bool]) -> bool:
    if is_getitem(user):
        return True
    fake = value(user)
    differentiable = fake is None or fake.is_floating_point()
    known = op_name(user).startswith("aten::") and op_name(user) != "aten::detach"
    return known and modes[user] == modes[operand] and differentiable and reads_entries(user, operand)


def _part(node: Node) -> tuple[Node, int, int] | None:
    """The part of a concatenation that a slice or selection lies in, and from where to where in it."""
    if op_name(node) not in ("aten::slice.Tensor", "aten::select.int"):
        return None
    args = arguments(node)
    joined = args["self"]
    if op_name(joined) not in _JOINS or args.get("step", 1) != 1:
        return None
    ndim = len(shape(joined))
    dim = args["dim"] % ndim
    if arguments(joined)["dim"] % ndim != dim:
        return None
    length = shape(joined)[dim]
    bounds = _bounds(args, length)
    if bounds is None:
        return None
    start, end = bounds
    for part, first, end_of_part in _places(arguments(joined)["tensors"], dim, ndim):
        if first <= start and end <= end_of_part:
            whole = not isinstance(length, int) or end - start == length
            return (part, start - first, end - first) if _laid_out_alike(part, joined, 0 if whole else dim) else None
    return None


def _laid_out_alike(part: Node, joined: Node, cut: int) -> bool:
    """Whether views of a slice of the whole are possible of the same slice of a part, which may itself be cut along
    this dimension (0: it may not), as the whole is then."""
    same = tensor(part).dtype == tensor(joined).dtype  # a concatenation promotes
    return same and is_row_major(tensor(joined)) and is_row_major(tensor(part), cut)


def _bounds(args: dict[str, Any], length: Any) -> tuple[int, int] | None:
    """First entry, and the one after the last, as numbers from the front."""
    if "index" in args:
        index = args["index"]
        if not isinstance(index, int) or (index < 0 and not isinstance(length, int)):
            return None
        index = index + length if index < 0 else index
        return index, index + 1
    start = 0 if args["start"] is None else args["start"]
    end = length if args["end"] is None else args["end"]
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    if isinstance(length, int):
        start, end = (max(0, min(n + length if n < 0 else n, length)) for n in (start, end))
    elif start < 0 or not 0 <= end < 2**31:  # from the end of something of unknown length
        return None
    return (start, end) if start < end else None


def _places(parts: Any, dim: int, ndim: int) -> Iterator[tuple[Node, int, int]]:
    """Parts, up to the first of unknown length, with where they begin and end."""
    first = 0
    for part in parts:
        fake = value(part)
        length = fake.shape[dim] if fake is not None and fake.ndim == ndim else None
        if not isinstance(length, int):
            return
        yield part, first, first + length
        first += length
