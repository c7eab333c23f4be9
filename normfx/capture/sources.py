"""Where the inputs and tensor attributes of a captured graph come from: parameter, buffer, constant or true input.

Read from what Dynamo leaves on the graph (torch 2.11 to 2.15) or from an ExportedProgram's signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat.dynamo import (
    ConstantSource,
    attribute_sources,
    input_source,
    is_from_unspecialized_nn_module_source,
    is_from_unspecialized_param_buffer_source,
)
from normfx.graph.names import dotted, source_name
from normfx.graph.regions import attribute

Kind = Literal["parameter", "buffer", "input", "constant"]


@dataclass(frozen=True)
class Source:
    """Where the value of a placeholder or a tensor attribute comes from, and whether it wants a gradient."""

    kind: Kind
    name: str
    requires_grad: bool = False


def dynamo_sources(gm: GraphModule, canonical: GraphModule) -> dict[Node, Source]:
    old, new = gm.graph.find_nodes(op="placeholder"), canonical.graph.find_nodes(op="placeholder")
    return {after: _placeholder_source(before) for before, after in zip(old, new, strict=True)}


def _placeholder_source(node: Node) -> Source:
    source = input_source(node)
    kind: Kind = "input"
    example = node.meta.get("example_value")
    if isinstance(example, torch.nn.Parameter):
        kind = "parameter"
    elif source is not None and (is_from_unspecialized_param_buffer_source(source) or _is_held(source, example)):
        kind = "buffer"
    wants = isinstance(example, torch.Tensor) and example.requires_grad
    return Source(kind, dotted(source_name(source)) or node.name, wants)


def _is_held(source: Any, example: Any) -> bool:
    """Whether an input is integers or flags that a module holds without having registered them, as a list of places is.

    Like a buffer it is no argument of the call, and writes to it are noticed. Floats that a module holds may be
    what it computed last: they stay inputs.
    """
    if not isinstance(example, torch.Tensor) or not all(isinstance(size, int) for size in example.shape):
        return False
    whole = not example.is_floating_point() and not example.is_complex()
    return whole and is_from_unspecialized_nn_module_source(source)


def export_sources(ep: torch.export.ExportedProgram, graph: Graph) -> dict[Node, Source]:
    signature = ep.graph_signature
    tables: list[tuple[Kind, Mapping[str, str]]] = [
        ("parameter", signature.inputs_to_parameters),
        ("buffer", signature.inputs_to_buffers),
        ("constant", signature.inputs_to_lifted_tensor_constants),
    ]
    sources = {}
    for node in graph.find_nodes(op="placeholder"):
        found = [Source(kind, table[node.name]) for kind, table in tables if node.name in table]
        sources[node] = found[0] if found else Source("input", node.name)
    return sources


def attribute_source(gm: GraphModule, node: Node) -> Source | None:
    """The source of a tensor attribute; None for any other attribute."""
    value = attribute(gm, str(node.target))
    if not isinstance(value, torch.Tensor):
        return None
    source = (attribute_sources(gm) or {}).get(str(node.target))
    known = source is not None and not isinstance(source, ConstantSource)
    kind: Kind = "parameter" if isinstance(value, torch.nn.Parameter) else "buffer" if known else "constant"
    return Source(kind, dotted(source_name(source)) if known else str(node.target), value.requires_grad)
