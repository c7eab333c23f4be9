"""A rewritten graph and its kept folds → callable.

kept:   the folds are inputs of the compiled graph, checked and refreshed at each call (weights/store.py)
frozen: beside it a second variant in which all parameters are constants, so that Inductor prepacks weights and folds
        constants. It runs only while every parameter is what it was; when one changed, the kept variant takes over
        in that very call, and the frozen one is built again once the parameters have been stable for a while.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.codecache import PyCodeCache
from torch.fx import Graph, GraphModule, Node

from normfx.errors import NormfxWarning, StageError, stage_warning
from normfx.ir.aliasing import mutated
from normfx.ir.cleanup import drop_dead_code
from normfx.ir.regions import attribute
from normfx.lower.gemm import packing
from normfx.lower.inductor import compile_graph
from normfx.weights.kept import Kept, is_plain, records_gradients
from normfx.weights.samples import is_recording, wait_for
from normfx.weights.store import STORE, Fold, Folds, picker
from normfx.weights.watch import Stamp, Watch, identity, is_ordinary

REFREEZE_AFTER = 64
"""Calls with unchanged parameters before the frozen variant is built again; doubled each time."""


def is_frozen(fold: str, patches: Mapping[str, Any]) -> bool:
    """Whether a frozen variant is wanted: asked for, or by Inductor's freezing; never where gradients are recorded."""
    wanted = fold == "frozen" or (fold == "auto" and patches.get("freezing", inductor_config.freezing))
    return bool(wanted) and not torch.is_grad_enabled()


class Compiled:
    """A compiled graph, with what became of its folded weights."""

    note = ""
    """Added to every exception that a call raises."""

    def __init__(self, call: Callable[..., Any], folds: Folds | None = None, frozen: Frozen | None = None) -> None:
        self._call, self._folds, self._frozen = call, folds, frozen

    def __call__(self, *args: Any) -> Any:
        try:
            return self._call(*args)
        except Exception as error:
            if self.note and self.note not in getattr(error, "__notes__", ()):
                error.add_note(self.note)
            raise

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
    placeholders = gm.graph.find_nodes(op="placeholder")
    sources = list(dict.fromkeys(node for item in kept for node in item.sources))
    held = [node for node in sources if node.op == "get_attr"]
    attributes = tuple(attribute(gm, str(node.target)) for node in held)
    place = {node: i for i, node in enumerate([*placeholders, *held])}
    order = {node: i for i, node in enumerate(sources)}
    rebinds = records_gradients(gm.graph)
    inputs = _feed(gm, [item.node for item in kept], "normfx_fold")
    folds = [
        _fold(item, tuple(order[n] for n in item.sources), node.meta["val"])
        for item, node in zip(kept, inputs, strict=True)
    ]
    return Folding(gm, Folds(folds, [place[n] for n in sources], rebinds), inputs, attributes)


def _feed(gm: GraphModule, nodes: Sequence[Node], prefix: str) -> tuple[Node, ...]:
    """Replace values of a graph, in place, by new inputs after the old ones: the caller computes them.

    The inputs are marked static, as Dynamo marks parameters: their memory does not move from call to call.
    """
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1:]
    inputs: list[Node] = []
    for i, node in enumerate(nodes):
        where = gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
        with where:
            new = gm.graph.placeholder(f"{prefix}_{i}")
        new.meta["val"] = _detached(node.meta["val"])
        new.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        node.replace_all_uses_with(new)
        inputs.append(new)
        last = [new]
    drop_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return tuple(inputs)


def _detached(fake: Any) -> torch.Tensor:
    """A fake like this one, without history, that is not a view."""
    with fake.fake_mode, torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


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
        """Compile with copies of the parameters among these arguments as constants: a variant keeps no model alive."""
        values = dict(zip(self.names, _copies([arguments[i] for i in self.picks]), strict=True))
        if self.folding is not None:
            folds = self.folding.folds.values((*arguments, *self.folding.attributes))
            values.update(zip((n.name for n in self.folding.inputs), folds, strict=True))
        gm = with_constants(self.gm, values)
        # fakes of Dynamo's own symbols: a real input would bring new ones, and guards on them that cannot be checked
        rest = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        mode = detect_fake_mode(rest)
        loaded = len(PyCodeCache.modules)
        packed = packing() if any(t.device.type == "cpu" for t in values.values()) else nullcontext()
        with tracing(TracingContext(mode)), torch.inference_mode(False), torch.no_grad(), packed:
            compiled = compile_graph(gm, rest, self.patches)
        _release_modules(loaded)
        return compiled


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the same strides; tensors that are the same stay the same."""
    made: dict[Any, torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for t in tensors:
            if identity(t) not in made:
                empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                made[identity(t)] = empty.copy_(t)
    return [made[identity(t)] for t in tensors]


def _release_modules(loaded: int) -> None:
    """Let generated modules with constants, those after the first `loaded`, live only as long as their code is in use.

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


@dataclass(frozen=True, eq=False)
class _Variant:
    """A frozen variant, and what it was made of."""

    watch: Watch
    generation: int
    call: Callable[..., Any]

    def current(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self.generation == STORE.generation and not self.watch.changed(tensors)


class Frozen:
    """Calls the frozen variant while the parameters are those it was made of, else the kept one."""

    def __init__(
        self, template: FrozenTemplate, kept: Callable[..., Any], example_inputs: Sequence[Any], strict: bool
    ) -> None:
        self.freezes = 0
        self._strict = strict
        self._template = template
        self._kept = kept
        self._pick = picker(template.picks)
        self._rest = picker(template.kept_inputs)
        self._patience = REFREEZE_AFTER
        self._calls = 0
        self._last: tuple[Watch, list[Stamp]] | None = None
        self._variant: _Variant | None = None
        self._never = False
        self._building = False
        self._devices = {t.device for t in self._watched(example_inputs) if t.device.type != "cpu"}
        self._freeze(example_inputs)

    @property
    def frozen(self) -> bool:
        """Whether the next call, with unchanged parameters, runs the frozen variant."""
        return self._variant is not None

    def __call__(self, *args: Any) -> Any:
        variant = self._variant
        if self._devices and is_recording():
            return self._kept(*args)
        if variant is not None:
            if variant.current(self._watched(args)):
                return variant.call(*self._rest(args))
            self._thaw(variant, self._watched(args))
        elif not self._never:
            self._consider(args)
        return self._kept(*args)

    def _watched(self, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        return (*self._pick(arguments), *self._template.attributes)

    def _freeze(self, arguments: Sequence[Any]) -> None:
        """Build the frozen variant. What it reads is seen before it is read."""
        watched = self._watched(arguments)
        watch = Watch(watched) if all(map(is_ordinary, watched)) else None
        if watch is None or not watch.trackable:
            self._never = True
            return
        try:
            generation, stamps = STORE.generation, watch.read(watched)
            call = self._template.build(arguments)
            wait_for(self._devices)  # the next call may be on another stream
        except Exception as error:
            if self._strict:
                raise StageError("freeze", error) from error
            warnings.warn(stage_warning("freeze", error), NormfxWarning, stacklevel=2)
            self._never = True
            return
        watch.accept(watched, stamps)
        watch.on_deleted = partial(_thaw_deleted, weakref.ref(self))
        self._variant = _Variant(watch, generation, call)
        self.freezes += 1

    def _thaw(self, variant: _Variant, watched: tuple[torch.Tensor, ...]) -> None:
        """Let go of the frozen variant: a parameter changed, or another set of parameters came."""
        if not all(map(is_ordinary, watched)):
            return  # someone looks at shapes alone; the parameters may be as they were
        with STORE.lock:
            if self._variant is not variant:
                return
            self.let_go()
            others = variant.watch.identities != tuple(map(identity, watched)) and not variant.watch.expired
            self._never = others or not self._template.static

    def let_go(self) -> None:
        """Drop the frozen variant, and the memory of its constants."""
        self._variant, self._last, self._calls = None, None, 0

    def _consider(self, arguments: Sequence[Any]) -> None:
        """Freeze again when nothing changed between two looks, `patience` calls apart."""
        self._calls += 1
        watched = self._watched(arguments)
        if self._calls < self._patience or not all(map(is_ordinary, watched)):
            return
        with STORE.lock:
            if self._variant is not None or self._never or self._building or self._calls < self._patience:
                return
            self._calls = 0
            self._building = self._is_stable(watched)
        if self._building:
            try:
                self._freeze(arguments)  # not under the lock: it takes as long as a compilation
            finally:
                self._building = False

    def _is_stable(self, watched: tuple[torch.Tensor, ...]) -> bool:
        """Whether the parameters are those of the last look, unchanged. This becomes the last look."""
        if self._last is not None and self._last[0].identities == tuple(map(identity, watched)):
            watch, before = self._last
            stamps = watch.read(watched)
            self._last = watch, stamps
            if before == stamps:
                self._patience *= 2
            return before == stamps
        self._never = self._last is not None and not self._last[0].expired
        watch = Watch(watched)
        self._last = watch, watch.read(watched)
        return False


def _thaw_deleted(frozen: weakref.ref[Frozen]) -> None:
    """The model is gone: its constants go too."""
    found = frozen()
    if found is not None:
        found.let_go()
