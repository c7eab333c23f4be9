"""Which weights are kept where not all fit into the memory that they may take (weights/budget.py).

The largest gain per byte goes first. What a kept weight gains in each call, in seconds, predicted:

    folded   the passes over memory and the kernels that would compute it in the graph
    packed   rows × entries × what a multiply-add by packed weights saves on this machine (measured, gemm.py)

What does not fit is left as it is. Before the rules decide, `beyond` estimates which weights that will be: to the rules
these are like weights that are trained, whose folds are computed in every call or not done at all. After the rewrite
`chosen` counts what is really to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from normfx.compat.operators import OpOverload
from normfx.compat.tensors import storage_key
from normfx.graph.nodes import bytes_of, entries, op_name, shape, size_hint, tensor, value
from normfx.lower import packed, packed_convolution
from normfx.lower.gemm import packed_gain
from normfx.lower.wide import is_wide, may_be_wide, narrow
from normfx.lower.wide_speed import products_gain
from normfx.weights.budget import budget
from normfx.weights.kept import Kept
from normfx.weights.store import STORE
from normfx.weights.watch import identity, storage_of

BANDWIDTH = 10e9
"""Bytes per second that a fold in the graph reads and writes: what two cores of a CPU copy. On a GPU everything is
faster by about the same factor."""

REORDERED = 4
"""Passes over a kernel that a convolution by a packed one saves: channels last, then oneDNN's layout, in each call."""

UNPACK: dict[Any, Callable[[GraphModule, Node], None]] = {
    packed.PACK: packed.unpack,
    packed_convolution.PACK: packed_convolution.unpack,
}
"""The ops that pack, and how their products return to the weight itself."""

T = TypeVar("T")

LAUNCH = 5e-6
"""Seconds of each kernel that is not run."""

SMALL = 2**16
"""Bytes of the largest weight that is not looked at before the rules decide: vectors always fit, or nothing does."""

Rooms = Callable[[torch.device], int]
"""Bytes that may be kept on a device, besides what is kept already."""


def rooms(fold_memory: int | None) -> Rooms:
    """The rooms of now, each device asked once."""
    known: dict[torch.device, int] = {}

    def room(device: torch.device) -> int:
        if device not in known:
            known[device] = budget(fold_memory, device).room
        return known[device]

    return room


def beyond(graph: Graph, free: Iterable[Node], room: Rooms, values: Mapping[Node, Tensor]) -> frozenset[Node]:
    """The keepable weights, of `free`, that will not fit if each is kept once.

    values: the weights themselves, as far as they are known. What is kept of one of them for another graph is there
    """
    known = {identity.storage for entry in STORE.entries() for identity in entry.identities}
    sizes: dict[torch.device, dict[Node, int]] = {}
    for node in free:
        size = _size(node) * (2 if may_be_wide(node) else 1)
        if size > SMALL and tensor(node).ndim > 1 and not is_table(node):
            held = node in values and storage_key(storage_of(values[node])) in known
            sizes.setdefault(tensor(node).device, {})[node] = 0 if held else size
    return frozenset(
        node
        for device, weights in sizes.items()
        if sum(weights.values()) > room(device)
        for node in overflow(weights, {n: product_gain(n) for n in weights}, room(device))
    )


@dataclass(frozen=True)
class Chosen:
    """Kept values that fit; bytes: of them, those included that are there already; left: names and bytes of others."""

    kept: tuple[Kept, ...]
    bytes: int = 0
    left: Mapping[str, int] = field(default_factory=dict)


def chosen(
    gm: GraphModule,
    kept: Sequence[Kept],
    room: Rooms,
    names: Mapping[Node, str],
    values: Mapping[Node, Tensor],
    rebinds: bool,
) -> Chosen:
    """The values to be kept that fit. Packed weights that do not are unpacked in the graph, in place."""
    sizes = {item: kept_bytes(item.node) for item in kept}
    left: list[Kept] = []
    for device in {tensor(item.node).device for item in kept}:
        new = {k: n for k, n in sizes.items() if tensor(k.node).device == device and not _is_there(k, values, rebinds)}
        if sum(new.values()) > room(device):
            left += overflow(new, {item: gain(item) / max(1, size) for item, size in new.items()}, room(device))
    for item in left:
        weight = _weight(item.node)
        UNPACK.get(item.node.target, _keep_in_graph)(gm, item.node)
        narrow(gm, weight)
    if left:
        gm.graph.lint()
        gm.recompile()
    fits = tuple(item for item in kept if item not in set(left))
    told: dict[str, int] = {}
    for item in left:
        name = _name(item, names)
        told[name] = told.get(name, 0) + sizes[item]
    return Chosen(fits, sum(sizes[item] for item in fits), told)


def kept_bytes(node: Node) -> int:
    """Bytes of a kept value: of a packed weight of a linear layer those of the weight, which its layout may pad a
    little."""
    if node.target is packed_convolution.PACK:
        given: Any = node.args
        weight, *how, size = given
        return packed_convolution.packed_bytes(weight, how, size)
    source = node.all_input_nodes[0] if node.target in UNPACK else node
    return _size(source)


def gain(item: Kept) -> float:
    """Seconds per call that keeping a value is predicted to save."""
    ops = _computed(item)
    folding = sum(LAUNCH + 2 * _size(node) / BANDWIDTH for node in ops if node.target not in UNPACK)
    weight = _weight(item.node)
    linears = [user for user in item.node.users if user.target is packed.PACKED_LINEAR]
    size = size_hint(entries(shape(weight)), (weight,))
    saved = sum(map(_rows_read, linears)) * packed_gain(tensor(weight).dtype)
    if is_wide(weight):
        saved += sum(map(_rows_read, linears or item.node.users)) * products_gain()
    if item.node.target is packed_convolution.PACK:
        folding += REORDERED * _size(weight) / BANDWIDTH
    return folding + size * saved


def _keep_in_graph(gm: GraphModule, node: Node) -> None:
    """Leave a value that is not packed to the graph, which computes it."""


def _weight(node: Node) -> Node:
    """The weight that a kept value is, or is packed from."""
    weight = node.args[0] if node.target in UNPACK else node
    assert isinstance(weight, Node)
    return weight


def _rows_read(product: Node) -> int:
    """Rows of the activation that a linear layer reads; `addmm` has the bias before it."""
    return _rows_of(product.args[int(op_name(product) == "aten::addmm")])


def _computed(item: Kept) -> list[Node]:
    """The ops between the sources of a value and the value, without views."""
    found: dict[Node, None] = {}
    work = [item.node]
    while work:
        node = work.pop()
        if node not in found and node not in item.sources:
            found[node] = None
            work += node.all_input_nodes
    return [n for n in found if not (isinstance(n.target, OpOverload) and n.target.is_view)]


def overflow(sizes: Mapping[T, int], gains: Mapping[T, float], room: int) -> list[T]:
    """What does not fit where the largest gain per byte goes first. Smaller ones may still fit."""
    left: list[T] = []
    for item in sorted(sizes, key=lambda item: -gains[item]):
        if sizes[item] <= room:
            room -= sizes[item]
        else:
            left.append(item)
    return left


def _is_there(item: Kept, values: Mapping[Node, Tensor], rebinds: bool) -> bool:
    """Whether another graph keeps the value already."""
    if not all(source in values for source in item.sources):
        return False
    return STORE.known((item.expression, tuple(identity(values[source]) for source in item.sources), rebinds))


def _size(node: Node) -> int:
    return size_hint(bytes_of(node), (node,))


def is_table(node: Node) -> bool:
    """Whether rows of a weight are looked up and nothing else: they are centred where they are used."""
    return all(op_name(user) == "aten::embedding" and user.args[0] is node for user in node.users)


def product_gain(weight: Node) -> float:
    """Seconds per byte and call that products by a weight are predicted to gain where it is packed."""
    rows, work = 0, list(weight.users)
    while work:
        user = work.pop()
        if isinstance(user.target, OpOverload) and user.target.is_view:
            work += user.users
        else:
            rows += sum(_rows_of(x) for x in user.all_input_nodes if x is not weight)
    if may_be_wide(weight):
        return rows * products_gain() / (2 * tensor(weight).element_size())
    return rows * packed_gain(tensor(weight).dtype) / tensor(weight).element_size()


def _rows_of(x: object) -> int:
    """Rows of an activation, 0 of anything else."""
    fake = value(x)
    if not isinstance(x, Node) or fake is None or fake.ndim < 2:
        return 0
    return size_hint(entries(shape(x)[:-1]), (x,))


def _name(item: Kept, names: Mapping[Node, str]) -> str:
    """The largest of the weights that a value is computed from."""
    largest = max(item.sources, key=_size)
    return names.get(largest, largest.name)
