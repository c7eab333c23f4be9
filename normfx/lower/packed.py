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
from typing import Any

import torch
from torch import Tensor, library
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from normfx.compat import onednn
from normfx.compat.operators import OpOverload
from normfx.graph.nodes import arguments, op_name, tensor
from normfx.graph.views import settle
from normfx.ir.ops import define
from normfx.lower.gemm import gelu_is_faster, mkl_is_faster, packed_is_faster
from normfx.lower.joined import JOINED, split_up
from normfx.lower.linear import linear_product
from normfx.lower.packing import (
    Packable,
    PackedProduct,
    claims_size,
    is_packed_size,
    pack_products,
    unpack_products,
)
from normfx.weights.handles import set_size, value_of

ROWS = 128
"""Rows of the input that oneDNN is told to expect when it chooses a layout, unless it is one; any number may come."""

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


def _packed_linear(
    x: Tensor, handle: Tensor, bias: Tensor | None, features: int, rows: int = 0, gelu: bool = False
) -> Tensor:
    """rows: those that MKL packed the weight for; 0: oneDNN packed it. Raises RuntimeError for another number.

    gelu: whether the result goes through the GELU with erf, which oneDNN alone computes in the product
    """
    if not rows:
        return onednn.linear(x, value_of(handle), bias, gelu)
    width = x.shape[-1]
    if x.numel() != rows * width:
        raise RuntimeError(f"normfx: {tuple(x.shape)} times a weight that was packed for {rows} rows; please report it")
    return onednn.mkl_linear(x, value_of(handle), _shape(features, width), bias, rows)


PACK = define("pack(Tensor weight, int out, int rows, bool mkl=False) -> Tensor", _pack, "CPU")
PACKED_LINEAR = define(
    "packed_linear(Tensor x, Tensor handle, Tensor? bias, int features, int rows=0, bool gelu=False) -> Tensor",
    _packed_linear,
    "CPU",
    (torch.Tag.flexible_layout,),
)
# what a graph is given instead of a packed weight is its handle
library.register_fake(PACK, lambda weight, out, rows, mkl=False: weight.new_empty(1, dtype=torch.int64))
library.register_fake(
    PACKED_LINEAR, lambda x, handle, bias, features, rows=0, gelu=False: x.new_empty((*x.shape[:-1], features))
)


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

    def choose(node: Node, packable: Packable) -> PackedProduct | None:
        product = linear_product(node)  # what it reads may have been replaced meanwhile
        if product is None or not packable(product.weight):
            return None
        x, weight, bias, out = product
        fake, rows = tensor(weight), product.fixed_rows
        features = int(fake.shape[out])
        mkl = fake.dtype == torch.float32 and rows > 1 and mkl_is_faster()
        if mkl and claims_size(rows, weight, values, _ROWS):
            return PackedProduct(x, (weight, out, rows, True), bias, (features, rows))
        if packed_is_faster(fake.dtype) and not (product.of_one_row and plain_row(fake.dtype)):
            return PackedProduct(x, (weight, out, 1 if product.of_one_row else ROWS), bias, (features,))
        return None

    nodes = [node for node in gm.graph.nodes if (product := linear_product(node)) and is_packed_size(product.weight)]
    pack_products(gm, free, nodes, choose, (PACK, PACKED_LINEAR))


def take_gelus(gm: GraphModule) -> None:
    """Let oneDNN compute a GELU in the product before it, in place, where that is faster: its kernel is the one that
    eager runs, so it is as exact, and keeps NaN. (Its ReLU does not.)"""
    taken = False
    for node in gm.graph.find_nodes(op="call_function", target=PACKED_LINEAR):
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or op_name(reader) != "aten::gelu" or arguments(reader)["approximate"] != "none":
            continue
        by_mkl = len(node.args) > 4 and node.args[4]
        if by_mkl or not gelu_is_faster(tensor(node).dtype):
            continue
        node.args = (*node.args[:4], 0, True)
        node.meta = reader.meta
        reader.replace_all_uses_with(node)
        gm.graph.erase_node(reader)
        taken = True
    if taken:
        settle(gm)


def unpack(gm: GraphModule, packed: Node) -> None:
    """Replace the products by a packed weight by products with the weight itself, in place; other nodes stay."""
    weight, out = packed.args[:2]
    if isinstance(weight, Node) and JOINED in weight.meta:
        split_up(gm.graph, packed, weight.meta[JOINED])
        return

    def plain(product: Node) -> tuple[OpOverload, tuple[Any, ...]]:
        x, _, bias = product.args[:3]
        if out:
            return torch.ops.aten.addmm.default, (bias, x, weight)
        return torch.ops.aten.linear.default, (x, weight, bias)

    unpack_products(gm, packed, plain)
