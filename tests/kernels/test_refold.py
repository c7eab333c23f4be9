"""Folds kept true on a device without a wait, under Triton's interpreter and in machine code: a prototype."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from packaging.version import Version
from paths import SUPPORT

triton = pytest.importorskip("triton")

ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-6}
"""The interpreter cuts bfloat16 off instead of rounding it."""


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="this interpreter makes a number of an array of one entry for each loop, and this NumPy refuses",
)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_what_changed_is_folded_again(dtype: str) -> None:
    program = SUPPORT / "refold_answers.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, program, dtype], capture_output=True, text=True, check=True, env=environment)
    steps = json.loads(run.stdout)
    assert steps.pop("untouched") == {"kept": True}
    assert len(steps) == 5
    for name, step in steps.items():
        assert step["changed"] == step["written"], name
        assert step["error"] <= ROUNDING[dtype], name


def test_jobs_that_cannot_be_done() -> None:
    from normfx.kernels.refold import DeviceFolds, Job

    weight = torch.randn(4, 8)
    for job in (
        Job(weight.t(), torch.empty(8, 4)),
        Job(weight.double(), torch.empty(4, 8, dtype=torch.float64)),
        Job(weight, torch.empty(4, 8), gamma=torch.ones(4)),
        Job(weight, torch.empty(4, 4)),
        Job(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match="normfx kernels"):
            DeviceFolds([job])


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "arch"), [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")])
def test_machine_code(backend: str, arch: int | str) -> None:
    """No local memory, no float64, and few enough registers for two programs on a multiprocessor."""
    from compiled_kernels import amd_spills_of, code_of, compile_typed

    from normfx.kernels.refold import check_source, refold_source

    words = {"addresses_ptr": "*i64", "expected_ptr": "*i32", "changed_ptr": "*i32", "any_ptr": "*i32"}
    numbers = dict.fromkeys(("count", "force", "checks", "tiles"), "i32")
    types = {**words, **numbers, "table_ptr": "*i64"}
    for source in (check_source(), *map(refold_source, (torch.float32, torch.bfloat16, torch.float16))):
        compiled = compile_typed(source, types, backend, arch)
        if backend == "hip":
            assert amd_spills_of(compiled) == 0
        else:
            code = code_of(compiled, arch, source.warps)
            assert not code.stack and not code.spills and not code.doubles
            assert code.registers * 32 * source.warps <= 65536 // 2
