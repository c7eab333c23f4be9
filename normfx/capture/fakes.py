"""Fake inputs of a trace, with the symbols Dynamo gave the real ones, and a trace that leaves no mark on the caller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat.tensors import FakeTensor, FakeTensorConverter, FakeTensorMode
from normfx.compat.tracing import SWITCH_HOOKS, TracingContext, detect_fake_mode, set_grad_enabled
from normfx.errors import NormfxError


def fake_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    mode = mode or detect_fake_mode(example_inputs)
    return mode or FakeTensorMode(allow_non_fake_inputs=True)


def mode_of(graph: Graph) -> FakeTensorMode | None:
    return detect_fake_mode([n.meta.get("val") for n in graph.nodes])


@contextmanager
def isolated(mode: FakeTensorMode) -> Iterator[None]:
    """Give the trace its own fakes, and the caller its grad mode back.

    The mode remembers one fake per real tensor and hands the same to AOTAutograd. A traced in-place op may
    change a fake for good (its `requires_grad` by `x.add_(weight)`, its strides by `x.t_()`), and AOTAutograd
    would see the change. Unbacked symbols of this trace are rebound to Dynamo's, so they are not pending for
    anybody.
    """
    shared, grad = mode.fake_tensor_converter, torch.is_grad_enabled()
    copy_data = shared.meta_converter.copy_data
    mode.fake_tensor_converter = FakeTensorConverter(copy_data=copy_data, export=shared.export)
    try:
        yield
    finally:
        mode.fake_tensor_converter = shared
        set_grad_enabled(grad)


@contextmanager
def without_hooks() -> Iterator[None]:
    """Keep the hooks of `torch.autograd.graph.saved_tensors_hooks` from running on the fakes of the trace.

    AOTAutograd's tracing puts them off in the same way.
    """
    if SWITCH_HOOKS is None:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            yield
        return
    before = SWITCH_HOOKS(True)
    try:
        yield
    finally:
        SWITCH_HOOKS(before)


def fake_inputs(gm: GraphModule, example_inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    nodes = gm.graph.find_nodes(op="placeholder")
    if len(nodes) != len(example_inputs):
        raise NormfxError(f"normfx: {len(nodes)} placeholders but {len(example_inputs)} example inputs")
    return [_fake_input(node, x, mode) for node, x in zip(nodes, example_inputs, strict=True)]


def _fake_input(node: Node, x: Any, mode: FakeTensorMode) -> Any:
    """A fake of one input with the symbols Dynamo gave it.

    `meta['example_value']` belongs to Dynamo's own fake mode, so a tensor is faked again; a SymInt has no
    mode. Without `source` a dynamic dimension becomes a fresh symbol, Dynamo then breaks the graph silently.
    """
    if isinstance(x, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in x):
        return [_fake_input(node, item, mode) for item in x]
    if not isinstance(x, torch.Tensor):
        return node.meta.get("example_value", x)
    if isinstance(x, FakeTensor) and x.fake_mode is mode:
        return x
    context = TracingContext.try_get()
    known: Any = context.tensor_to_context if context is not None else {}
    symbolic = known.get(x)
    if symbolic is None:
        return static_fake(x, mode)
    return mode.from_tensor(x, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)


def static_fake(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return mode.from_tensor(value, static_shapes=True, trace=False)
