"""Kept weights in the layout that oneDNN or MKL multiplies by, without freezing anything.

Inductor packs weights only as constants. Here a linear layer's weight is one more kept value: the graph computes
`pack(W)`, which the store takes out, and multiplies by it in `packed_linear`. What the graph is given is a handle of
one entry at a fixed address; the packed tensor that it stands for is found in weights/handles.py, and exchanged when
W changed.

MKL packs for one number of rows, so its form serves graphs in which that number is fixed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, library
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from normfx.compat import onednn
from normfx.graph.aliasing import escaping, storages_of
from normfx.graph.calls import add_call
from normfx.graph.nodes import BAKED, entries, parameter_only, shape, tensor
from normfx.graph.regions import is_autocast
from normfx.ir.ops import define
from normfx.lower.gemm import mkl_is_faster, packed_is_faster
from normfx.lower.linear import Product, linear_product
from normfx.weights.handles import set_size, value_of
from normfx.weights.kept import folded, records_gradients

ROWS = 128
"""Rows of the input that oneDNN is told to expect when it chooses a layout, unless it is one; any number may come."""

LEAST = {torch.float32: 2**16, torch.bfloat16: 2**15}
"""Entries of the smallest weights worth packing: the call itself costs 10 µs more than a plain product."""

T = TypeVar("T")

_ROWS: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
"""For how many rows MKL packs a parameter, or what is computed from it."""


@functools.lru_cache(maxsize=256)
def _shape(features: int, width: int) -> Tensor:
    """A tensor without memory of its own: MKL's product asks the weight for its shape, and reads the packed one."""
    with torch.inference_mode(False):
        return torch.empty(1, dtype=torch.float32, device="cpu").expand(features, width)


def _pack(weight: Tensor, out: int, rows: int, mkl: bool = False) -> Tensor:
    """A matrix whose output features lie along dimension `out` → the same, packed for so many rows."""
    matrix = (weight.t() if out else weight).contiguous()
    if not mkl:
        return onednn.pack(matrix, rows)
    packed = onednn.mkl_pack(matrix, rows)
    set_size(packed, matrix.nbytes)
    return packed


def _packed_linear(x: Tensor, handle: Tensor, bias: Tensor | None, features: int, rows: int = 0) -> Tensor:
    """rows: those that MKL packed the weight for; 0: oneDNN packed it. Raises RuntimeError for another number."""
    if not rows:
        return onednn.linear(x, value_of(handle), bias)
    width = x.shape[-1]
    if x.numel() != rows * width:
        raise RuntimeError(f"normfx: {tuple(x.shape)} times a weight that was packed for {rows} rows; please report it")
    return onednn.mkl_linear(x, value_of(handle), _shape(features, width), bias, rows)


PACK = define("pack(Tensor weight, int out, int rows, bool mkl=False) -> Tensor", _pack, "CPU")
PACKED_LINEAR = define(
    "packed_linear(Tensor x, Tensor handle, Tensor? bias, int features, int rows=0) -> Tensor",
    _packed_linear,
    "CPU",
    (torch.Tag.flexible_layout,),
)
# what a graph is given instead of a packed weight is its handle
library.register_fake(PACK, lambda weight, out, rows, mkl=False: weight.new_empty(1, dtype=torch.int64))
library.register_fake(PACKED_LINEAR, lambda x, handle, bias, features, rows=0: x.new_empty((*x.shape[:-1], features)))


class Form(NamedTuple):
    """The arguments of PACK: a weight, where its output features lie, rows that are told to the library, and which."""

    weight: Node
    out: int
    rows: int
    mkl: bool = False


def pack_linears(
    gm: GraphModule,
    free: frozenset[Node],
    values: Mapping[Node, Tensor],
    plain_row: Callable[[torch.dtype], bool],
) -> None:
    """Let the linear layers of a graph multiply by packed weights, in place, where that is faster.

    free:      parameters that may be kept. Every packed weight is one of `kept_values` afterwards.
    values:    the parameters themselves, as far as they are known
    plain_row: whether products of one row are as fast by weights of a dtype that are not packed
    """
    graph = gm.graph
    nodes = [node for node in graph.nodes if (product := linear_product(node)) and _is_large(product)]
    if not nodes or is_autocast(graph) or records_gradients(graph):
        return
    packable = packable_weights(graph, free)
    packs: dict[Form, Node] = {}
    for node in nodes:
        product = linear_product(node)  # what it reads may have been replaced meanwhile
        if product is None or node in packable.known or not packable(product.weight):
            continue
        x, weight, bias, out = product
        fake, rows = tensor(weight), product.fixed_rows
        mkl = fake.dtype == torch.float32 and rows > 1 and mkl_is_faster()
        if mkl and claims_size(rows, weight, values, _ROWS):
            form, fixed = Form(weight, out, rows, True), [rows]
        elif packed_is_faster(fake.dtype) and not (product.of_one_row and plain_row(fake.dtype)):
            form, fixed = Form(weight, out, 1 if product.of_one_row else ROWS), []
        else:
            continue
        if form not in packs:
            with graph.inserting_before(node):
                packs[form] = add_call(graph, PACK, form if form.mkl else form[:3], node)
            packs[form].meta[BAKED] = True
        with graph.inserting_before(node):
            new = add_call(graph, PACKED_LINEAR, (x, packs[form], bias, int(fake.shape[out]), *fixed), node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


class Packable(NamedTuple):
    """Says which weights may be packed: parameters and folds that do not leave the graph.

    known: what is computed from parameters alone. A product among these is part of a kept value, and is not packed
    """

    known: frozenset[Node]
    weights: frozenset[Node]
    storages: Mapping[Node, frozenset[Any]]
    outside: frozenset[Any]

    def __call__(self, weight: Node) -> bool:
        return weight in self.weights and not self.storages[weight] & self.outside


def packable_weights(graph: Graph, free: frozenset[Node]) -> Packable:
    known, storages = parameter_only(graph, free), storages_of(graph)
    weights = known & (free | folded(known))
    return Packable(known, weights, storages, frozenset(escaping(graph, storages)))


def claims_size(size: T, weight: Node, values: Mapping[Node, Tensor], known: MutableMapping[Tensor, T]) -> bool:
    """Whether a weight is packed for inputs of a size alone: for the first one that it meets, which is recorded, since
    each more would take more memory. Others take a form that serves all of them."""
    found, work = [], [weight]
    seen = {weight}
    while work:
        node = work.pop()
        if node in values:
            found.append(values[node])
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        work += new
    return bool(found) and known.setdefault(max(found, key=Tensor.numel), size) == size


def unpack(gm: GraphModule, node: Node) -> None:
    """Let the products by a packed weight multiply by the weight itself again, in place; other nodes stay."""
    weight, out = node.args[:2]
    for product in list(node.users):
        x, _, bias = product.args[:3]
        with gm.graph.inserting_before(product):
            if out:
                new = add_call(gm.graph, torch.ops.aten.addmm.default, (bias, x, weight), product)
            else:
                new = add_call(gm.graph, torch.ops.aten.linear.default, (x, weight, bias), product)
        product.replace_all_uses_with(new)
        gm.graph.erase_node(product)
    gm.graph.erase_node(node)


def _is_large(product: Product) -> bool:
    size, least = entries(shape(product.weight)), LEAST.get(tensor(product.weight).dtype)
    return least is not None and size.is_Integer and bool(size >= least)
