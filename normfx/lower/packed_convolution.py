"""Kept kernels of two-dimensional convolutions in the layout that oneDNN multiplies by.

ATen's convolution brings its kernel into that layout in each call, and Inductor stores it channels last before that:
for a 3 × 3 kernel of 512 × 512 channels over 7 × 7 places this takes several times as long as the products. Here it is
one more kept value, as the weight of a linear layer is (packed.py).

Two ops compute the product. `packed_convolution` has the strides that ATen's had in the captured graph, so that a graph
which views its result stays right. Inductor calls `packed_convolution_last` for it, which reads and writes channels
last, and stores the values around it likewise.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from normfx.compat import onednn
from normfx.compat.inductor import lower_channels_last
from normfx.compat.operators import OpOverload
from normfx.compat.tracing import disable_current_modes
from normfx.graph.nodes import arguments, entries, extent, is_row_major, op_name, shape, tensor, value
from normfx.ir.ops import define
from normfx.lower.gemm import convolution_is_faster
from normfx.lower.packing import Packable, PackedProduct, claims_size, pack_products, unpack_products
from normfx.weights.handles import set_size, value_of

LEAST = 2**14
"""Entries of the smallest kernel worth packing."""

PADDED = 2
"""Times the bytes of a kernel that its packed form may take. oneDNN pads channels to the width of a register."""

_SIZES: MutableMapping[Tensor, list[int]] = WeakTensorKeyDictionary()
"""For inputs of which size a parameter, or what is computed from it, is packed; other sizes take the form for any."""


def _pack(
    weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, size: list[int] | None
) -> Tensor:
    packed = onednn.pack_convolution(weight.contiguous(), padding, stride, dilation, groups, size)
    set_size(packed, onednn.bytes_of(packed))
    return packed


def packed_bytes(weight: Node, how: Sequence[Any], size: list[int] | None) -> int:
    """Bytes of a kernel that is packed."""
    fake = tensor(weight)
    return _packed_bytes(tuple(map(int, fake.shape)), fake.dtype, repr([*how, size]))


@functools.lru_cache(maxsize=1024)
def _packed_bytes(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> int:
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        kernel = torch.zeros(shape, dtype=dtype, device="cpu")
        return onednn.bytes_of(_pack(kernel, *ast.literal_eval(how)))


def _convolved_last(x: Tensor, handle: Tensor, bias: Tensor | None, kernel: list[int], last: bool, *how: Any) -> Tensor:
    """The product, channels last. how: stride, padding, dilation, groups"""
    if not x.numel():  # oneDNN takes no empty input
        return _empty(x, handle, bias, kernel, True, *how)
    stride, padding, dilation, groups = how
    return onednn.convolution(x, value_of(handle), bias, padding, stride, dilation, groups)


def _convolved(x: Tensor, handle: Tensor, bias: Tensor | None, kernel: list[int], last: bool, *how: Any) -> Tensor:
    result = _convolved_last(x, handle, bias, kernel, last, *how)
    return result if last else result.contiguous()


def _empty(x: Tensor, handle: Tensor, bias: Tensor | None, kernel: list[int], last: bool, *how: Any) -> Tensor:
    """A result without values, also of fakes."""
    stride, padding, dilation, groups = how
    given = (x, x.new_empty(kernel), bias, stride, padding, dilation, False, [0, 0], groups)
    out: Tensor = torch.ops.aten.convolution.default(*given)
    return torch.empty_like(out, memory_format=torch.channels_last if last else torch.contiguous_format)


def _empty_last(x: Tensor, handle: Tensor, bias: Tensor | None, kernel: list[int], last: bool, *how: Any) -> Tensor:
    return _empty(x, handle, bias, kernel, True, *how)


_CALL = (
    "(Tensor x, Tensor handle, Tensor? bias, int[] kernel, bool last, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)
"""kernel: its shape; last: whether the result of `packed_convolution` is stored channels last."""

PACK = define(
    "pack_convolution(Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, int[]? size) -> Tensor",
    _pack,
    "CPU",
)
PACKED = define(f"packed_convolution{_CALL}", _convolved, "CPU")
PACKED_LAST = define(f"packed_convolution_last{_CALL}", _convolved_last, "CPU")
# what a graph is given instead of a packed kernel is its handle
library.register_fake(PACK, lambda weight, *rest: weight.new_empty(1, dtype=torch.int64))
library.register_fake(PACKED, _empty)
library.register_fake(PACKED_LAST, _empty_last)
lower_channels_last(PACKED, PACKED_LAST)


class Convolution(NamedTuple):
    """A two-dimensional convolution on the CPU, all of one dtype. last: its result is stored channels last"""

    x: Node
    weight: Node
    bias: Node | None
    last: bool
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @property
    def fixed_size(self) -> list[int] | None:
        """The size of x, None where the graph serves several ones."""
        size = [extent(length) for length in tensor(self.x).shape]
        return [int(length) for length in size] if all(length.is_Integer for length in size) else None


def pack_convolutions(gm: GraphModule, free: frozenset[Node], values: Mapping[Node, Tensor]) -> None:
    """Let the convolutions of a graph multiply by packed kernels, in place, where that is faster.

    free:   parameters that may be kept. Every packed kernel is one of `kept_values` afterwards.
    values: the parameters themselves, as far as they are known
    """

    def choose(node: Node, packable: Packable) -> PackedProduct | None:
        convolution = _convolution(node)  # what it reads may have been replaced meanwhile
        if convolution is None or not packable(convolution.weight):
            return None
        x, weight, bias, last, *how = convolution
        if not convolution_is_faster(tensor(weight).dtype):
            return None
        size = convolution.fixed_size
        size = size if size and claims_size(size, weight, values, _SIZES) else None
        if packed_bytes(weight, how, size) > PADDED * tensor(weight).nbytes:
            return None
        kernel = [int(length) for length in tensor(weight).shape]
        return PackedProduct(x, (weight, *how, size), bias, (kernel, last, *how))

    nodes = [node for node in gm.graph.nodes if (convolution := _convolution(node)) and _is_large(convolution)]
    pack_products(gm, free, nodes, choose, (PACK, PACKED))


def unpack(gm: GraphModule, packed: Node) -> None:
    """Return the convolutions by a packed kernel to the kernel itself, in place; other nodes stay."""

    def plain(product: Node) -> tuple[OpOverload, tuple[Any, ...]]:
        x, _, bias, _, _, *how = product.args
        return torch.ops.aten.conv2d.default, (x, packed.args[0], bias, *how)

    unpack_products(gm, packed, plain)


def _convolution(node: Node) -> Convolution | None:
    name = op_name(node)
    if name not in ("aten::conv2d", "aten::convolution"):
        return None
    given = arguments(node)
    if given.get("transposed") or any(given.get("output_padding", ())):
        return None
    stride, padding, dilation = (_pair(given[key]) for key in ("stride", "padding", "dilation"))
    if not all(isinstance(number, int) for number in (*stride, *padding, *dilation)):
        return None  # sizes of the input: a kernel could not be packed before the call
    x, weight, bias = (given[key] for key in ("input", "weight", "bias"))
    fakes = [value(n) for n in (x, weight, node, *([bias] if bias is not None else []))]
    if any(fake is None for fake in fakes) or [fake.ndim for fake in fakes[:3] if fake is not None] != [4, 4, 4]:
        return None
    same = {(fake.dtype, fake.device.type) for fake in fakes if fake is not None}
    dtype = tensor(weight).dtype
    if same != {(dtype, "cpu")} or not all(map(extent, tensor(x).shape)):
        return None
    out = tensor(node)
    if not is_row_major(out) and not is_row_major(out.permute(0, 2, 3, 1)):
        return None
    return Convolution(x, weight, bias, not is_row_major(out), stride, padding, dilation, given["groups"])


def _pair(numbers: Any) -> list[int]:
    return [*numbers] * 2 if len(numbers) == 1 else [*numbers]


def _is_large(convolution: Convolution) -> bool:
    size = entries(shape(convolution.weight))
    dtypes = (torch.float32, torch.bfloat16)
    return tensor(convolution.weight).dtype in dtypes and size.is_Integer and bool(size >= LEAST)
