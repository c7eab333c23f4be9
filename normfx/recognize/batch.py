"""BatchNorms, with the linear or convolution that each reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from normfx.graph.aliasing import may_leave, storages_of
from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, entry_readers, occurrences, op_name, shape, tensor, value
from normfx.graph.order import Order
from normfx.ir.sites import Axis, BatchNorm, Linear, Norm
from normfx.recognize.flow import Constants, flow
from normfx.recognize.norms import BATCH_NORMS, takes_batch_statistics
from normfx.recognize.readers import convolution, of_parameters, passes_rows


def find_batch_norms(facts: Facts, norms: Iterable[Norm]) -> Iterator[BatchNorm]:
    """One for each BatchNorm, whether or not it can be folded."""
    found = [norm for norm in norms if norm.kind == "BatchNorm"]
    storages = storages_of(facts.graph) if found else {}
    for norm in found:
        call = next(node for node in norm.nodes if op_name(node) in BATCH_NORMS)
        args = arguments(call)
        mean, var = args.get("running_mean"), args.get("running_var")
        obstacle, nodes = _obstacle(norm, call, args, facts)
        if obstacle:
            yield BatchNorm(norm, mean, var, obstacle=obstacle, nodes=nodes)
            continue
        axis, constants = Axis(1, int(shape(norm.input)[1])), Constants(facts.written)
        writer, others, apart = _writer(norm, call, axis, facts, constants)
        operands = [node for node in (mean, var, norm.weight, norm.bias) if node is not None]
        if writer is not None and not apart and not _takes(writer, operands, facts.order):
            apart = "its weight, or the statistics, cannot be read where it runs"
        views = writer is not None and bool(storages[norm.input] & storages[writer.node]) and norm.input != writer.node
        copies = views and may_leave(norm.output, storages)
        live = writer is not None and not facts.live.isdisjoint((writer.weight, *operands))
        yield BatchNorm(norm, mean, var, writer, others, apart, copies, live)


def _obstacle(norm: Norm, call: Node, args: Mapping[str, Any], facts: Facts) -> tuple[str, tuple[Node, ...]]:
    """What forbids treating a BatchNorm as an affine map of its channels, and the nodes in the way."""
    if takes_batch_statistics(op_name(call), dict(args)):
        return "batch_statistics", (call,)
    given = [args.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    computed = tuple(node for node in given if isinstance(node, Node) and node not in facts.parameters)
    if computed:
        return "computed", computed
    written = tuple(node for node in (norm.input, norm.output) if node in facts.written)
    if written:
        return "mutated", written
    results = tuple(user for user in call.users if call is not norm.output and user is not norm.output)
    features = shape(norm.input)[1]
    if results or not isinstance(features, int) or features < 2 or tensor(norm.input).dtype != norm.out_dtype:
        return "opaque_norm", results or (call,)
    if norm.eps is None or not norm.eps >= torch.finfo(torch.float32).tiny:
        return "no_epsilon", (call,)
    folded = tuple(node for node in given if isinstance(node, Node) and not _is_row(node, features))
    return ("vectors", folded) if folded else ("", ())


def _is_row(node: Node, features: int) -> bool:
    """Whether a vector has a number for each channel and, but for dimensions of size 1, one dimension."""
    sizes = shape(node)
    return all(isinstance(size, int) for size in sizes) and [size for size in sizes if size != 1] == [features]


def _writer(
    norm: Norm, call: Node, axis: Axis, facts: Facts, constants: Constants
) -> tuple[Linear | None, tuple[Node, ...], str]:
    """Walk backwards from a BatchNorm's input: its writer, other readers on the way, and what sets the writer apart."""
    modes = facts.modes
    node, reader, others = norm.input, call, dict[Node, None]()
    while True:
        others.update(dict.fromkeys(user for user in entry_readers(node) if user is not reader))
        if node in facts.parameters or node in constants.barred or occurrences(reader, node) != 1:
            return None, (), ""
        linear = _written_by(node, axis, facts.parameters)
        if linear is not None:
            apart = "" if modes[node] == modes[norm.output] else "it runs in another gradient mode"
            return linear, tuple(others), apart
        step = flow(node, axis, constants) if passes_rows(node) else None
        if step is None or len(step.carried) != 1 or step.dropped or modes[node] != modes[norm.output]:
            return None, (), ""
        reader = node
        node, axis = step.carried[0]


def _written_by(node: Node, axis: Axis, parameters: frozenset[Node]) -> Linear | None:
    """The node as the linear or convolution whose output features are the whole axis."""
    if value(node) is None or axis.inner != 1 or axis.size != shape(node)[axis.dim]:
        return None
    if op_name(node) == "aten::linear":
        args = arguments(node)
        found = Linear(node, args["input"], args["weight"], args["bias"], "weight", "bias", 1)
        whole = len(shape(found.weight)) == 2 and axis.dim == len(shape(node)) - 1
        return found if whole and of_parameters(found, parameters) else None
    written = convolution(node)
    if written is None or axis.dim != len(shape(node)) - len(shape(written.weight)) + 1:
        return None
    return written if of_parameters(written, parameters) else None


def _takes(writer: Linear, operands: Iterable[Node], order: Order) -> bool:
    """Whether what the map is made of can be read at the writer, on its device."""
    near = (tensor(part).device == tensor(writer.weight).device for part in operands)
    return all(near) and all(order.can_lift(part, writer.node) for part in operands)
