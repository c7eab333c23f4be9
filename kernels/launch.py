"""How a norm is cut into programs, and why. Frozen tables: nothing here is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .spec import DTYPES, Spec

Form = Literal["rows", "chunks"]

FORWARD_IN_REGISTERS = 16384
"""Entries of the widest row that forward holds in registers: 32 float32 for each of 512 threads."""

BACKWARD_IN_REGISTERS = 8192
"""Of the widest row that backward holds: x, dy, and a running sum each for dγ and dβ."""

WIDE = 4096
"""Entries above which a thread holds 32 of a row, unless two running sums need the room: with 16, ptxas for sm_80 keeps
a register in local memory."""

CHUNK = 4096
"""Entries read at a time of a wider row; what is read twice comes from a cache the second time."""

SUMS_IN_REGISTERS = 16384
"""Running sums that a program of 512 threads keeps beside a chunk of bfloat16. With more, ptxas for some target moves
registers to local memory, as it does for chunks of float32 with as many."""

MOST_PARTS = 4
"""Each part reads every row from the L2 cache once more. Were that twice as fast as memory, more parts would cost more
than reading x and dy from memory twice, in a kernel of its own for the sums."""

PROGRAM = 2048
"""Entries a program should have at least: with fewer, starting it costs as much as its work."""

PROGRAMS_PER_SM = 2
"""Of a persistent grid: more rows of partial sums cost bandwidth, fewer leave nothing to hide latency with. Of wide
rows, whose sums fill the registers, one."""


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
    """

    form: Form
    block: int
    rows: int
    warps: int
    persistent: bool
    reason: str
    parts: int = 1


def forward_launch(spec: Spec) -> Launch:
    if spec.entries > FORWARD_IN_REGISTERS:
        return Launch("chunks", CHUNK, 1, 8, False, f"a row of {spec.entries} does not fit into registers")
    return _rows(spec, 32 if spec.entries > WIDE else 16, False)


def backward_launch(spec: Spec) -> Launch:
    """Of dx, and if it is persistent of dγ and dβ in the same kernel."""
    sums = (spec.weight is not None) + (spec.bias is not None)
    if spec.entries <= (BACKWARD_IN_REGISTERS if sums else FORWARD_IN_REGISTERS):
        return _rows(spec, 32 if spec.entries > WIDE and sums == 1 else 8, sums > 0)
    reason = f"a row of {spec.entries} does not fit into registers"
    parts = -(-spec.entries * sums // SUMS_IN_REGISTERS)
    if not sums or parts > MOST_PARTS or DTYPES[spec.x] > 2:
        return Launch("chunks", CHUNK, 1, 16, False, f"{reason}, nor do its sums" if sums else reason)
    held = "its sums do" if parts == 1 else f"its sums do in {parts} parts"
    return Launch("chunks", CHUNK, 1, 16, True, f"{reason}, {held}", parts)


def _rows(spec: Spec, per_thread: int, persistent: bool) -> Launch:
    """Whole rows: `per_thread` entries a thread, at least one 16-byte access wide."""
    block = power_of_two(spec.entries)
    rows = max(1, PROGRAM // block)
    vector = 16 // DTYPES[spec.x]
    if spec.entries % vector:  # accesses of one entry: their addresses and masks need registers too
        per_thread = 8
    threads = rows * block // max(per_thread, vector)
    warps = min(max(threads // 32, 1), 16)
    reason = f"{rows} rows of {block}" if rows > 1 else f"one row of {block}"
    return Launch("rows", block, rows, warps, persistent, f"{reason}, {rows * block // (32 * warps)} entries a thread")


def programs(launch: Launch, rows: Any, processors: int) -> Any:
    """Programs, of each part, for this many rows on a device with this many multiprocessors; `rows` may be a
    torch.SymInt."""
    groups = -(-rows // launch.rows)
    if not launch.persistent:
        return groups
    most = processors * PROGRAMS_PER_SM if launch.form == "rows" else max(1, processors // launch.parts)
    return torch.sym_min(groups, most)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
