"""The runner of PyTorch's own tests swaps the compiler under a test, survives tests that die, finds what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peers import run, table

TESTS = '''
import os
import torch
from torch._inductor.compile_fx import compile_fx
from functorch.compile import nop
from torch._dynamo.testing import CompileCounter
from torch._functorch import aot_autograd
from normfx.backend import listening

norm = torch.nn.LayerNorm(4)


def graphs(backend):
    """How many graphs normfx has compiled."""
    seen = []
    with listening(seen.append):
        x = torch.randn(2, 4)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(norm, backend=backend)(x), norm(x))
    return len(seen)


def test_agrees():
    graphs("inductor")


def test_by_name():
    assert not graphs("inductor")


def test_by_function():
    assert not graphs(lambda gm, inputs: compile_fx(gm, inputs))


def test_by_a_backend_that_runs_graphs():
    assert not graphs("eager")


def test_by_aot_autograd():
    assert not graphs(lambda gm, inputs: aot_autograd.aot_module_simplified(gm, inputs, nop))


def test_by_a_counter():
    assert not graphs(CompileCounter())


def test_compiles_nothing():
    assert norm(torch.ones(2, 4)).shape == (2, 4)


def test_dies():
    if graphs("inductor"):
        os._exit(3)


def test_fails_anyway():
    assert False
'''


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["normfx", "forced"])
def test_what_differs_is_found(mode: str, tmp_path: Path) -> None:
    (tmp_path / "test_them.py").write_text(TESTS)
    out = tmp_path / "peers.json"
    arguments = f"{tmp_path} --files test_them.py --compiler aot_eager --modes {mode} --out {out}"
    assert run.main(arguments.split()) == 1
    (result,) = json.loads(out.read_text())["results"]
    names = {name.split("::")[-1]: found for name, found in result["differ"].items()}
    ways = {"by_name", "by_function", "by_a_backend_that_runs_graphs", "by_aot_autograd", "by_a_counter"}
    assert set(names) == {f"test_{way}" for way in ways} | {"test_dies"}
    assert (result["passed"], result["compiled"]) == (2, 1)
    assert names["test_dies"]["outcome"] == "died" and "3" in names["test_dies"]["kind"]
    assert names["test_by_name"]["kind"] == "AssertionError"


def test_the_table_names_what_nobody_explained() -> None:
    failure = {"stage": "capture", "kind": "KeyError", "text": "a | b"}
    differ = {"a/test_a.py::T::test_known": failure, "a/test_a.py::T::test_new": failure}
    counts = {"passed": 7, "compiled": 6}
    found = {
        "torch": "2.14.1",
        "results": [
            {"file": "a/test_a.py", "compiler": "inductor", "mode": "forced", **counts, "differ": differ},
            {"file": "a/test_a.py", "compiler": "inductor", "mode": "normfx", **counts, "differ": {}},
        ],
    }
    lines = table.table(found, {"a/test_a.py::T::test_known": "torch issue 1"}).splitlines()
    assert "| a/test_a.py | inductor | forced | 7 | 6 | 2 | 1 |" in lines
    assert "| a/test_a.py | inductor | normfx | 7 | 6 | 0 | 0 |" in lines
    assert "| test_a.py::T::test_known | capture KeyError a \\| b | torch issue 1 |" in lines
    assert f"| test_a.py::T::test_new | capture KeyError a \\| b | {table.NEW} |" in lines
