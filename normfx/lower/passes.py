"""Passes that run on a graph of Inductor's after all of its own ones."""

from __future__ import annotations

import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch.fx import Graph

from normfx.compat.inductor import CustomGraphPass
from normfx.compat.inductor import config as inductor_config

HOOK = "post_grad_custom_post_pass"
"""Inductor's place for such a pass."""


def setting(patches: Mapping[str, Any], name: str) -> Any:
    """Return the value that a setting of Inductor has under config patches."""
    return patches[name] if name in patches else getattr(inductor_config, name)


class LastPass(CustomGraphPass):
    """A pass that runs after others.

    first: a pass, or several, that run before this one
    """

    def __init__(self, first: Any = None) -> None:
        self.first = tuple(first) if isinstance(first, (list, tuple)) else (first,) if first is not None else ()

    @abstractmethod
    def change(self, graph: Graph) -> None:
        """Change the graph, in place."""

    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Return everything that decides what the pass does."""

    def __call__(self, graph: Graph) -> None:
        for run in self.first:
            run(graph)
        self.change(graph)

    def uuid(self) -> Any:
        """Return what Inductor's caches know the pass by; None, as a user's pass may answer, switches them off."""
        others = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.first]
        return None if None in others else (*self.key(), *others)


def digest(*modules: ModuleType | None) -> str:
    """Return a digest of the modules' sources: what tells one version of a pass from another."""
    return hashlib.sha256("".join(inspect.getsource(module) for module in modules if module).encode()).hexdigest()


def hinted(size: Any) -> int | None:
    """A size, or the one that a symbol had when the graph was traced."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None
