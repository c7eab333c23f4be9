"""Calls one of normfx's kernels a few times, for a profiler: `python profiled.py --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from normfx.bench import rivals
from normfx.bench.norms import OPS, PASSES, Cell, Inputs

CALLS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=OPS, default="layer_norm")
    parser.add_argument("--task", choices=PASSES, default="backward")
    parser.add_argument("--shape", default="16384x4096")
    parser.add_argument("--trace", type=Path, help="profile with torch, and write a trace for Perfetto")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be called")
    given = parser.parse_args()
    rows, width = map(int, given.shape.split("x"))
    cell = Cell(given.op, given.task, "bfloat16", rows, width, "cuda")
    print(f"{cell}: {cell.bytes:,} bytes to be moved", flush=True)
    if given.dry_run:
        return
    with torch.no_grad():
        call = rivals.call(rivals.OURS[0], cell, Inputs.of(cell))
        assert call is not None
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        if given.trace:
            with torch.profiler.profile() as profile:
                for _ in range(CALLS):
                    call()
                torch.cuda.synchronize()
            print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=12, max_name_column_width=60))
            profile.export_chrome_trace(str(given.trace))


if __name__ == "__main__":
    main()
