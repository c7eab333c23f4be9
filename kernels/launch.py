"""How a norm is cut into programs, and why. Frozen tables: nothing here is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .spec import DTYPES, Spec

Form = Literal["rows", "chunks"]

FORWARD_IN_REGISTERS = 16384
"""Entries of the widest row that forward holds in registers: 32 float32 for each of 512 threads."""

BACKWARD_IN_REGISTERS = 8192
"""The widest row that backward holds: x, dy, and a running sum each for dγ and dβ."""

WIDE = 4096
"""Entries above which a thread holds 32 of a row in forward."""

SUMMED = 16
"""Entries of a row, and so of each running sum, that a thread of backward holds: at most 128 registers with two sums,
for sm_80, sm_90 and sm_100, with Triton 3.6 and 3.8, so that 512 threads are resident. With 8 twice as many threads
need 50 to 80 each, and where ptxas takes more than 64 half of them wait."""

CHUNK = 4096
"""Entries read at a time of a wider row; what is read twice comes from a cache the second time."""

SUMS_IN_REGISTERS = 16384
"""Running sums that a program of 512 threads keeps next to a chunk of bfloat16. With more, ptxas for some target moves
registers to local memory, as it does for chunks of float32 with as many."""

MOST_PARTS = 4
"""Each part reads every row from the L2 cache once more. Were that twice as fast as memory, more parts would cost more
than reading x and dy from memory twice, in a kernel of its own for the sums."""

PROGRAM = 2048
"""Entries a program should have at least: with fewer, starting it costs as much as its work."""

WARPS_PER_SM = 16
"""Warps of a persistent grid, with the 128 registers a thread that sums take: four programs of narrow rows, two of
rows of 4,096, one of wider rows. More would wait until others end, and leave more rows of partial sums. With 8 entries
a thread, two programs of up to 16 warps."""

STAGES = 3
"""Stages of the loop over rows of a persistent grid: two rows are copied to shared memory while one is computed."""

SHARED = 2**17
"""Bytes of shared memory of a multiprocessor for the rows on their way, of all its programs together: sm_80 has 164
KiB. A program gets at most half of it: on some devices 99 KiB are the limit."""


@dataclass(frozen=True)
class Launch:
    """form:   "rows": whole rows in registers; "chunks": a row in pieces of `block`
    block:     columns of a program, a power of two
    rows:      rows that a program holds at a time
    warps:     of 32 threads
    persistent: programs loop over rows and keep sums over them
    reason:    why
    parts:     persistent chunks: into how many parts the columns are cut; a program reads its rows whole, for what it
               needs of the whole row, and writes its part
    keeps:     persistent rows: γ is read before the loop over them, and stays in registers
    stages:    persistent rows: of the loop over them; all but one are copies under way
    resident:  persistent: programs that a multiprocessor holds at a time, and so has
    """

    form: Form
    block: int
    rows: int
    warps: int
    persistent: bool
    reason: str
    parts: int = 1
    keeps: bool = False
    stages: int = 1
    resident: int = 2


def forward_launch(spec: Spec) -> Launch:
    if spec.entries > FORWARD_IN_REGISTERS:
        return Launch("chunks", CHUNK, 1, 8, False, f"a row of {spec.entries} does not fit into registers")
    if spec.entries > WIDE:
        return _rows(spec, 32, False)
    # two norms of float32: with 16 ptxas keeps 4 registers of a row of 4,096 in local memory (sm_90, Triton 3.8)
    return _rows(spec, 8 if spec.inner is not None and DTYPES[spec.x] > 2 else 16, False)


def backward_launch(spec: Spec) -> Launch:
    """The launch of dx, and if it is persistent of dγ and dβ in the same kernel."""
    sums = len(spec.sums)
    most = BACKWARD_IN_REGISTERS if sums else FORWARD_IN_REGISTERS
    if DTYPES[spec.x] > 2 and len(spec.sums) > 2:
        most //= 2  # with three sums 16 bytes of a row of 8,192 are in local memory (sm_90)
    if spec.entries <= most:
        return _summed(spec) if sums else _rows(spec, 8, False)
    reason = f"a row of {spec.entries} does not fit into registers"
    parts = -(-spec.entries * sums // SUMS_IN_REGISTERS)
    # next to Σds there are no registers for chunks: ptxas moves some to local memory (12,288 of bfloat16 on sm_90)
    if not sums or parts > MOST_PARTS or DTYPES[spec.x] > 2 or spec.x_bias:
        return Launch("chunks", CHUNK, 1, 16, False, f"{reason}, nor do its sums" if sums else reason)
    held = "its sums do" if parts == 1 else f"its sums do in {parts} parts"
    return Launch("chunks", CHUNK, 1, 16, True, f"{reason}, {held}", parts, resident=1)


def _rows(spec: Spec, per_thread: int, persistent: bool) -> Launch:
    """Whole rows: `per_thread` entries a thread, at least one 16-byte access wide."""
    block = power_of_two(spec.entries)
    rows = max(1, PROGRAM // block)
    vector = 16 // DTYPES[spec.x]
    if not _vectorised(spec):  # accesses of one entry: their addresses and masks need registers too
        per_thread = 8
    threads = rows * block // max(per_thread, vector)
    warps = min(max(threads // 32, 1), 16)
    reason = f"{rows} rows of {block}" if rows > 1 else f"one row of {block}"
    return Launch("rows", block, rows, warps, persistent, f"{reason}, {rows * block // (32 * warps)} entries a thread")


def _summed(spec: Spec) -> Launch:
    """Whole rows and their sums, with as many stages as shared memory has room for. Not of several rows at a time,
    whose masks and addresses of copies take more registers (up to 208), so that fewer programs would be resident.

    Rows that are read entry by entry, and of float32 several (8 bytes in local memory with 1,024 on sm_90) or those
    with Σds (as many with 4,096 on sm_100), have 8 entries a thread and read γ for each."""
    several = power_of_two(spec.entries) < PROGRAM
    if not _vectorised(spec) or (DTYPES[spec.x] > 2 and (several or spec.x_bias)):
        launch = _rows(spec, 8, True)
        return replace(launch, resident=WARPS_PER_SM // launch.warps) if spec.x_bias else launch
    launch = _rows(spec, SUMMED, True)
    room_for = WARPS_PER_SM // launch.warps
    # with three sums a thread of some targets has up to 162 registers
    launch = replace(launch, keeps=True, resident=room_for if len(spec.sums) < 3 else max(1, room_for // 2))
    if several:
        return launch
    entry = sum(DTYPES[dtype] for dtype in (spec.out, spec.saved, spec.sum) if dtype)
    room = SHARED // max(2, room_for)
    stages = min(STAGES, 1 + room // (launch.block * entry))
    return replace(launch, stages=stages, reason=f"{launch.reason}, {stages} stages") if stages > 1 else launch


def _vectorised(spec: Spec) -> bool:
    """Whether rows allow accesses of 16 bytes."""
    return spec.entries % (16 // DTYPES[spec.x]) == 0


def programs(launch: Launch, rows: Any, processors: int) -> Any:
    """Programs, of each part, for this many rows on a device with this many multiprocessors; `rows` may be a
    torch.SymInt."""
    groups = -(-rows // launch.rows)
    if not launch.persistent:
        return groups
    return torch.sym_min(groups, max(1, processors * launch.resident // launch.parts))


def sum_rows(spec: Spec, launch: Launch, rows: Any, processors: int) -> Any:
    """Rows of partial sums for dγ and dβ: one of each program, or of each part of the rows."""
    return programs(launch, rows, processors) if launch.persistent else parts(rows, spec, launch, processors)[0]


def parts(rows: Any, spec: Spec, launch: Launch, processors: int) -> tuple[Any, Any]:
    """Into how many parts the rows are cut for sums in a kernel of their own, and how many rows a part has."""
    columns = -(-spec.entries // launch.block)
    most = max(1, 2 * processors // columns)
    rows_each = -(-rows // torch.sym_min(rows, most))
    return -(-rows // rows_each), rows_each


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
