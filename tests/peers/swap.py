"""A pytest plugin that sends what PyTorch's own tests compile to normfx instead of Inductor, and records the results.

Environment: PEERS_MODE is "peer" (the compiler alone), "normfx" or "forced" (the canonical graph is handed on even
where no rule applies); PEERS_COMPILER is what compiles the graph: "inductor", or a backend of Dynamo that is quicker,
such as "aot_eager"; PEERS_RESULTS is the file that gets a JSON line when a test starts and when it ends.

A test reaches Inductor by name, by `compile_fx`, names a backend that only runs or counts graphs, or has one of its own
that calls `aot_module_simplified`; all of these are replaced. Torch-private names: tried on torch 2.14.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import functorch.compile
import pytest
import torch
from torch._dynamo.backends import registry
from torch._dynamo.testing import CompileCounter
from torch._functorch import aot_autograd
from torch._guards import TracingContext
from torch._inductor import compile_fx as inductor

import normfx.backend
import normfx.lower.inductor
from normfx.errors import StageError

MODES = ("peer", "normfx", "forced")

NAMES = ("eager", "aot_eager", "aot_eager_decomp_partition")
"""Backends of Dynamo that compile nothing, which tests use to look at graphs."""

_compile_fx = inductor.compile_fx
_aot_module_simplified = aot_autograd.aot_module_simplified


class Swap:
    """Compiles the graphs of one test run; `plain` is the compiler that both sides share.

    graphs: how many were compiled so far
    """

    def __init__(self, mode: str, compiler: str) -> None:
        self.mode = mode
        self.given = None if compiler == "inductor" else registry.lookup_backend(compiler)
        self.inside = threading.local()
        self.graphs = 0

    def install(self) -> None:
        names = dict.fromkeys(NAMES, self.by_name)
        for name in names:
            registry.lookup_backend(name)  # torch loads them at the first look-up, over what was put there before
        registry._COMPILER_FNS.update(names)
        inductor.compile_fx = self.compile_fx
        aot_autograd.aot_module_simplified = functorch.compile.aot_module_simplified = self.aot_module_simplified
        normfx.lower.inductor.compile_fx = self.plain
        count = CompileCounter.__call__

        def counted(counter: Any, gm: Any, example_inputs: Any) -> Any:
            count(counter, gm, example_inputs)
            return self.swapped(gm, example_inputs)

        CompileCounter.__call__ = counted

    def by_name(self, gm: Any, example_inputs: Any, **_: object) -> Any:
        return self.swapped(gm, example_inputs)

    def compile_fx(self, gm: Any, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Inductor's entry: a graph of Dynamo's goes to the backend under test, everything else stays Inductor's."""
        ours = {"config_patches", "compile_region_name"}  # a name for profiles is all that the second one is
        simple = not args and set(kwargs) <= ours and isinstance(gm, torch.fx.GraphModule)
        if getattr(self.inside, "yes", False) or not simple or TracingContext.try_get() is None:
            return _compile_fx(gm, example_inputs, *args, **kwargs)
        return self.swapped(gm, example_inputs, kwargs.get("config_patches"))

    def aot_module_simplified(self, gm: Any, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """AOTAutograd, which a backend of a test's own calls with compilers of its own: these stay what compiles."""
        dynamo = isinstance(gm, torch.fx.GraphModule) and TracingContext.try_get() is not None
        if getattr(self.inside, "yes", False) or not dynamo:
            return _aot_module_simplified(gm, example_inputs, *args, **kwargs)
        self.inside.own = lambda gm, example_inputs: _aot_module_simplified(gm, example_inputs, *args, **kwargs)
        try:
            return self.swapped(gm, example_inputs)
        finally:
            self.inside.own = None

    def swapped(self, gm: Any, example_inputs: Sequence[Any], patches: Mapping[str, Any] | None = None) -> Any:
        self.graphs += 1
        if self.mode == "peer":
            return self.plain(gm, example_inputs, config_patches=patches)
        options = {"strict": True, "inductor": dict(patches or {})}
        if self.mode == "normfx":
            return normfx.backend.normfx(gm, example_inputs, options=options)
        with normfx.backend.forced():
            return normfx.backend.normfx(gm, example_inputs, options=options)

    def plain(self, gm: Any, example_inputs: Any, config_patches: Mapping[str, Any] | None = None) -> Any:
        given = getattr(self.inside, "own", None) or self.given
        before, self.inside.yes = getattr(self.inside, "yes", False), True
        try:
            if given is not None:
                return given(gm, example_inputs)
            return _compile_fx(gm, example_inputs, config_patches=config_patches or None)
        finally:
            self.inside.yes = before


# ---------------------------------------------------------------- what happened


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and each one that it came from or was raised for."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__


def described(error: BaseException) -> dict[str, str]:
    """What to sort a failure by: normfx's stage, if one failed, the kind of the exception and its first line."""
    chain = list(causes(error))
    stage = next((e for e in chain if isinstance(e, StageError)), None)
    deepest = stage.__cause__ if stage is not None and stage.__cause__ is not None else chain[0]
    text = str(deepest).strip().splitlines() or [""]
    where = str(stage).split("'")[1] if stage is not None else ""
    return {"stage": where, "kind": type(deepest).__name__, "text": text[0][:300]}


class Record:
    """Writes a line when a test starts and one when it has ended: where a process dies, the test is known."""

    def __init__(self, path: str, swap: Swap) -> None:
        self.path, self.swap = path, swap

    def write(self, **line: object) -> None:
        with open(self.path, "a") as file:
            print(json.dumps(line), file=file)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(event="collected", ids=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.swap.graphs = 0
        self.write(event="start", id=nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        outcome: Any = yield
        report = outcome.get_result()
        if report.when != "call" and report.outcome == "passed":
            return
        failure = described(call.excinfo.value) if report.outcome == "failed" and call.excinfo else {}
        took = {"seconds": round(call.duration, 2), "graphs": self.swap.graphs}
        self.write(event="end", id=item.nodeid, outcome=report.outcome, **took, **failure)


def pytest_configure(config: pytest.Config) -> None:
    mode = os.environ["PEERS_MODE"]
    if mode not in MODES:
        raise pytest.UsageError(f"PEERS_MODE is {mode!r}; valid: {', '.join(MODES)}")
    # after the installed packages: a folder of tests may be named like one of them
    sys.path += [str(config.rootpath), str(config.rootpath / "functorch")]
    swap = Swap(mode, os.environ["PEERS_COMPILER"])
    swap.install()
    config.pluginmanager.register(Record(os.environ["PEERS_RESULTS"], swap), "peers-record")
