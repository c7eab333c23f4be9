"""A rewritten graph and its kept folds → callable.

kept:   the folds are inputs of the compiled graph, checked and refreshed at each call (weights/store.py)
frozen: next to it a second variant in which all parameters are constants, so that Inductor prepacks weights and folds
        constants. It runs only while every parameter is what it was; when one changed, the kept variant takes over
        in that very call, and the frozen one is built again once the parameters have been stable for a while.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from normfx.allocator import release_memory
from normfx.compat.inductor import config as inductor_config
from normfx.errors import NormfxWarning, StageError, stage_warning
from normfx.lower.affordable import Rooms
from normfx.lower.constants import FrozenTemplate
from normfx.lower.hoist import Folding, fed
from normfx.lower.inductor import compile_graph
from normfx.weights.budget import HELD
from normfx.weights.freed import read_by_live_folds, refusing_freed
from normfx.weights.samples import is_recording, wait_for
from normfx.weights.store import STORE, Folds, picker
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

    memory: Mapping[str, Any] = {}
    """What was found out about the budget when it was compiled: fields of records.FoldReport."""

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
        """The fields of records.FoldReport that change from call to call."""
        folds, frozen = self._folds, self._frozen
        return {
            "variants": ("cached" if folds else "live", *(["frozen"] if frozen and frozen.frozen else [])),
            "bytes": folds.bytes if folds else 0,
            "frozen_bytes": frozen.bytes if frozen else 0,
            "parameter_sets": folds.parameter_sets if folds else 0,
            "refreshes": folds.refreshes if folds else 0,
            "freezes": frozen.freezes if frozen else 0,
            "unkept": folds.unkept if folds else 0,
            "unfrozen": dict(frozen.left) if frozen else {},
            **self.memory,
        }


def compile_folded(
    gm: GraphModule,
    folding: Folding | None,
    example_inputs: Sequence[Any],
    constants: frozenset[Node] | None,
    patches: Mapping[str, Any],
    strict: bool = False,
    room: Rooms = lambda device: sys.maxsize,
    weights: frozenset[Node] = frozenset(),
) -> Compiled:
    """Compile a graph with its folds kept (`folding`, of this graph), or live.

    constants: parameters, buffers and constants of the graph, for a frozen variant next to it; None: no such variant
    strict:    a frozen variant that cannot be built raises, instead of a warning
    room:      bytes that the constants of a frozen variant may take, those of kept folds included
    weights:   parameters, buffers and constants of the graph, whose memory is asked for where a live fold reads it
    """
    read = read_by_live_folds(gm, weights)
    template = None if constants is None else FrozenTemplate(gm, folding, constants, patches, room)
    if template is not None:
        patches = {**patches, "freezing": False}
    call = compile_kept(folding, example_inputs, patches) if folding else compile_graph(gm, example_inputs, patches)
    call = refusing_freed(call, read)
    frozen = Frozen(template, call, example_inputs, strict) if template else None
    return Compiled(frozen or call, folding.folds if folding else None, frozen)


def compile_kept(folding: Folding, example_inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile the graph with its folds as static inputs, true to the arguments of each call."""
    fakes = [node.meta["val"] for node in folding.inputs]
    return fed(compile_graph(folding.graph_module, [*example_inputs, *fakes], patches), folding)


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

    @property
    def bytes(self) -> int:
        """Bytes of the constants of the frozen variant, if there is one now."""
        return sum(self._template.sizes.values()) if self.frozen else 0

    @property
    def left(self) -> Mapping[str, int]:
        """Names and bytes of the weights that are no constants, because they do not fit into the memory."""
        return self._template.left

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
            then = "the model runs without the frozen variant, by kept folds"
            warnings.warn(stage_warning("freeze", error, then), NormfxWarning, stacklevel=2)
            self._never = True
            return
        watch.accept(watched, stamps)
        watch.on_deleted = partial(_thaw_deleted, weakref.ref(self))
        self._variant = _Variant(watch, generation, call)
        HELD[self._variant] = self._template.sizes
        self.freezes += 1
        if not self._devices:  # elsewhere recorded graphs know the kept values by their addresses
            self._template.let_go()
            release_memory()

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
