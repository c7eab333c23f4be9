"""Models over several real processes: losses and gradients are those of eager mode, and what is converted is listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch.distributed as dist
from paths import ROOT, TESTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"),
]


def run(processes: int, *cases: str) -> dict[str, Any]:
    """What tests/support/parallel_cases.py prints of its cases. With "+inductor" they are compiled, else run as they
    are rewritten."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = TESTS / "support" / "parallel_cases.py"
    found = subprocess.run(
        [sys.executable, *command, str(script), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS / 'support'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == list(cases), found.stdout + found.stderr
    for line in lines:
        assert line["difference"] < 1e-12 and line["between processes"] < 1e-12, line
    return {line["case"]: line for line in lines}


def test_tensors_over_two_processes() -> None:
    found = run(2, "tensor", "sequence", "columns", "whole", "by hand")
    assert found["tensor"]["rules"]["pre_rms_norm"] == found["tensor"]["norms"] == 5
    assert found["sequence"]["rules"] == {"pre_rms_norm": 5, "fold_affine": 5}
    assert "pre_rms_norm:sharded_features" in found["columns"]["codes"]
    assert found["whole"]["rules"]["pre_rms_norm"] == found["whole"]["norms"] == 2
    assert found["by hand"]["rules"]["pre_rms_norm"] == found["by hand"]["norms"] == 2


def test_data_and_pipelines_over_two_processes() -> None:
    """Each bucket of DDP, and each group of FSDP, is a graph of its own: norms whose writers lie in others stay."""
    found = run(2, "fsdp", "fsdp each block", "ddp", "pipeline")
    assert found["fsdp"]["rules"]["pre_rms_norm"] == found["fsdp"]["norms"] == 5
    assert "pre_rms_norm" not in found["fsdp each block"]["rules"]
    assert found["ddp"]["graphs"] == 3 and 0 < found["ddp"]["rules"]["pre_rms_norm"] < found["ddp"]["norms"] == 7
    assert (found["pipeline"]["converted"], found["pipeline"]["norms of all stages"]) == (5, 9)


def test_over_four_processes() -> None:
    found = run(4, "tensor", "sequence", "whole", "fsdp and tensor", "pipeline")
    for case in ("tensor", "sequence", "whole", "fsdp and tensor"):
        assert found[case]["rules"]["pre_rms_norm"] == found[case]["norms"], case


def test_a_plan_of_transformers() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    found = run(2, "transformers")["transformers"]
    assert found["rules"]["pre_rms_norm"] == found["norms"] == 5


def test_compiled_by_inductor() -> None:
    """The processes agree before they compile (normfx/agreement.py)."""
    found = run(2, "tensor+inductor", "sequence+inductor", "by hand+inductor")
    assert all(line["rules"]["pre_rms_norm"] == line["norms"] for line in found.values())
