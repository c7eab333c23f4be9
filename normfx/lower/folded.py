"""A rewritten graph and its kept folds → callable.

kept:   the folds are inputs of the compiled graph, checked and refreshed at each call (weights/store.py)
frozen: beside it a second variant in which all parameters are constants, so that Inductor prepacks weights and folds
        constants. It runs only while every parameter is what it was; when one changed, the kept variant takes over
        in that very call, and the frozen one is built again once the parameters have been stable for a while.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.codecache import PyCodeCache
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node

from normfx.errors import NormfxWarning, StageError, stage_warning
from normfx.ir.aliasing import mutated
from normfx.ir.regions import attribute
from normfx.lower.gemm import packing
from normfx.lower.inductor import compile_graph
from normfx.rewrite import feed
from normfx.weights.kept import Kept, is_plain, records_gradients
from normfx.weights.probe import start_native_library
from normfx.weights.store import Fold, Folds, Seen, Watch, picker

REFREEZE_AFTER = 64
"""Calls with unchanged parameters before the frozen variant is built again; doubled each time."""


def is_frozen(fold: str, patches: Mapping[str, Any]) -> bool:
    """Whether a frozen variant is wanted: asked for, or by Inductor's freezing; never where gradients are recorded."""
    wanted = fold == "frozen" or (fold == "auto" and patches.get("freezing", inductor_config.freezing))
    return bool(wanted) and not torch.is_grad_enabled()


class Compiled:
    """A compiled graph, with what became of its folded weights."""

    def __init__(self, call: Callable[..., Any], folds: Folds | None = None, frozen: Frozen | None = None) -> None:
        self._call, self._folds, self._frozen = call, folds, frozen

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def folding(self) -> dict[str, Any]:
        """variants: "live", "cached", "frozen", those that exist; bytes: of one parameter set's kept folds;
        parameter_sets; refreshes: values computed so far; freezes: times the frozen variant was built."""
        folds, frozen = self._folds, self._frozen
        return {
            "variants": ("cached" if folds else "live", *(["frozen"] if frozen and frozen.frozen else [])),
            "bytes": folds.bytes if folds else 0,
            "parameter_sets": folds.parameter_sets if folds else 0,
            "refreshes": folds.refreshes if folds else 0,
            "freezes": frozen.freezes if frozen else 0,
        }


def compile_folded(
    gm: GraphModule,
    folding: Folding | None,
    example_inputs: Sequence[Any],
    constants: frozenset[Node] | None,
    patches: Mapping[str, Any],
    strict: bool = False,
) -> Compiled:
    """Compile a graph with its folds kept (`folding`, of this graph), or live.

    constants: parameters, buffers and constants of the graph, for a frozen variant beside it; None: no such variant
    strict:    a frozen variant that cannot be built raises, in place of a warning
    """
    template = None if constants is None else FrozenTemplate(gm, folding, constants, patches)
    if template is not None:
        patches = {**patches, "freezing": False}
    call = compile_kept(folding, example_inputs, patches) if folding else compile_graph(gm, example_inputs, patches)
    frozen = Frozen(template, call, example_inputs, strict) if template else None
    return Compiled(frozen or call, folding.folds if folding else None, frozen)


@dataclass(frozen=True, eq=False)
class Folding:
    """A graph whose kept folds are inputs, at the end; `folds` computes them from the other inputs and `attributes`."""

    graph_module: GraphModule
    folds: Folds
    inputs: tuple[Node, ...]
    attributes: tuple[torch.Tensor, ...]


def hoist(gm: GraphModule, kept: Sequence[Kept]) -> Folding | None:
    """Make inputs of the kept values of a graph, in place; None when there are none."""
    if not kept:
        return None
    start_native_library()
    placeholders = gm.graph.find_nodes(op="placeholder")
    sources = list(dict.fromkeys(node for item in kept for node in item.sources))
    held = [node for node in sources if node.op == "get_attr"]
    attributes = tuple(attribute(gm, str(node.target)) for node in held)
    place = {node: i for i, node in enumerate([*placeholders, *held])}
    order = {node: i for i, node in enumerate(sources)}
    rebinds = records_gradients(gm.graph)
    inputs = feed(gm, [item.node for item in kept], "normfx_fold")
    folds = [
        _fold(item, tuple(order[n] for n in item.sources), node.meta["val"])
        for item, node in zip(kept, inputs, strict=True)
    ]
    return Folding(gm, Folds(folds, [place[n] for n in sources], rebinds), inputs, attributes)


def _fold(kept: Kept, sources: tuple[int, ...], fake: torch.Tensor) -> Fold:
    return Fold(kept.expression, sources, tuple(fake.shape), fake.stride(), fake.dtype, fake.device)


def compile_kept(folding: Folding, example_inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile the graph with its folds as static inputs, true to the arguments of each call."""
    fakes = [node.meta["val"] for node in folding.inputs]
    return fed(compile_graph(folding.graph_module, [*example_inputs, *fakes], patches), folding)


def fed(call: Callable[..., Any], folding: Folding) -> Callable[..., Any]:
    """What runs the graph, given only the arguments it had before folds became inputs."""
    values, attributes = folding.folds.values, folding.attributes
    if attributes:
        return lambda *args: call(*args, *values((*args, *attributes)))
    return lambda *args: call(*args, *values(args))


class FrozenTemplate:
    """Builds the frozen variant of a graph. `weights`: its parameters, buffers and constants."""

    def __init__(
        self, gm: GraphModule, folding: Folding | None, weights: Iterable[Node], patches: Mapping[str, Any]
    ) -> None:
        self.gm, self.folding, self.patches = with_constants(gm, {}), folding, {**patches, "freezing": True}
        inputs = gm.graph.find_nodes(op="placeholder")
        fed = set(folding.inputs) if folding else set()
        written = mutated(gm.graph)
        constants = [n for n in weights if n not in written and is_plain(n)]
        place = {node: i for i, node in enumerate(inputs)}
        self.names = [node.name for node in constants if node.op == "placeholder"]
        self.picks = [place[node] for node in constants if node.op == "placeholder"]
        self.attributes = [attribute(gm, str(node.target)) for node in constants if node.op == "get_attr"]
        frozen = {*self.picks, *(place[n] for n in fed)}
        self.kept_inputs = [i for i in range(len(inputs)) if i not in frozen]
        self.static = not any(isinstance(node.meta.get("val"), torch.SymInt) for node in inputs)

    def build(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        """Compile with the parameters among these arguments as constants."""
        values = dict(zip(self.names, (arguments[i] for i in self.picks), strict=True))
        if self.folding is not None:
            folds = self.folding.folds.values((*arguments, *self.folding.attributes))
            values.update(zip((n.name for n in self.folding.inputs), folds, strict=True))
        gm = with_constants(self.gm, values)
        # fakes of Dynamo's own symbols: a real input would bring new ones, and guards on them that cannot be checked
        rest = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        mode = detect_fake_mode(rest)
        loaded = len(PyCodeCache.modules)
        with tracing(TracingContext(mode)), torch.inference_mode(False), torch.no_grad(), packing():
            compiled = compile_graph(gm, rest, self.patches)
        _release_modules(loaded)
        return compiled


def _release_modules(loaded: int) -> None:
    """Let generated modules with constants, those behind the first `loaded`, live only as long as their code is in use.

    Inductor lists every module it generated for the life of the process, and frozen parameters are attributes of them.
    """
    for module in PyCodeCache.modules[loaded:]:
        if any(isinstance(held, torch.Tensor) for held in vars(module).values()):
            PyCodeCache.modules.remove(module)
            sys.modules.pop(module.__name__, None)


def with_constants(gm: GraphModule, values: Mapping[str, torch.Tensor]) -> GraphModule:
    """A copy of a graph module in which the inputs of these names are attributes holding these tensors."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    held = {str(node.target): attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.name in values:
            path = f"frozen_{node.name}"
            held[path] = values[node.name]
            copies[node] = graph.get_attr(path)
            copies[node].meta["val"] = node.meta["val"]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    result = GraphModule(held, graph)
    result.meta.update(gm.meta)
    return result


class Frozen:
    """Calls the frozen variant while the parameters are those it was made of, else the kept one."""

    def __init__(
        self, template: FrozenTemplate, kept: Callable[..., Any], example_inputs: Sequence[Any], strict: bool
    ) -> None:
        self.freezes = 0
        self._strict = strict
        self._template = template
        self._kept = kept
        self._lock = threading.Lock()
        self._pick = picker(template.picks)
        self._rest = picker(template.kept_inputs)
        self._patience = REFREEZE_AFTER
        self._calls = 0
        self._last: tuple[Watch, Seen] | None = None
        self._state: tuple[Watch, Callable[..., Any]] | None = None
        self._never = False
        self._freeze(example_inputs)

    @property
    def frozen(self) -> bool:
        """Whether the next call, with unchanged parameters, runs the frozen variant."""
        return self._state is not None

    def __call__(self, *args: Any) -> Any:
        state = self._state
        if state is not None:
            watch, compiled = state
            if watch.current(self._watched(args)):
                return compiled(*self._rest(args))
            with self._lock:
                self._thaw(watch, self._watched(args))
        elif not self._never:
            self._consider(args)
        return self._kept(*args)

    def _watched(self, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        return (*self._pick(arguments), *self._template.attributes)

    def _freeze(self, arguments: Sequence[Any]) -> None:
        """Build the frozen variant. What it reads is seen before it is read."""
        watched = self._watched(arguments)
        if any(isinstance(t, FakeTensor) or t.is_inference() for t in watched):
            self._never = True
            return
        try:
            watch = Watch(watched)
            seen = watch.read(watched)
            compiled = self._template.build(arguments)
        except Exception as error:
            if self._strict:
                raise StageError("freeze", error) from error
            warnings.warn(stage_warning("freeze", error), NormfxWarning, stacklevel=2)
            self._never = True
            return
        watch.accept(watched, seen)
        self._state = watch, compiled
        self.freezes += 1

    def _thaw(self, watch: Watch, watched: tuple[torch.Tensor, ...]) -> None:
        """Let go of the frozen variant: a parameter changed, or another set of parameters came."""
        if self._state is None or self._state[0] is not watch:
            return
        self._state = None
        self._last, self._calls = None, 0
        self._never = (not watch.same(watched) and not watch.expired) or not self._template.static

    def _consider(self, arguments: Sequence[Any]) -> None:
        """Freeze anew when nothing changed between two looks, `patience` calls apart."""
        self._calls += 1
        if self._calls < self._patience:
            return
        with self._lock:
            if self._state is not None or self._never or self._calls < self._patience:
                return
            self._calls = 0
            watched = self._watched(arguments)
            if self._last is not None and self._last[0].same(watched):
                watch, before = self._last
                self._last = watch, watch.read(watched)
                if before == self._last[1]:
                    self._patience *= 2
                    self._freeze(arguments)
                return
            self._never = self._last is not None and not self._last[0].expired
            watch = Watch(watched)
            self._last = watch, watch.read(watched)
