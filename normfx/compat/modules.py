"""Modules, compiled ones and those of a graph, and exported programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule, Node


def original(model: Any) -> Any:
    """The model that torch.compile was given; any other one as it is."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def uncompiled(model: Callable[..., Any]) -> Iterator[None]:
    """A module runs its own forward meanwhile, not what `module.compile()` made of it."""
    compiled = getattr(model, "_compiled_call_impl", None)
    if not isinstance(model, torch.nn.Module) or compiled is None:
        yield
        return
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The parameters and buffers of a module itself, also those that other modules share."""
    yield from module._parameters.items()
    yield from module._buffers.items()


def drop_tensors(module: torch.nn.Module) -> None:
    """A module holds no parameters or buffers of its own any more."""
    module._parameters.clear()
    module._buffers.clear()


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def take_hooks(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """A module that takes the place of another one calls its hooks of forward and backward. Those of state dicts know
    the module that they were made for."""
    vars(module).update({name: vars(other)[name] for name in _HOOKS if name in vars(other)})


def rename(node: Node, name: str) -> None:
    """Give a node a name that no other one of its graph has."""
    node._rename(name)


def with_graph(
    program: ExportedProgram,
    gm: GraphModule,
    signature: ExportGraphSignature,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> ExportedProgram:
    """The exported program with another graph, and its parameters and buffers or others."""
    return program._update(gm, signature, state_dict=None if state_dict is None else dict(state_dict))
