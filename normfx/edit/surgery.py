"""Inserting, replacing and moving the nodes of a canonical graph.

New nodes stand where their result is used (folds) or right after the value they centre, so nothing crosses an autocast
or gradient-mode region.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from normfx.compat.operators import OpOverload
from normfx.errors import NormfxError
from normfx.graph.aliasing import mutated
from normfx.graph.calls import add_call, fake_result
from normfx.graph.nodes import arguments, memory_order, op_name, shape, tensor, value
from normfx.graph.order import Order
from normfx.graph.shards import own_part
from normfx.graph.views import run_again
from normfx.ir.centring import accumulation_dtype
from normfx.ir.sites import Linear


class Surgery:
    """The changes made to one graph so far.

    folded:   the folds made, with the dtype they are rounded to
    replaced: nodes that are gone, with what stands for them
    stored:   nodes that store their result differently now, with the copy that is stored as before
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = Order(graph)
        self._written = mutated(graph)
        self.folded: dict[Node, torch.dtype] = {}
        self.replaced: dict[Node, Node] = {}
        self.stored: dict[Node, Node] = {}

    @contextmanager
    def before(self, place: Node, *operands: Any) -> Iterator[None]:
        """New nodes stand before a node; operands of theirs that are computed after it move up.

        That they may is proved when the graph is read: what an edit needs is then an operand of what it replaces, or
        `Order.can_lift` of a value of parameters alone.
        """
        for operand in operands:
            if isinstance(operand, Node):
                self.order.lift(operand, place)
        with self.graph.inserting_before(place):
            yield

    def replace(self, old: Node, new: Node) -> None:
        self.check_unwritten(new)
        self.replaced[old] = new
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def check_unwritten(self, node: Node) -> None:
        """Raise NormfxError for a value that the model writes in place: a call that reads it where it read what was
        computed from it reads it later, and may find what was written."""
        if node in self._written:
            raise NormfxError(f"normfx: '{node.name}' is written in place, and would be read later; please report it")

    def call(self, node: Node) -> Node:
        """The call that computes a node of the plan now."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def now(self, node: Node) -> Node:
        """What a node of the plan has become, as others read it."""
        call = self.call(node)
        return self.stored.get(call, call)

    def keep_layout(self, node: Node, wanted: Tensor) -> None:
        """What reads a layer with another weight finds the fake value `wanted`, and its layout, as before.

        The result of a linear is stored row by row whatever its operands are, that of a convolution as they are.
        """
        self.stored.pop(node, None)
        node.meta["val"] = wanted
        args = arguments(node)
        channels = args["groups"] * shape(args["weight"])[1] if "groups" in args else None
        if channels is None or channels != shape(args["input"])[1]:  # rows whose width changes later (resize.py)
            return
        with torch.autocast(wanted.device.type, enabled=False):  # the caller's does not hold here
            node.meta["val"] = run_again(node, own_part(wanted).fake_mode)
        readers = list(node.users)
        with self.graph.inserting_before(node.next):
            copy = self.stored_as(node, wanted, node)
        if copy is not node:
            self.stored[node] = copy
            for reader in readers:
                reader.replace_input_with(node, copy)

    def stored_as(self, node: Node, wanted: Tensor, like: Node) -> Node:
        """The value with the dimensions of `wanted` in its order in memory, as far as that is known: the node itself,
        or a copy made where the graph inserts. Views of it, and calls that read strides, may rely on that."""
        order = memory_order(wanted)
        if order is None or memory_order(tensor(node)) == order:
            return node
        aten, moves = torch.ops.aten, list(order) != sorted(order)
        if moves:
            node = add_call(self.graph, aten.permute.default, (node, list(order)), like)
        node = add_call(self.graph, aten.contiguous.default, (node,), like)
        inverse = [order.index(dim) for dim in sorted(order)]
        return add_call(self.graph, aten.permute.default, (node, inverse), like) if moves else node

    def fold(self, op: OpOverload, args: tuple[Any, ...], like: Node) -> Node:
        """A fold with the dtype of what it folds. A fold of a fold is rounded once, last: the inner one stays wide."""
        operand = args[0]
        dtype = self.folded.get(operand, tensor(operand).dtype)
        if operand in self.folded:
            operand.args = (*operand.args[:-1], accumulation_dtype(dtype))
            operand.meta["val"] = fake_result(operand.target, operand.args, {})
        node = add_call(self.graph, op, (*args, dtype), like)
        self.folded[node] = dtype
        return node

    def lay_out(self, shift: Node, linear: Linear) -> Node:
        """Wβ, of the dimensions of a weight but `in_dim`, along those dimensions of the linear that they become."""
        if linear.out_dims is None:
            return shift
        sizes, places = shape(linear.weight), linear.out_dims
        dims = [dim for dim in range(len(sizes)) if dim != linear.in_dim]
        if len(sizes) > 2:
            shift = add_call(self.graph, torch.ops.aten.squeeze.dim, (shift, linear.in_dim), linear.node)
        order = sorted(range(len(dims)), key=places.__getitem__)
        if order != list(range(len(dims))):
            shift = add_call(self.graph, torch.ops.aten.permute.default, (shift, order), linear.node)
        target: list[Any] = [1] * len(shape(linear.node))
        for dim, place in zip(dims, places, strict=True):
            target[place] = sizes[dim]
        return add_call(self.graph, torch.ops.aten.reshape.default, (shift, target), linear.node)

    def cast(self, node: Node, like: Node) -> Node:
        """The node, cast where its dtype differs from that of `like`."""
        want, have = value(like), value(node)
        assert want is not None and have is not None
        if want.dtype == have.dtype:
            return node
        with self.before(like, node):
            return add_call(self.graph, torch.ops.aten.to.dtype, (node, want.dtype), like)


def set_argument(node: Node, name: str, new: Any) -> None:
    """Another value for an argument of an ATen call, by its name in the schema."""
    if name in node.kwargs:
        node.update_kwarg(name, new)
        return
    index = list(arguments(node)).index(name)
    args = [*node.args, *[None] * (index + 1 - len(node.args))]
    args[index] = new
    node.args = tuple(args)


def weight_of(linear: Linear) -> Node:
    """What stands in the place of a linear's weight now."""
    found = arguments(linear.holder)[linear.weight_arg]
    weight: Node = found if linear.part is None else found[linear.part]
    return weight


def set_weight(linear: Linear, new: Node) -> None:
    """Another value in the place of a linear's weight."""
    given: Any = new
    if linear.part is not None:
        given = list(arguments(linear.holder)[linear.weight_arg])
        given[linear.part] = new
    set_argument(linear.holder, linear.weight_arg, given)


def output_dims(linear: Node) -> dict[str, int]:
    """Arguments of a linear or convolution that run over its output features, with that dimension."""
    args = arguments(linear)
    if "mat1" in args:
        return {"mat2": 1, "self": len(shape(args["self"])) - 1}
    if "weight" not in args:
        return {"mat2" if "mat2" in args else "other": 1}
    transposed = args.get("transposed", "transpose" in op_name(linear))
    dims = {"weight": 1 if transposed else 0}
    return {**dims, "bias": 0} if args["bias"] is not None else dims
