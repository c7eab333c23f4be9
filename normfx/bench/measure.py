"""One cell of the benchmark: a model in one dtype, batch size and task, run by every variant."""

from __future__ import annotations

import copy
import math
import multiprocessing
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfx.bench import command
from normfx.bench.clock import Call, Captured, captured
from normfx.bench.engines import LARGEST_ERROR, Engine, Skipped
from normfx.bench.floor import floor_ms
from normfx.bench.models import DTYPES, make
from normfx.bench.timing import Quartiles, interleaved, relative_error, seconds, speeds
from normfx.compat.inductor import config as inductor_config
from normfx.rules import crms_norm

BASE = "inductor"
TASKS = ("forward", "training")
TURN = 0.010  # seconds of a variant's turn in a round: shorter ones measure the clock and the scheduler
ROUNDS = 15
MOST_ROUNDS, ROUNDS_TIME = 60, 3.0  # short calls get more rounds, while they fit into these seconds
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Variant:
    """A backend of torch.compile (None: eager) and its options; `trains` where a training step is among its uses.

    asked: measured only when it is asked for
    mode:  of torch.compile, which takes no options with it
    engine: another inference engine that runs the module (engines.py)
    """

    backend: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True
    asked: bool = False
    mode: str | None = None
    engine: str = ""

    @property
    def replays(self) -> bool:
        """Whether its calls replay CUDA graphs of their own, so that none can be captured of them."""
        return (self.mode or self.options.get("mode")) in ("reduce-overhead", "max-autotune")

    def compile(self, model: nn.Module, name: str) -> Callable[..., Tensor]:
        if self.engine:
            return Engine(self.engine, model)
        if self.backend is None:
            return model

        def call(*inputs: Tensor) -> Tensor:
            result: Tensor = model(*inputs)
            return result

        # Dynamo keeps what it compiled by code object: with its own, no variant counts towards another's limits
        code = call.__code__.replace(co_name=name)
        own = types.FunctionType(code, call.__globals__, name, None, call.__closure__)
        options = None if self.mode else dict(self.options)
        return torch.compile(own, backend=self.backend, mode=self.mode, options=options, fullgraph=True, dynamic=False)

    @contextmanager
    def compiling(self, cold: bool) -> Iterator[None]:
        """Around the first call. Dynamo takes parameters as constants only where the global setting says freezing."""
        freezing = bool(self.options.get("freezing"))
        with (
            inductor_config.patch(freezing=freezing, force_disable_caches=cold),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # what --cold asks for
            yield


_TRITON = {"strict": True, "lowering": "triton"}
_CRMS = {"strict": True, "rules": f"default,+{crms_norm.RULE.name}"}

# strict: a failure of normfx shall be a failure here, not the unchanged model's time
VARIANTS = {
    "eager": Variant(None),
    BASE: Variant("inductor"),
    "inductor-freezing": Variant("inductor", {"freezing": True}, trains=False),
    "normfx": Variant("normfx", {"strict": True}),
    "normfx-frozen": Variant("normfx", {"strict": True, "fold": "frozen"}, trains=False),
    "inductor-reduce-overhead": Variant("inductor", asked=True, mode="reduce-overhead"),
    "inductor-max-autotune": Variant("inductor", asked=True, mode="max-autotune"),
    "inductor-freezing-max-autotune": Variant(
        "inductor", {"freezing": True, "max_autotune": True}, trains=False, asked=True
    ),
    "normfx-reduce-overhead": Variant("normfx", {"strict": True, "mode": "reduce-overhead"}, asked=True),
    "normfx-max-autotune": Variant("normfx", {"strict": True, "mode": "max-autotune"}, asked=True),
    "normfx-triton": Variant("normfx", _TRITON, asked=True),
    "normfx-triton-reduce-overhead": Variant("normfx", {**_TRITON, "mode": "reduce-overhead"}, asked=True),
    "openvino": Variant(None, trains=False, asked=True, engine="openvino"),
    "onnxruntime": Variant(None, trains=False, asked=True, engine="onnxruntime"),
    "normfx-no-rules": Variant("normfx", {"strict": True, "rules": "none"}, asked=True),
    "normfx-cached": Variant("normfx", {"strict": True, "fold": "cached"}, asked=True),
    "normfx-cached-reduce-overhead": Variant(
        "normfx", {"strict": True, "fold": "cached", "mode": "reduce-overhead"}, asked=True
    ),
    "normfx-no-kernels": Variant("normfx", {"strict": True, "lowering": "inductor"}, asked=True),
    "normfx-live": Variant("normfx", {"strict": True, "fold": "live"}, asked=True),
    "normfx-crms": Variant("normfx", _CRMS, asked=True),
    "normfx-crms-drop": Variant("normfx", {**_CRMS, "crms_basis": "drop"}, asked=True),
    "normfx-crms-padded": Variant("normfx", {**_CRMS, "crms_width": "padded"}, asked=True),
    "normfx-crms-live": Variant("normfx", {**_CRMS, "fold": "live"}, asked=True),
    "normfx-crms-drop-live": Variant("normfx", {**_CRMS, "crms_basis": "drop", "fold": "live"}, asked=True),
    "normfx-crms-padded-live": Variant("normfx", {**_CRMS, "crms_width": "padded", "fold": "live"}, asked=True),
}


@dataclass(frozen=True)
class Cell:
    model: str
    dtype: str
    batch: int
    task: str
    device: str

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} batch {self.batch} {self.task}"


@dataclass(frozen=True)
class Settings:
    """rounds: None for 15, or more where calls are short; cold: compile without caches; memory: peaks too; base: the
    variant that all ratios are to; graphs: replays of captured CUDA graphs too; floor: the time of products alone."""

    rounds: int | None = None
    cold: bool = False
    memory: bool = False
    threads: int | None = None
    base: str = BASE
    graphs: bool = False
    floor: bool = False

    def apply(self, device: str) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        command.use(device)


@dataclass
class Result:
    """What one variant did in one cell.

    ms:            milliseconds of a call
    speed:         how many times as fast as the base, from ratios within rounds; None where that failed
    extra_us:      microseconds more than the base, from differences within rounds
    error:         relative to float64, of the output (forward) or of all gradients as one vector (training)
    first_call_s:  seconds of the first call: compiling
    peak_mb:       peak of memory in megabytes (10⁶ bytes) during calls after the first, see `peak_memory`
    rounds, calls: how often it was timed, and with how many calls a time
    graph_ms:      milliseconds of a replay of the call's CUDA graph: the kernels alone
    graph_speed:   how many times as fast as the base's replay, from ratios within rounds
    """

    ms: Quartiles
    speed: Quartiles | None
    extra_us: Quartiles | None
    error: float
    first_call_s: float
    rounds: int
    calls: int
    peak_mb: float | None = None
    graph_ms: Quartiles | None = None
    graph_speed: Quartiles | None = None


@dataclass
class Measured:
    """A cell's results by variant; failures by variant (or "cell", "… memory", "… graph") as text.

    skipped:  variants that cannot take part, and why
    floor_ms: milliseconds of the products alone, see floor.py
    """

    cell: Cell
    results: dict[str, Result] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    floor_ms: float | None = None


class _Loss(nn.Module):
    """Mean square of the output times fixed random numbers: a plain sum of a normalised output has no gradient.

    The numbers are float32 while the model may be bfloat16, so that the loss is float32 by promotion.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            output = model(*inputs)
        self.register_buffer("numbers", torch.randn(output.shape, device=output.device))

    def forward(self, *inputs: Tensor) -> Tensor:
        loss: Tensor = (self.model(*inputs) * self.numbers).square().mean()
        return loss


@dataclass(frozen=True)
class _Step:
    """The call that is timed: `function`, which is the model or made of it; in training with its backward."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    training: bool
    function: Callable[..., Tensor]

    @classmethod
    def of(cls, cell: Cell) -> _Step:
        model, inputs = make(cell.model, cell.dtype, cell.batch, cell.device)
        training = cell.task == "training"
        model = _Loss(model, inputs) if training else model
        return cls(model, inputs, training, model)

    def double(self) -> _Step:
        model = copy.deepcopy(self.model).double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self.inputs)
        return _Step(model, inputs, self.training, model)

    def compiled(self, name: str) -> _Step:
        """The variant's step, on its own copy of the model."""
        model = copy.deepcopy(self.model)
        return _Step(model, self.inputs, self.training, VARIANTS[name].compile(model, name.replace("-", "_")))

    def __call__(self) -> Tensor:
        if self.training:
            self.model.zero_grad(set_to_none=True)
        output = self.function(*self.inputs)
        if self.training:
            torch.autograd.backward(output)
        return output

    def outcome(self) -> list[Tensor]:
        """What is compared with float64: the output, or the gradients of one step."""
        output = self()
        return [p.grad for p in self.model.parameters() if p.grad is not None] if self.training else [output]


def measure(
    cell: Cell,
    variants: Sequence[str],
    settings: Settings,
    say: Callable[[str], None],
    capture: Callable[[Call, str], Captured] = captured,
) -> Measured:
    """All results of a cell. A variant that fails is noted, and the others go on."""
    torch.compiler.reset()
    measured = Measured(cell)
    steps: dict[str, _Step] = {}
    replays: dict[str, Callable[[], object]] = {}
    first, errors, peaks = dict[str, float](), dict[str, float](), dict[str, float]()
    with torch.set_grad_enabled(cell.task == "training"):
        eager = _Step.of(cell)
        say("float64")
        exact = eager.double().outcome()
        if settings.floor:
            measured.floor_ms = floor_ms(eager, DTYPES[cell.dtype], cell.device)
        for name in variants:
            say(f"compiling {name}")
            try:
                step = eager.compiled(name)
                with VARIANTS[name].compiling(settings.cold):
                    first[name] = seconds(step, device=cell.device)
                errors[name] = relative_error(step.outcome(), exact)
                if VARIANTS[name].engine and not errors[name] <= LARGEST_ERROR[DTYPES[cell.dtype]]:
                    raise RuntimeError(f"wrong: off by {errors[name]:.1e}, relative to float64")
                steps[name] = step
            except Skipped as reason:
                measured.skipped[name] = str(reason)
            except Exception as error:
                measured.failures[name] = failure_text(error)
        for name in (n for n in steps if settings.graphs and not VARIANTS[n].replays):
            say(f"capturing {name}")
            try:
                replays[name] = _replay(steps[name], exact, errors[name], cell.device, capture)
            except Exception as error:
                measured.failures[f"{name} graph"] = failure_text(error)
        del exact
        say("timing")
        times, repeats = _times(steps, settings.rounds, cell.device)
        graphs, _ = _times(replays, settings.rounds, cell.device)
    for name in steps if settings.memory else ():
        say(f"memory of {name}")
        try:
            peaks[name] = peak_memory(cell, name, settings)
        except Exception as error:
            measured.failures[f"{name} memory"] = failure_text(error)
    base, base_graph = times.get(settings.base), graphs.get(settings.base)
    for name, own in times.items():
        measured.results[name] = Result(
            ms=Quartiles.of([1e3 * t for t in own]),
            speed=speeds(base, own) if base else None,
            extra_us=Quartiles.of([1e6 * (t - b) for t, b in zip(own, base, strict=True)]) if base else None,
            error=errors[name],
            first_call_s=first[name],
            rounds=len(own),
            calls=repeats[name],
            peak_mb=peaks.get(name),
            graph_ms=Quartiles.of([1e3 * t for t in graphs[name]]) if name in graphs else None,
            graph_speed=speeds(base_graph, graphs[name]) if base_graph and name in graphs else None,
        )
    return measured


def _replay(
    step: _Step, exact: list[Tensor], error: float, device: str, capture: Callable[[Call, str], Captured]
) -> Callable[[], object]:
    """A replay of the step's CUDA graph, whose results were compared. Raises RuntimeError where they are wrong."""
    replay, written = capture(lambda: tuple(step.outcome()), device)
    with torch.no_grad():
        for tensor in written:
            tensor.fill_(torch.nan)
    replay()
    found = relative_error(written, exact)
    if not found <= 2 * error:  # NaN is not
        raise RuntimeError(f"wrong: a replay is off by {found:.1e}, a call by {error:.1e}")
    return replay


def _times(
    steps: Mapping[str, Callable[[], object]], rounds: int | None, device: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of a call by variant and round, and how many calls a turn had; after a round that is not counted."""
    if not steps:
        return {}, {}
    once = {name: min(seconds(step, device=device) for _ in range(3)) for name, step in steps.items()}
    repeats = {name: max(1, math.ceil(TURN / t)) for name, t in once.items()}
    whole = sum(repeats[name] * t for name, t in once.items())
    interleaved(steps, 1, repeats, device)
    rounds = rounds or min(MOST_ROUNDS, max(ROUNDS, int(ROUNDS_TIME / whole)))
    return interleaved(steps, rounds, repeats, device), repeats


def peak_memory(cell: Cell, variant: str, settings: Settings) -> float:
    """Peak in megabytes during three calls after the first, in a process of the variant's own.

    On the CPU of the resident memory of the process, with torch in it and what compiling left; on CUDA of what torch
    allocated, the model included.
    """
    # a spawned process: forked ones share this one's pages, and CUDA does not survive a fork
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, cell, variant, settings).result()


def _peak_memory(cell: Cell, variant: str, settings: Settings) -> float:
    settings.apply(cell.device)
    with torch.set_grad_enabled(cell.task == "training"):
        step = _Step.of(cell)
        if variant != "eager":
            step = step.compiled(variant)
        with VARIANTS[variant].compiling(cold=False):
            step()
        return _peak(step, torch.device(cell.device))


def _peak(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # the peak starts again at what is resident now
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # not getrusage's ru_maxrss: a process inherits it from the one that started it, which here is larger
    (line,) = [x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def failure_text(error: Exception) -> str:
    """Kind of error and its message on one line; of a long one (a C++ compiler's) the lines that say "error:"."""
    inner = getattr(error, "inner_exception", error)  # what Dynamo wrapped
    text = str(inner)
    if len(text) > 500:
        text = "\n".join(line for line in text.splitlines() if "error:" in line) or text
    return f"{type(inner).__name__}: {' '.join(text.split())[:500]}"
