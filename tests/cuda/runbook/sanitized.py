"""Runs some kernels of every form under compute-sanitizer and judges it and their answers.

python tests/cuda/runbook/sanitized.py memcheck sanitizer-memcheck.log [--every 9] [--from 1] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from kernel_processes import PROGRAM, environment
from test_kernels import forms, judge

FOUND = 9
"""Exit status when the sanitizer found something."""


def cases() -> list[dict[str, Any]]:
    """Every form at a width with a mask and at one without, and one form of each launch of wide rows: it is slow."""
    narrow = [
        {"spec": form, "shape": [rows]} for width, rows in ((127, 37), (768, 5)) for form in forms(width, "bfloat16")
    ]
    return narrow + [{"spec": forms(width, "bfloat16")[0], "shape": [3]} for width in (4096, 12288, 32768)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", help="memcheck, racecheck, …")
    parser.add_argument("log", type=Path)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth case")
    parser.add_argument(
        "--from", type=int, default=0, metavar="K", dest="first", help="from the Kth on, counted from 0"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    given = parser.parse_args()
    sanitizer = ["compute-sanitizer", "--tool", given.tool, "--error-exitcode", str(FOUND), "--log-file", given.log]
    command = [*map(str, sanitizer), sys.executable, str(PROGRAM)]
    chosen = cases()[given.first :: given.every]
    print(len(chosen), "cases for", shlex.join(command), flush=True)
    if given.dry_run:
        return 0
    # every tensor an allocation of its own: from a pool, reads out of its bounds would look right
    env = environment("cuda") | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines = "".join(json.dumps(case) + "\n" for case in chosen)
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    print("exit status", done.returncode, "- something was found" if done.returncode == FOUND else "")
    print(*given.log.read_text().splitlines()[-20:], sep="\n")
    judge(chosen, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
