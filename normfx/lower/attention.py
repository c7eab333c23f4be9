"""Attention on the CPU by a C++ kernel of normfx (attention.cpp), where this machine runs it faster than torch's.

torch multiplies the blocks of scores by the BLAS library it was built with, in blocks of 512 keys, and computes masked
blocks too. The kernel multiplies in registers of the widest vectors that there are, skips keys that come after all
queries of a block, and adds in float32 whatever the operands are. `scaled_dot_product_attention` becomes
`_scaled_dot_product_flash_attention_for_cpu` under AOTAutograd, and so does attention that is written as products and a
softmax, where Inductor finds it; the pass replaces that op, after all of Inductor's own passes.

Which of both is faster is measured once for each class of shapes, and kept for other processes (measurements.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import logging
import math
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, library
from torch.fx import Graph, Node

from normfx.compat import attention as compat_attention
from normfx.compat.attention import attend, empty_results, flash
from normfx.compat.codecache import CppLibrary
from normfx.compat.tracing import disable_current_modes
from normfx.graph.nodes import arguments, extent, is_pure, op_name
from normfx.ir.ops import define
from normfx.lower import gemm, measurements
from normfx.lower.passes import HOOK, LastPass, digest, hinted, setting

log = logging.getLogger("normfx")

FILE = "attention"

MARGIN = 1.05

FEW = 3
"""Queries up to which the kernel reads keys and values where they lie, as float32 numbers; as in attention.cpp."""

QUERIES = 1, 8, 128, 64
"""Sequences, heads, tokens and width of the attention that stands for all."""

DTYPES = (torch.float32, torch.bfloat16)

MOST = 2**31
"""Floating-point operations of the largest call that is measured."""

MOST_ENTRIES = 2**25
"""Entries of its operands together."""


_CALL = struct.Struct("=7q 4q 4q 4q 4q 4q 5q 4q d")
"""`Call` of attention.cpp: sizes; address and strides of q, k, v, the output and the mask; flags; the same of the sums;
the scale. Every field has 8 bytes."""


@functools.cache
def _source() -> str:
    """The kernel's code. It names the processor: what is compiled for one may not run on another one that shares the
    cache folder."""
    code = resources.files("normfx.lower").joinpath("attention.cpp").read_text(encoding="utf-8")
    return f"{code}\n// compiled for: {measurements.processor()}\n"


@functools.cache
def _file() -> str:
    """The name under which measurements of this version of the kernel are kept."""
    return f"{FILE}-{hashlib.sha256(_source().encode()).hexdigest()[:8]}"


def _without(error: Exception) -> None:
    log.warning("normfx: attention is left to torch, because no C++ code can be compiled: %s", error)


# calls let go of the interpreter's lock: they take milliseconds, and the tensors are the caller's
_LIBRARY = CppLibrary(
    "normfx-attention",
    _source,
    {
        "normfx_attention": (ctypes.c_int64, [ctypes.c_char_p, ctypes.c_int64]),
        "normfx_multiplies_pairs": (ctypes.c_int64, []),
    },
    ctypes.CDLL,
    _without,
)


def start_attention(graph: Graph, inputs: Sequence[Any]) -> None:
    """Begins to compile or load the kernel where a graph may need it, while Inductor compiles the graph."""
    near = any(isinstance(each, Tensor) and each.is_cpu and each.ndim > 1 for each in inputs)
    if near and any("attention" in str(node.target) or "softmax" in str(node.target) for node in graph.nodes):
        _LIBRARY.start()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and log Σ exp of the scores, in the strides of torch's op; by torch's op where the kernel cannot."""
    known = _runs(query, key, value, mask, causal, (query.shape, key.shape, value.shape))
    if not known or _LIBRARY.get() is None:
        return _attend_by_torch(query, key, value, mask, causal, scale)
    pairs = query.dtype == torch.bfloat16 and query.shape[2] > FEW and _pairs_are_faster()
    return _attend(query, key, value, mask, causal, scale, pairs)


def _attend_by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Torch's op, which reads wrong memory where entries of a row do not lie side by side, and wants a head of keys for
    each of the queries'."""
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    if groups > 1:
        k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
    out, sums = attend(q, k, v, mask, causal, scale)
    return (out if q is query else empty_results(query)[0].copy_(out)), sums


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, pairs: bool
) -> tuple[Tensor, Tensor]:
    """The kernel. pairs: multiply bfloat16 numbers as they are, two by one instruction, and not as float32 ones."""
    native = _LIBRARY.get()
    assert native is not None
    sequences, heads, queries, width = query.shape
    keys = key.shape[2]
    result, sums = empty_results(query)
    out = result if result.stride(3) == 1 else torch.empty(query.shape, dtype=query.dtype, device="cpu")
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    if mask is not None:
        mask = mask.expand(sequences, heads, queries, keys)
    call = _CALL.pack(
        sequences, heads, key.shape[1], queries, keys, width, value.shape[3],
        *_view(q), *_view(k), *_view(v), *_view(out), *((0, 0, 0, 0) if mask is None else _view(mask)),
        0 if mask is None else mask.stride(3), mask is not None and mask.dtype == torch.float32,
        causal, torch.get_num_threads(), pairs, *_view(sums), width**-0.5 if scale is None else scale,
    )  # fmt: skip
    if native.normfx_attention(call, query.dtype == torch.float32):
        raise MemoryError("normfx: attention got no memory for its packed operands")
    return (result if out is result else result.copy_(out)), sums


def _view(tensor: Tensor) -> tuple[int, ...]:
    """Its address, and the strides of sequences, heads and tokens."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


def _runs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, sizes: Sequence[Sequence[int]]
) -> bool:
    """Whether the kernel computes what torch's op computes, for operands of these sizes."""
    dtype = query.dtype
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype or query.ndim != 4:
        return False
    if not query.is_cpu or not key.is_cpu or not value.is_cpu:
        return False
    if mask is not None and (causal or mask.dtype not in (torch.float32, dtype) or not mask.is_cpu):
        return False
    q, k, v = sizes
    return k == v and q[0] == k[0] and q[3] == k[3] and 0 not in q and 0 not in k and q[1] % k[1] == 0


def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    return empty_results(query)


ATTENTION = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float? scale) -> (Tensor, Tensor)",
    _attention,
    "CPU",
    (torch.Tag.flexible_layout,),
)
library.register_fake(ATTENTION, _fake)


@functools.cache
def _pairs_are_faster() -> bool:
    """Whether pairs of bfloat16 numbers are multiplied faster here than float32 ones: measured by a few processes."""
    native = _LIBRARY.get()
    if native is None or not native.normfx_multiplies_pairs():
        return False
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        whole = torch.ones(QUERIES, dtype=torch.bfloat16, device="cpu")
        rest = (whole, whole, whole, None, False, None)
        calls = lambda: _attend(*rest, True), lambda: _attend(*rest, False)
        pairs, numbers = measurements.least(_file(), "bfloat16, pairs and float32", lambda: gemm.best(*calls))
    return pairs < numbers


class Shapes(NamedTuple):
    """What decides how long attention takes. heads: those of all sequences together."""

    bfloat16: bool
    heads: int
    queries: int
    keys: int
    width: int
    causal: bool
    masked: bool


def with_attention(patches: Mapping[str, Any], attention: str = "auto") -> dict[str, Any]:
    """Inductor's config patches, with the pass after those that they have; unchanged where attention is "aten".

    attention: "auto", "aten" or "normfx", as in normfx.options
    """
    if attention == "aten":
        return dict(patches)
    return {**patches, HOOK: FasterAttention(attention == "auto", setting(patches, HOOK))}


class FasterAttention(LastPass):
    """Replaces torch's attention by the kernel.

    measured: only where this was measured to be faster
    """

    def __init__(self, measured: bool, first: Any = None) -> None:
        super().__init__(first)
        self.measured = measured

    def change(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=flash()):
            shapes = _shapes(node)
            if shapes is None or _LIBRARY.get() is None or (self.measured and not is_faster(shapes)):
                continue
            given = arguments(node)
            key, value = given["key"], given["value"]
            fewer = [_unrepeated(each, node) for each in (key, value)]
            if None not in fewer and fewer[0].meta["val"].shape == fewer[1].meta["val"].shape:
                key, value = fewer
            rest = (given[name] for name in ("attn_mask", "is_causal", "scale"))
            node.args, node.kwargs, node.target = (given["query"], key, value, *rest), {}, ATTENTION
            for each in dict.fromkeys((given["key"], given["value"])):
                _drop(each)

    def key(self) -> tuple[Any, ...]:
        return digest(inspect.getmodule(FasterAttention), compat_attention), self.measured


def _unrepeated(node: Node, reader: Node) -> Any:
    """Keys or values before each head was repeated for a group of queries' heads; None where none was.

    The kernel reads a head for its whole group. Nothing may be written between the copy and its reader.
    """
    chain = [node]
    for names in (("aten::reshape", "aten::view", "aten::_unsafe_view"), ("aten::clone",), ("aten::expand",)):
        if op_name(chain[-1]) not in names:
            return None
        chain.append(chain[-1].all_input_nodes[0])
    whole, copy, _, single = chain
    if op_name(single) != "aten::unsqueeze" or arguments(single)["dim"] not in (2, -3):
        return None
    heads = single.all_input_nodes[0]
    repeated, grouped, source = ([extent(size) for size in each.meta["val"].shape] for each in (whole, copy, heads))
    if len(source) != 4 or [*grouped[:2], *grouped[3:]] != source:
        return None
    if repeated != [source[0], source[1] * grouped[2], *source[2:]]:
        return None
    following = copy.next
    while following is not reader:
        if following.op == "call_function" and not is_pure(following):
            return None
        following = following.next
    return heads


def _drop(node: Node) -> None:
    """Erase a value that nothing reads any more, and those that it alone read."""
    while not node.users and node.op == "call_function":
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        if len(sources) != 1:
            return
        node = sources[0]


def _shapes(node: Node) -> Shapes | None:
    """The sizes of attention that the kernel can compute, or those that symbols had when the graph was traced."""
    given = arguments(node)
    operands: Sequence[Any] = [given[name] for name in ("query", "key", "value", "attn_mask")]
    values: list[Any] = [each.meta.get("val") if isinstance(each, Node) else None for each in operands]
    query, key, value, mask = values
    if given["dropout_p"] != 0.0 or not all(isinstance(each, Tensor) for each in values[:3]):
        return None
    hints = [[hinted(size) for size in each.shape] for each in values[:3]]
    if any(None in each for each in hints):
        return None
    sizes = cast(list[list[int]], hints)
    if not _runs(query, key, value, mask, given["is_causal"], sizes):
        return None
    (sequences, heads, queries, width), keys = sizes[0], sizes[1][2]
    bfloat16 = query.dtype == torch.bfloat16
    return Shapes(bfloat16, sequences * heads, queries, keys, width, bool(given["is_causal"]), mask is not None)


def is_faster(shapes: Shapes) -> bool:
    """Whether the kernel beats torch's attention at shapes of this class, by MARGIN."""
    return speed(shapes) >= MARGIN


def speed(shapes: Shapes) -> float:
    """Speed of the kernel relative to torch's attention, at shapes of this class; measured by one process."""
    of_class = _class(shapes)
    key = " ".join(map(str, map(int, of_class)))
    theirs, own = measurements.least(_file(), key, lambda: _measure(of_class), processes=1)
    return theirs / own


def usual_speed(dtype: torch.dtype) -> float | None:
    """That for eight heads of 128 tokens and width 64; None where the kernel cannot be compiled."""
    if _LIBRARY.get() is None:
        return None
    _, heads, tokens, width = QUERIES
    return speed(Shapes(dtype == torch.bfloat16, heads, tokens, tokens, width, causal=False, masked=False))


def _class(shapes: Shapes) -> Shapes:
    """Sizes rounded to powers of two; of calls that are too large fewer heads, then fewer queries and keys, as fast for
    their size."""
    heads, queries, keys, width = (1 << round(math.log2(size)) for size in shapes[1:5])
    while 4 * heads * queries * keys * width > MOST or 3 * heads * max(queries, keys) * width > MOST_ENTRIES:
        if heads > 8:
            heads //= 2
        elif queries >= keys:
            queries //= 2
        else:
            keys //= 2
    return shapes._replace(heads=heads, queries=queries, keys=keys, width=width)


def _measure(shapes: Shapes) -> measurements.Pair:
    """Seconds of torch's attention and of the kernel, on operands as they come: views of one matrix of tokens."""
    dtype = torch.bfloat16 if shapes.bfloat16 else torch.float32
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        rows = max(shapes.queries, shapes.keys)
        whole = torch.ones(1, rows, 3, shapes.heads, shapes.width, dtype=dtype, device="cpu")
        query, key, value = (part.transpose(1, 2) for part in whole.unbind(2))
        query, key, value = query[:, :, : shapes.queries], key[:, :, : shapes.keys], value[:, :, : shapes.keys]
        mask = torch.ones(1, 1, shapes.queries, shapes.keys, dtype=dtype, device="cpu") if shapes.masked else None
        rest = (query, key, value, mask, shapes.causal, None)
        return gemm.best(lambda: attend(*rest), lambda: _attention(*rest))
