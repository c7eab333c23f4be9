"""A generated kernel or Inductor, where both can: the one that is predicted to take less time.

Time is counted in bytes of memory that could be moved meanwhile. Forward, a norm with the residual add it reads moves
the same bytes either way. The difference is made by

    backward    Inductor's sums for dγ and dβ read x and dy a second time, and the one for the bias of the layer that
                writes x reads ds, unless it fuses them with dx, or what they read is still in the L2 cache
    partial     a kernel's programs leave a row of sums each, which are written and read once more; Inductor's are not
    sums        counted, so that a kernel is taken only where it is ahead without doubt
    overhead    where it was measured, what backward with sums takes in addition to its bytes, of either
    neighbours  Inductor computes pointwise producers and readers of a norm inside its kernel; next to a kernel of
                normfx they write memory and read it again, and so do their gradients

What was measured, and where that differs from the bytes: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from normfx.compat.inductor import config
from normfx.compat.operators import OpOverload
from normfx.graph.nodes import bytes_of, entries, is_getitem, op_name, shape, size_hint, tensor, total, value
from normfx.ir.sites import Norm
from normfx.kernels import run
from normfx.kernels.cost import backward_cost, forward_cost
from normfx.kernels.launch import backward_launch, sum_rows
from normfx.kernels.spec import DTYPES, Spec

TESTED: frozenset[str] = frozenset({"sm_90"})
"""Architectures on which the generated kernels have passed `pytest -m gpu`, and some of it under compute-sanitizer."""


@dataclass(frozen=True)
class Overhead:
    """What backward with sums over rows takes in addition to its bytes, counted in bytes that could be moved meanwhile,
    for one sum and for more: launches, programs that wait for each other, sums that do not fill the device.

    kernel:   on a generated kernel
    fused:    in Inductor's kernel that takes the sums with dx
    separate: in kernels of Inductor's own for the sums
    """

    kernel: tuple[int, int] = (0, 0)
    fused: tuple[int, int] = (0, 0)
    separate: tuple[int, int] = (0, 0)


MEASURED = {
    "sm_90": Overhead(
        kernel=(50_000_000, 65_000_000), fused=(89_000_000, 136_000_000), separate=(59_000_000, 90_000_000)
    )
}
"""What was measured, by architecture: an H200 that copies at 4.2 TB/s, torch 2.11, Triton 3.6, bfloat16, 7 shapes of
4,096 to 131,072 rows and 128 to 8,192 columns: the kernels' medians, and the least of Inductor's
(docs/benchmarks/h200-2026-11)."""

MEASURED_ROWS = 4096
"""The fewest rows that `MEASURED` is taken to hold for."""
MEASURED_BYTES = 2
"""The bytes of an entry of the rows and of the output that it was measured with."""

CACHED = 5 * 2**20
"""Entries of x below which a second read finds x and dy in the L2 cache. Inductor's own bound for the fusion."""

FUSED_ROWS, FUSED_WIDTH = 4096, 16384
"""Inductor fuses dx with dγ and dβ ("mix-order reduction") from so many rows on and up to such a width, and before
torch 2.15 only with twice as many rows as columns: torch/_inductor/scheduler.py, MixOrderReduction.can_fuse."""

_FLAT_TOO = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)

_PRODUCTS = {
    f"aten::{name}"
    for name in (
        "linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "conv1d", "conv2d", "conv3d", "convolution",
        "scaled_dot_product_attention",
    )
} | {"normfx::packed_linear", "normfx::packed_convolution"}  # fmt: skip
"""Ops that Inductor leaves to a library: nothing that reads or feeds them is computed in their kernel."""


LARGE = 2**20
"""Entries from which the spelled form wins without gradients. On a CPU Inductor makes several row loops of
`aten.layer_norm` and one of its spelled form; while the rows fit in the cache both take the same time."""


def may_run(lowering: str) -> Callable[[Norm], bool]:
    """Says whether a generated kernel may run a norm under an option `lowering`, of one graph that does not change
    meanwhile."""
    order: dict[Node, int] = {}

    def may(norm: Norm) -> bool:
        fake = value(norm.output)
        if fake is None or fake.device.type != "cuda" or lowering == "inductor":
            return False
        if lowering == "triton" or architecture(fake.device) not in TESTED:
            return lowering == "triton"
        if not order:
            order.update((node, i) for i, node in enumerate(norm.output.graph.nodes))
        return promising(norm, order)

    return may


def spells(lowering: str) -> Callable[[Norm], bool]:
    """Says whether a norm that no rule touches becomes a canonical op: a LayerNorm in two passes on a CPU where that is
    faster, or a norm on a GPU for a kernel."""
    may = may_run(lowering)

    def is_spelled(norm: Norm) -> bool:
        if norm.obstacle or norm.eps_place != "inside" or norm.axis is None:
            return False  # no canonical op says what it computes
        fake = value(norm.output)
        if fake is not None and fake.device.type == "cuda":
            return norm.kind in ("LayerNorm", "RMSNorm") and may(norm)
        faster = lowering != "inductor" and norm.kind == "LayerNorm"
        return faster and faster_spelled(norm.output, torch.is_grad_enabled())

    return is_spelled


def promising(norm: Norm, order: Mapping[Node, int]) -> bool:
    """Whether a kernel may be predicted to be ahead for a norm of the graph as it was captured. One for which it is not
    stays as it was written: Inductor's code for the canonical op is not always the better."""
    out, fake = norm.output, tensor(norm.output)
    if not torch.is_grad_enabled() or (norm.weight is None and norm.bias is None):
        return False
    if any(is_fusible(reader) or _casts(reader, out) for reader in readers_of(out)):
        return False
    sums = op_name(norm.input) == "aten::add.Tensor"  # the kernel takes it in
    read = map(_behind_views, norm.input.all_input_nodes if sums else [norm.input])
    if any(is_fusible(source) and not product_between(source, out, order) for source in read):
        return False
    rows, width = size_hint(entries(shape(out)[:-1]), (out,)), norm.size
    known = rows >= MEASURED_ROWS and tensor(norm.input).element_size() == fake.element_size() == MEASURED_BYTES
    return (known and architecture(fake.device) in MEASURED) or _rereads(rows, width)


def faster_spelled(out: Node, records: bool) -> bool:
    """Whether a LayerNorm is faster in two passes than as `aten.layer_norm`: on a CPU, with gradients recorded (its
    backward reads the rows less often) or of large float32 activations. Measurements: docs/design-notes.md."""
    fake = value(out)
    if fake is None or fake.device.type != "cpu":
        return False
    return records or (fake.dtype == torch.float32 and size_hint(entries(shape(out)), (out,)) >= LARGE)


def objection(spec: Spec, norm: Node, trains: bool, order: Mapping[Node, int]) -> str:
    """Why Inductor should run a norm that a kernel could run; "" where the kernel should.

    order: places of the graph's nodes
    """
    sized = (norm.all_input_nodes[0],)
    rows = entries(shape(sized[0])[:-1])
    seen, device = size_hint(rows, sized), tensor(sized[0]).device
    here = architecture(device)
    both = forward_cost(spec, rows, statistics=trains).bytes
    alone, fused = (1 + trains) * total(_hidden(norm, spec, order)), 0
    # measured between products, with no neighbour in Inductor's kernel
    known = seen >= MEASURED_ROWS and alone == 0 and DTYPES[spec.saved] == DTYPES[spec.out] == MEASURED_BYTES
    overhead = MEASURED.get(here, Overhead()) if known else Overhead()
    for part in () if not trains else (spec,) if spec.inner is None else (spec.last, spec.first):
        floor = backward_cost(part, rows, part.sum is not None, sympy.Integer(0)).bytes
        both += floor
        if not part.sums:
            continue
        again = rows * part.entries * sympy.Integer(_summed(part))
        launch = backward_launch(part)
        partial = sympy.Integer(sum_rows(part, launch, max(seen, 1), run.processors(device)))
        alone += backward_cost(part, rows, part.sum is not None, partial).bytes - floor
        alone += 0 if launch.persistent else again
        fused += again if _rereads(seen, part.entries) else 0
        more = len(part.sums) > 1
        alone += overhead.kernel[more]
        fused += (overhead.fused if _fuses(seen, part.entries) else overhead.separate)[more]
    alone, fused = alone + both, fused + both
    kernel, inductor = size_hint(alone, sized), size_hint(fused, sized)
    predicted = f"predicted as long as {inductor:,} bytes take, on a kernel {kernel:,}"
    if inductor <= kernel:
        return predicted
    if here in TESTED:
        return ""
    return f"{predicted}, but the kernels were not tested on {here}: lowering='triton' uses them"


def _summed(spec: Spec) -> int:
    """Bytes of an entry that sums over rows read where they are not taken with dx: dγ and dβ of x and dy, Σds of ds."""
    own = DTYPES[spec.out] + DTYPES[spec.saved] if spec.weight or spec.bias else 0
    return own + (DTYPES[spec.x] if spec.x_bias else 0)


def _rereads(rows: int, width: int) -> bool:
    """Whether Inductor's backward with sums reads what is summed over rows from memory twice."""
    return rows * width >= CACHED and not _fuses(rows, width)


def _fuses(rows: int, width: int) -> bool:
    """Whether Inductor takes sums over rows in the kernel that computes dx."""
    can = config.triton.mix_order_reduction and not config.cpp_wrapper
    shaped = rows >= FUSED_ROWS and width <= FUSED_WIDTH and (_FLAT_TOO or rows >= 2 * width)
    return can and shaped and rows * width >= CACHED


def _hidden(norm: Node, spec: Spec, order: Mapping[Node, int]) -> Iterator[sympy.Expr]:
    """Bytes forward that neighbours move because they are not computed in the norm's kernel."""
    for producer in norm.all_input_nodes[: 2 if spec.residual else 1]:
        source = _behind_views(producer)
        if is_fusible(source) and not product_between(source, norm, order):
            yield bytes_of(producer) * (2 if len(source.users) == 1 else 1)
    out = next((user for user in norm.users if user.args[1] == 0), None) if spec.residual else norm
    readers = [] if out is None else readers_of(out)
    fusible = [r for r in readers if out is not None and (is_fusible(r) or _casts(r, out))]
    if out is not None and fusible:
        yield bytes_of(out) * (2 if len(fusible) == len(readers) else 1)


def _casts(reader: Node, out: Node) -> bool:
    """Whether autocast casts what a product reads: none returns another dtype than it reads."""
    result = value(reader)
    return result is not None and result.dtype != tensor(out).dtype


def product_between(source: Node, last: Node, order: Mapping[Node, int]) -> bool:
    """Whether a product of `source` goes into `last`: then no kernel computes both, as along a residual stream."""
    products, reached, work = [], {source}, [source]
    while work:
        for user in work.pop().users:
            if order[user] < order[last] and user not in reached:
                reached.add(user)
                work.append(user)
                products += [] if is_fusible(user) or is_getitem(user) else [user]
    seen, work = {last}, [last]
    while work:
        new = [n for n in work.pop().all_input_nodes if n in reached and n not in seen]
        seen.update(new)
        work += new
    return not seen.isdisjoint(products)


def _behind_views(node: Node) -> Node:
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def readers_of(node: Node) -> Sequence[Node]:
    return [r for user in node.users for r in (readers_of(user) if _is_view(user) else [user])]


def _is_view(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.is_view


def is_fusible(node: Node) -> bool:
    """Whether Inductor may compute a value in the kernel of its neighbour. All ATen but products: where it might not,
    Inductor gets the norm."""
    return bool(op_name(node)) and op_name(node).partition(".")[0] not in _PRODUCTS


def architecture(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return f"this {device.type} device"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
