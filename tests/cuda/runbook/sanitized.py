"""Runs some kernels of every form under compute-sanitizer and judges it and their answers.

python tests/cuda/runbook/sanitized.py memcheck sanitizer-memcheck.log [--dry-run]
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
    tool, log, *rest = sys.argv[1:]
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--log-file", log]
    command = [*sanitizer, sys.executable, str(PROGRAM)]
    chosen = cases()
    print(len(chosen), "cases for", shlex.join(command))
    if rest == ["--dry-run"]:
        return 0
    # every tensor an allocation of its own: from a pool, reads out of its bounds would look right
    env = environment("cuda") | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines = "".join(json.dumps(case) + "\n" for case in chosen)
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    print("exit status", done.returncode, "- something was found" if done.returncode == FOUND else "")
    print(*Path(log).read_text().splitlines()[-20:], sep="\n")
    judge(chosen, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
