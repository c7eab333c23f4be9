"""`normfx bench kernels`, through the command's own entry point. Nothing here looks at a time."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import SUPPORT
from torch import Tensor

from normfx.bench import command, kernels, rivals
from normfx.bench.clock import Call, DeviceClock
from normfx.bench.contest import measure
from normfx.bench.kernel_report import Results, markdown
from normfx.bench.norms import ALLOWED, OPS, PASSES, Cell, Inputs, errors, exact, wrong
from normfx.cli import main

pytest.importorskip("triton")


WRONG = {"one-row-off", "one-row-unwritten", "no-mean", "raises"}
RIGHT = {"normfx", "normfx-op", "eager", "writes-into-grad"}
NAMES = ",".join(sorted((RIGHT | WRONG | {"no-such-norm", "not-installed"}) - {"normfx", "normfx-op"}))


@pytest.mark.slow
def test_results_are_checked(tmp_path: Path) -> None:
    """The generated kernels, really run, are right in all norms, forward and backward, in rows that fill a block and
    rows that do not; every rival of wrong_rivals.py that is wrong is found out."""
    program = SUPPORT / "wrong_rivals.py"
    arguments = ("--device", "cpu", "--check", "--shapes", "5x16,3x127", "--dtypes", "float32,bfloat16")
    line = [sys.executable, program, "bench", "kernels", *arguments, "--rivals", NAMES, "--output", tmp_path]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    results = json.loads((tmp_path / "kernels.json").read_text())
    cells = [(m["cell"]["op"], m["cell"]["task"], m["cell"]["dtype"], m["cell"]["width"]) for m in results["cells"]]
    assert set(cells) == set(itertools.product(OPS, PASSES, ("float32", "bfloat16"), (16, 127)))
    for measured in results["cells"]:
        op, dtype = measured["cell"]["op"], measured["cell"]["dtype"]
        lacking = {"no-such-norm"}
        wrong = WRONG if "layer" in op or "crms" in op else WRONG - {"no-mean"}  # which is an RMSNorm
        assert set(measured["lacking"]) == lacking
        assert set(measured["failures"]) == wrong
        assert set(measured["results"]) == (RIGHT | WRONG) - wrong - lacking
        assert all(r["error"] <= ALLOWED[dtype] and r["graph_us"] is None for r in measured["results"].values())
        assert measured["failures"].pop("raises") == "RuntimeError: no such kernel"
        assert all(text.startswith("wrong: ") for text in measured["failures"].values())
        if measured["cell"]["task"] == "forward":
            assert measured["failures"]["one-row-off"].startswith("wrong: out is off by ")
            assert measured["failures"]["one-row-unwritten"].startswith("wrong: out is off by nan of a row, ")
    # the interpreter cuts bfloat16 off instead of rounding it: the kernels did run, and not a formula of torch
    own, formula = (
        [m["results"][name]["error"] for m in results["cells"] if "normfx-op" in m["results"]]
        for name in ("normfx", "normfx-op")
    )
    assert own != formula and sum(own) > 1.2 * sum(formula)
    assert "No module named 'no_such_module' (pip install no-such-package)" in results["absent"]["not-installed"]
    assert "absent: not-installed: " in run.stdout and "no layer_norm: no-such-norm" in run.stdout
    text = (tmp_path / "kernels.md").read_text()
    assert "| add_crms_norm backward bfloat16 3x127 | normfx | " in text
    assert "| layer_norm forward bfloat16 3x127 | no-mean | wrong | " in text
    assert "- no crms_norm: no-such-norm" in text and "graph µs" not in text
    assert not (tmp_path / "kernels.png").exists()


class Clock:
    """Gives every call a time of its own, in the order of `order`; a "graph" is the call itself, which writes into the
    tensors of its first run, unless it is among the `broken`."""

    def __init__(self, *order: str, broken: str = "") -> None:
        self.order, self.broken = order, broken
        self.before: Callable[[], object] = lambda: None
        self.graphs: list[Callable[[], object]] = []

    def running(self) -> Any:
        self.graphs.clear()
        return contextlib.nullcontext()

    def graph(self, call: Call) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        written, name = tuple(t.clone() for t in call()), self.order[len(self.graphs)]

        def replay() -> None:
            for tensor, new in zip(written, call(), strict=True):
                if name != self.broken:
                    tensor.copy_(new)

        self.graphs.append(replay)
        return replay, written

    def launched(self, call: Callable[[], object], repeats: int, device: str) -> float:
        self.before()
        call()
        return 1e-3

    def replayed(self, call: Callable[[], object], repeats: int, device: str) -> float:
        """5 µs for the first graph, 10 for the second, …, in whatever order their times are asked for."""
        return 5e-6 * (1 + self.graphs.index(call))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Clock], None]]:
    """A clock instead of a device's, and eager instead of the kernels, which need one."""
    monkeypatch.setattr(kernels, "_check_device", lambda parsed: None)
    monkeypatch.setattr(rivals, "_launches", lambda cell, inputs: rivals.call("eager", cell, inputs))
    yield lambda clock: monkeypatch.setattr(kernels, "DeviceClock", lambda device: clock)


def bench(folder: Path, *arguments: str) -> int:
    return main(["bench", "kernels", "--device", "cpu", "--rounds", "3", "--output", str(folder), *arguments])


def load(folder: Path) -> Results:
    return Results.load((folder / "kernels.json").read_text())


def test_times_become_results(
    tmp_path: Path, pretended: Callable[[Clock], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(Clock("copy", "normfx", "normfx-op", "eager"))
    arguments = ("--ops", "add_rms_norm", "--shapes", "6x24,2x16", "--rivals", "eager")
    assert bench(tmp_path, *arguments, "--minutes", "1e-9") == 0
    assert load(tmp_path).left == 4 and load(tmp_path).cells == []
    assert bench(tmp_path, *arguments, "--resume") == 0
    printed = capsys.readouterr().out
    assert "4 cells are left: continue with --resume" in printed
    results = load(tmp_path)
    assert results.left == 0 and [m.cell.task for m in results.cells] == ["forward", "backward"] * 2
    for m in results.cells:
        assert list(m.results) == ["normfx", "normfx-op", "eager"] and not m.failures
        assert [r.graph_us.middle for r in m.results.values() if r.graph_us] == pytest.approx([10, 15, 20])
        assert m.results["eager"].of_copy is not None and m.results["eager"].of_copy.middle == pytest.approx(0.25)
        assert m.results["eager"].launch_us is not None and m.results["eager"].launch_us.middle == pytest.approx(1e3)
        assert m.results["normfx"].gb_s == pytest.approx(m.bytes / 10e-6 / 1e9)
        assert m.best == "eager" and m.speed is not None and m.speed.middle == pytest.approx(2.0)
    assert results.cells[0].bytes == 4 * 6 * 24 * 2 + 24 * 2  # x, residual, sum, norm; γ
    text = (tmp_path / "kernels.md").read_text()
    assert "| add_rms_norm forward bfloat16 6x24 | eager | 20.0 (20.0–20.0) | 10.0 (10.0–10.0) | 2.00" in text
    assert "speed 2.00 against the best rival of each shape (geometric mean); faster at 2, level at 0" in text
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert bench(tmp_path, *arguments, "--resume") == 0
    assert load(tmp_path) == results  # nothing was measured again
    with pytest.raises(SystemExit):
        bench(tmp_path, *arguments, "--resume", "--rounds", "4")
    assert "rounds was 3, is 4" in capsys.readouterr().err


def test_losses_and_broken_graphs_are_named(
    tmp_path: Path, pretended: Callable[[Clock], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(Clock("copy", "normfx", "normfx-op", "eager", broken="normfx-op"))
    assert bench(tmp_path, "--ops", "layer_norm", "--passes", "forward", "--shapes", "6x24", "--rivals", "eager") == 1
    results = load(tmp_path)
    (m,) = results.cells
    assert m.failures == {"normfx-op graph": "wrong: out is off by nan of a row, 2.0e-02 is allowed"}
    assert m.results["normfx-op"].graph_us is None and m.results["normfx-op"].launch_us is not None
    assert m.speed is not None
    m.speed = m.speed._replace(low=0.4, middle=0.5, high=0.6)
    text = markdown(results)
    assert "| 0.50 (0.40–0.60) | slower |" in text
    assert "- slower: layer_norm forward bfloat16 6x24: 0.50 (0.40–0.60) of eager" in text
    assert "faster at 0, level at 0, slower at 1" in text
    assert "normfx-op graph: wrong" in capsys.readouterr().out


def test_inductor_runs_backward_again_and_again() -> None:
    """Which it refuses to where its cache has the same graph from a program that ran it once."""
    cell = Cell("rms_norm_plain", "backward", "float32", 4, 16, "cpu")
    inputs = Inputs.of(cell)
    leaves = {name: t.requires_grad_() for name, t in inputs.tensors.items()}
    function = rivals.RIVALS["inductor"].make(cell.spec)
    assert function is not None
    torch.autograd.grad(function(*inputs.arguments), list(leaves.values()), inputs.grads)
    measured = measure(cell, ["inductor"], None, None, lambda stage: None)
    assert set(measured.failures) <= {"normfx"}  # which needs a device here
    assert measured.results["inductor"].error <= ALLOWED["float32"]


def test_only_the_call_lies_between_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of things, on a torch.cuda that only keeps a log: there is no device in these tests."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    @contextlib.contextmanager
    def logged(what: str) -> Iterator[None]:
        log.append(what)
        yield
        log.append(f"end of {what}")

    def stream(device: object = None) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: log.append("wait"), synchronize=lambda: log.append("drain"))

    for name, fake in {
        "Stream": stream,
        "current_stream": stream,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024),
        "stream": lambda stream: logged("stream"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        "graph": lambda graph, stream: logged("capture"),
        "Event": Event,
        "synchronize": lambda: log.append("idle"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = DeviceClock("cpu")
    clock.before = lambda: log.append("before")
    with clock.running():
        replay, written = clock.graph(lambda: (torch.ones(1),))
        assert clock.launched(lambda: log.append("call"), 1, "cpu") == 2e-3
        assert clock.replayed(replay, 2, "cpu") == 2e-3
    captured, launched = ["capture", "end of capture"], ["before", "idle", "event", "call", "event", "idle"]
    replayed = [*2 * ["before", "event", "replay", "event"], "idle"]
    assert log == ["wait", "stream", *captured, *launched, *replayed, "end of stream", "drain"]
    assert len(written) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ops", "group_norm"), "unknown op 'group_norm' in --ops; valid: add_crms_norm"),
        (("--passes", "sideways"), "unknown pass 'sideways' in --passes; valid: backward, forward"),
        (("--dtypes", "int8"), "unknown dtype 'int8' in --dtypes; valid: bfloat16, float16, float32"),
        (("--rivals", "apex"), "unknown rival 'apex' in --rivals; valid: cudnn, eager"),
        (("--shapes", "4096"), "--shapes takes ROWSxWIDTH, such as 4096x768, with widths from 16 on, not '4096'"),
        (("--shapes", "0x8"), "not '0x8'"),
        (("--shapes", "8x15"), "widths from 16 on, not '8x15'"),
        (("--shapes", ""), "nothing to compare"),
        (("--rounds", "1"), "--rounds must be 2 or more"),
        (("--device", "abacus"), "--device abacus: torch knows no such device"),
        (("--device", "cpu"), "kernels are timed on CUDA only; --check only compares"),
        (("--device", "cpu", "--check"), "--device cpu: set TRITON_INTERPRET=1"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = () if "--device" in arguments else ("--device", "cpu", "--check")
    if arguments[0] == "--rivals":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as exit:
        main(["bench", "kernels", *device, *arguments, "--output", str(tmp_path)])
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "kernels", "--output", str(tmp_path)])
    assert exit.value.code == 2 and "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device takes no device without a number."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda", "cuda:1"):
        command.use(device)
    assert chosen == [1]


def test_options_in_front_of_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--device", "cpu", "kernels", "--check"])
    assert exit.value.code == 2 and "after its name" in capsys.readouterr().err


def test_the_default_run_is_short() -> None:
    """A cell is estimated at five seconds, of compiling."""
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    cells = kernels._cells(parser.parse_args([]))
    assert len(cells) == len(set(cells)) <= 60
    assert {c.op for c in cells} == set(OPS) and {c.rows for c in cells} >= {1, 16, 131072}
    assert {c.width for c in cells} >= {127, 192, 768, 1023, 1024, 4096, 5120, 8192, 12288, 32768, 65536}


def test_exact_results_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("forward", "backward"):
        cell = Cell("add_layer_norm", task, "float32", 10, 8, "cpu")
        inputs = Inputs.of(cell)
        whole = exact(cell, inputs)
        with monkeypatch.context() as patch:
            patch.setattr("normfx.bench.norms.EXACT_ENTRIES", 24)
            pieces = exact(cell, inputs)
        torch.testing.assert_close(pieces, whole)
        assert not wrong(cell, errors(cell, inputs, [t.float() for t in pieces], whole))
        assert wrong(cell, errors(cell, inputs, [1.001 * t.float() for t in pieces], whole))
