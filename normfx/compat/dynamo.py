"""Dynamo: its errors, what it records of compilations and inputs, its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import config as _config
from torch._dynamo import exc, utils
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import (
    ConstantSource,
    is_from_unspecialized_nn_module_source,
    is_from_unspecialized_param_buffer_source,
)
from torch._dynamo.symbolic_convert import TensorifyState
from torch._functorch import config as aot_config
from torch._guards import CompileContext
from torch.fx import GraphModule, Node

__all__ = [
    "ConstantSource",
    "TensorifyScalarRestartAnalysis",
    "TensorifyState",
    "aot_config",
    "exc",
    "is_from_unspecialized_nn_module_source",
    "is_from_unspecialized_param_buffer_source",
]

config: Any = _config
compilation_metrics: Callable[[], Any] = utils.get_compilation_metrics

STEERING: Any = exc.exceptions_allowed_to_be_fallback
"""Exceptions of a backend with which torch steers Dynamo."""

SHORTENS: Any = getattr(exc, "ShortenTraceback", None)
"""The base of errors that Dynamo hands on as they are, without its own frames; None where torch has none."""


def compile_id() -> str:
    """Dynamo's id of the compilation that is going on, "2/1"; "" outside of one."""
    return str(CompileContext.current_compile_id() or "")


def graph_break_reasons() -> list[Any]:
    """What Dynamo has recorded of graph breaks; empty where it records none."""
    return getattr(utils, "graph_break_reasons", [])


def input_source(placeholder: Node) -> Any:
    """Where Dynamo says that an input comes from; None where it says nothing."""
    return getattr(placeholder, "_dynamo_source", None)


def set_input_source(placeholder: Node, source: Any) -> None:
    """AOTAutograd asks every input of a graph where it comes from."""
    placeholder._dynamo_source = source


def attribute_sources(gm: GraphModule) -> dict[str, Any] | None:
    """Where parameters and buffers of a graph come from, by the names they have in it; None where Dynamo is
    silent."""
    return getattr(gm, "_param_name_to_source", None)


def set_attribute_sources(gm: GraphModule, sources: dict[str, Any]) -> None:
    held: Any = gm
    held._param_name_to_source = sources


def symbol_of(item: Any) -> str | None:
    """The name of a symbolic float, int or bool; None for an expression or a number."""
    return getattr(getattr(getattr(item, "node", None), "_expr", None), "name", None)


def trace_artifact(name: str, encoding: str, text: Callable[[], str]) -> None:
    """An entry of the trace that TORCH_TRACE asks for; tlparse keeps it as a file of this name."""
    torch._logging.trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=text)


def with_inputs_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tells Dynamo to hand a compiled function its inputs one by one, not in a list."""
    marked: Any = function
    marked._boxed_call = False
    return function
