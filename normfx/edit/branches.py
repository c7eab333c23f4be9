"""Terms of a sum that are linear in one value become one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from normfx.edit.surgery import Surgery, set_argument
from normfx.errors import NormfxError
from normfx.graph.calls import add_call
from normfx.graph.nodes import arguments, op_name, tensor
from normfx.ir import ops
from normfx.ir.sites import Branch, Linear


def merge_branches(surgery: Surgery, host: Branch, rest: Sequence[Branch]) -> None:
    """The layer of `host` computes the other terms too, by the sum of all weights as they stand now, and they leave the
    sum."""
    (layer,) = host.layers
    place = layer.node
    operands = [_operands(surgery, branch) for branch in (host, *rest)]
    dtype = tensor(layer.weight).dtype
    with surgery.before(place, *(node for found in operands for node in found)):
        kernels, shifts = [_weight_of(layer)], [_shift_of(layer)]
        for branch in rest:
            kernel, shift = _map(surgery, branch, layer)
            kernels.append(kernel if layer.in_dim else _transposed(surgery, kernel, place))
            shifts.append(shift)
        factors = [branch.factor / host.factor for branch in (host, *rest)]
        offsets = [offset for branch in (host, *rest) for offset in branch.offsets or ()]
        weight = add_call(surgery.graph, ops.MERGE_KERNELS, (kernels, factors, offsets, dtype), place)
        given = [(shift, factor) for shift, factor in zip(shifts, factors, strict=True) if shift is not None]
        shift = None
        if given:
            args = ([shift for shift, _ in given], [factor for _, factor in given], dtype)
            shift = add_call(surgery.graph, ops.MERGE_SHIFTS, args, place)
    set_argument(place, layer.weight_arg, weight)
    set_argument(place, layer.bias_arg or "", shift)
    surgery.keep_layout(place, tensor(place))
    for branch in rest:
        _drop(surgery, branch)


def _operands(surgery: Surgery, branch: Branch) -> list[Node]:
    """The weights, biases and statistics of a term as they stand now."""
    norm = branch.norm
    own = [norm.mean, norm.var, norm.norm.weight, norm.norm.bias] if norm is not None and not branch.layers else []
    for layer in _layers(surgery, branch):
        own += [_weight_of(layer), _shift_of(layer)]
    return [node for node in own if node is not None]


def _layers(surgery: Surgery, branch: Branch) -> tuple[Linear, ...]:
    """The layers of a term: one, where two of them have been merged."""
    merged = len(branch.layers) > 1 and surgery.call(branch.layers[0].node) is branch.layers[1].node
    return branch.layers[1:] if merged else branch.layers


def _weight_of(layer: Linear) -> Node:
    weight: Node = arguments(layer.node)[layer.weight_arg]
    return weight


def _shift_of(layer: Linear) -> Node | None:
    shift: Node | None = arguments(layer.node)[layer.bias_arg or ""]
    return shift


def _upright(surgery: Surgery, layer: Linear) -> Node:
    """The weight, its output features first."""
    weight = _weight_of(layer)
    return weight if layer.in_dim else _transposed(surgery, weight, layer.node)


def _transposed(surgery: Surgery, weight: Node, like: Node) -> Node:
    return add_call(surgery.graph, torch.ops.aten.t.default, (weight,), like)


def _map(surgery: Surgery, branch: Branch, host: Linear) -> tuple[Node, Node | None]:
    """Weight and bias of a term, its factor left aside, the output features of the weight first."""
    graph, place, dtype = surgery.graph, host.node, tensor(host.weight).dtype
    if not branch.layers:
        scale, shift = None, None
        if branch.norm is not None:
            site, norm = branch.norm, branch.norm.norm
            scale = add_call(graph, ops.CHANNEL_SCALE, (site.var, norm.weight, norm.eps), place)
            shift = add_call(graph, ops.CHANNEL_SHIFT, (site.mean, scale, norm.bias, None, dtype), place)
        return add_call(graph, ops.DIAGONAL_KERNEL, (_weight_of(host), scale, max(1, host.groups)), place), shift
    first, *then = reversed(_layers(surgery, branch))
    weight, shift = _upright(surgery, first), _shift_of(first)
    for layer in then:
        outer, own = _upright(surgery, layer), _shift_of(layer)
        if shift is not None:
            own = add_call(graph, ops.INPUT_SHIFT, (outer, shift, own, 1.0, 1, dtype), place)
        weight, shift = add_call(graph, ops.MERGE_WEIGHTS, (outer, weight, dtype), place), own
    return weight, shift


def _drop(surgery: Surgery, branch: Branch) -> None:
    """Take a term out of its sum: what reads the sum reads what is left of it.

    Where the term is alone in a part of the sum, that part goes. Where a sum on the way has been replaced, another term
    went, and what was left is this one.
    """
    gone = surgery.now(branch.top)
    for node in branch.path:
        if node in surgery.replaced:
            gone = surgery.now(node)  # with the factor that it had there
            continue
        if gone not in node.all_input_nodes:
            raise NormfxError(f"normfx: {node.name} does not add {gone.name}; please report this graph")
        args = arguments(node)
        left = args["self"] if args.get("other") is gone else args.get("other")
        if not isinstance(left, Node):
            gone = node  # a product with a number, or a sum with 0
            continue
        with surgery.before(node, left):
            left = surgery.stored_as(_scaled(surgery, node, left, gone), tensor(node), node)
        surgery.replace(node, left)
        return


def _scaled(surgery: Surgery, node: Node, left: Node, gone: Node) -> Node:
    """What is left of a sum or difference, with the factor that it had there."""
    args = arguments(node)
    if args["self"] is not gone:
        return left
    factor = args.get("alpha", 1) * (1 if op_name(node) == "aten::add.Tensor" else -1)
    return left if factor == 1 else add_call(surgery.graph, torch.ops.aten.mul.Tensor, (left, factor), node)
