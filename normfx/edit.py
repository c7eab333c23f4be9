"""Applies a plan to a canonical graph: the only module that edits one.

New nodes stand where their result is used (folds) or right behind the value they centre, so nothing crosses an autocast
or gradient-mode region. Rules describe their edits through `Edit`; norms are written last, once each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from normfx.ir import ops
from normfx.ir.aliasing import may_leave, storages_of
from normfx.ir.calls import add_call, fake_result
from normfx.ir.cleanup import drop_dead_code
from normfx.ir.fusion import Fusion
from normfx.ir.graph import BAKED, arguments, grad_modes, is_row_major, op_name, shape, tensor, value
from normfx.ir.order import Order
from normfx.ir.resize import resize
from normfx.ir.sites import Axis, Linear, Norm, Residual
from normfx.plan import Plan
from normfx.recognize.flow import LINEARS


@dataclass
class NormState:
    """What becomes of a norm: `centred`: its input has mean 0; `affine`: it keeps γ and β; `scale`: factor k."""

    input: Node
    output: Node
    out_dtype: torch.dtype
    centred: bool = False
    affine: bool = True
    scale: float = 1.0
    stored: Stored | None = None


@dataclass(frozen=True)
class Stored:
    """How crms_norm stores rows of `size` entries: in a basis, without a channel, in `width` entries."""

    basis: str
    size: int
    channel: int
    width: int


@dataclass(frozen=True)
class Rewritten:
    """written: the canonical op of each norm that was written anew; shared: norms that have become the same function of
    the same value as an earlier one, with that one"""

    written: Mapping[Norm, Node] = field(default_factory=dict)
    shared: Mapping[Norm, Norm] = field(default_factory=dict)


def rewrite(gm: GraphModule, plan: Plan, store: Callable[[Any], Stored] | None = None) -> Rewritten:
    """Apply all decisions of a plan in place.

    store: how to store the rows of a stream of crms_norm
    """
    edit = Edit(gm, store)
    for decision in plan.applied():
        decision.rule.rewrite(decision.site, edit)
    for norm in plan.spelled:
        edit.norm(norm)
    if edit.norms or plan.changes:
        edit.finish()
    return Rewritten(edit.written, edit.shared)


class Edit:
    """The edits a rule may ask for, on one graph."""

    def __init__(self, gm: GraphModule, store: Callable[[Any], Stored] | None = None) -> None:
        self.gm = gm
        self.store = store
        self.centres: dict[tuple[Norm, ...], list[Node]] = {}
        self.widths: dict[Node, tuple[Axis, int]] = {}
        self.compressed: list[Node] = []
        self.graph = gm.graph
        self.order = Order(gm.graph)
        self.norms: dict[Norm, NormState] = {}
        self.folded: dict[Node, torch.dtype] = {}
        self.replaced: dict[Node, Node] = {}
        self.written: dict[Norm, Node] = {}
        self.shared: dict[Norm, Norm] = {}
        self.fused: list[Residual] = []
        calls = {getattr(node.target, "__name__", "") for node in gm.graph.nodes}
        self.switches_grad = "_set_grad_enabled" in calls
        self.modes = grad_modes(gm.graph)
        self.linears = {node: arguments(node) for node in gm.graph.nodes if op_name(node) in LINEARS}

    def norm(self, norm: Norm) -> NormState:
        if norm not in self.norms:
            self.norms[norm] = NormState(norm.input, norm.output, norm.out_dtype)
        return self.norms[norm]

    def fuse(self, site: Residual) -> None:
        """The norm and the sum it reads become one op (ir/fusion.py), when all norms are written."""
        for norm in site.norms:
            self.norm(norm)
        self.fused.append(site)

    def absorb(self, norm: Norm, node: Node) -> None:
        """The norm now also computes `node`, a multiple of its output.

        Where a centring was put between the two, it stays, behind the norm that computes the multiple: P(kx) = k P x.
        """
        state = self.norm(norm)
        fake = value(node)
        assert fake is not None
        operands = node.all_input_nodes
        if self._now(norm.output) not in operands:
            (between,) = operands
            self._replace(node, between)
            return
        state.output, state.out_dtype = node, fake.dtype

    def bake(self, node: Node) -> None:
        """The value of parameters alone is to be computed outside the graph."""
        node.meta[BAKED] = True

    def center_value(self, node: Node, axis: Axis, users: Iterable[Node | Norm]) -> list[Node]:
        """Readers of a value read its centred copy, made right behind it.

        Where gradients are not recorded, a value may still have one: a graph input of a graph that starts so, or one
        handed on by an op that returns it itself. A copy made there would lose it, so each reader gets its own.
        """
        if self.switches_grad and (node.op == "placeholder" or not self.modes[node]):
            return self.center_operand(node, axis, users)
        behind = node
        while node.op == "placeholder" and behind.next.op == "placeholder":
            behind = behind.next
        with self.graph.inserting_after(behind):
            centred = self._center(node, axis, node)
        for user in users:
            self._redirect(user, node, centred)
        return [centred]

    def center_operand(self, node: Node, axis: Axis, users: Iterable[Node | Norm]) -> list[Node]:
        """Each reader of a weight, bias or table gets its centred form, computed just before the reader."""
        made: list[Node] = []
        for user in users:
            if isinstance(user, Node) and user in self.linears:
                slots = [name for name, operand in self.linears[user].items() if operand is node]
                made += [self._center_slot(user, name, axis) for name in slots]
                continue
            with self._before(self._first(user) if isinstance(user, Norm) else user, node):
                like = user.output if isinstance(user, Norm) else user
                centred = self._center(node, axis, like)
            self._redirect(user, node, centred)
            made.append(centred)
        return made

    def _center_slot(self, linear: Node, name: str, axis: Axis) -> Node:
        """Centre what stands in an argument of a linear now: another rule may have folded something into it."""
        operand = arguments(linear)[name]
        with self._before(linear, operand):
            centred = self._center(operand, axis, linear)
        self._set(linear, name, centred)
        return centred

    def _center(self, node: Node, axis: Axis, like: Node) -> Node:
        return self._fold(ops.CENTER, (node, axis.dim, axis.size, axis.inner), like)

    def _fold(self, op: torch._ops.OpOverload, args: tuple[Any, ...], like: Node) -> Node:
        """A fold with the dtype of what it folds. A fold of a fold is rounded once, last: the inner one stays wide."""
        operand = args[0]
        dtype = self.folded.get(operand, tensor(operand).dtype)
        if operand in self.folded:
            operand.args = (*operand.args[:-1], ops.accumulation_dtype(dtype))
            operand.meta["val"] = fake_result(operand.target, operand.args, {})
        node = add_call(self.graph, op, (*args, dtype), like)
        self.folded[node] = dtype
        return node

    def center_writer(self, linear: Node, axis: Axis) -> list[Node]:
        """Centre the weight and bias of a linear over its whole output axis, as they stand now."""
        dims = _output_dims(linear)
        return [self._center_slot(linear, name, Axis(dim, axis.size)) for name, dim in dims.items()]

    def compress(self, site: Any) -> None:
        """Store the rows of a centred stream (rules/crms_norm.py) as `store` says: what was centred is compressed, the
        readers of its norms take that, and every value between gets the new width."""
        assert self.store is not None
        stored = self.store(site)
        sizes = (stored.basis, stored.channel, stored.width)
        for node in self.centres[site.stream.norms]:
            x, dim, _, _, dtype = node.args
            node.target, node.args = ops.COMPRESS, (x, dim, *sizes, dtype)
            node.meta["val"] = fake_result(node.target, node.args, {})
            self.compressed.append(node)
        for leaf in site.stream.leaves:
            if leaf.kind == "centred":
                with self.graph.inserting_after(leaf.node):
                    copy = self._fold(ops.COMPRESS, (leaf.node, leaf.axis.dim, *sizes), leaf.node)
                self.compressed.append(copy)
                for user in leaf.users:
                    self._redirect(user, leaf.node, copy)
        for readers in site.readers:
            for linear, axis, _ in readers.linears:
                weight = arguments(linear.node)[linear.weight_arg]
                with self._before(linear.node, weight):
                    folded = self._fold(ops.COMPRESS_INPUT, (weight, axis.dim, *sizes), linear.node)
                self._set(linear.node, linear.weight_arg, folded)
        for norm in site.stream.norms:
            self.norm(norm).stored = stored
        self.widths.update({node: (axis, stored.width) for node, axis in site.values.items()})

    def fold_output_scale(self, linear: Node, scale: Node, product: Node) -> None:
        """scale ⊙ linear → the linear with λ in weight and bias; readers of the product read its other operand."""
        fake = value(scale)
        assert fake is not None
        for name, dim in _output_dims(linear).items():
            operand = arguments(linear)[name]
            with self._before(linear, operand, scale):
                scaled = self._fold(ops.SCALE_FEATURES, (operand, scale, dim, fake.numel(), 1), linear)
            self._set(linear, name, scaled)
        args = arguments(product)
        plain = args["other"] if args["self"] is scale else args["self"]
        self._replace(product, self._cast(plain, product))

    def drop_term(self, node: Node, name: str) -> None:
        """Replace an additive term that is constant along the features by its centred form, 0.

        A tensor becomes c − c, so that a parameter still gets a zero gradient, and NaN or inf still spread.
        """
        term = arguments(node)[name]
        fake = value(term)
        if fake is None:
            self._set(node, name, 0)
            return
        with self._before(node, term):
            if not fake.is_floating_point():
                zero = add_call(self.graph, torch.ops.aten.zeros_like.default, (term,), node)
            else:
                zero = add_call(self.graph, torch.ops.aten.sub.Tensor, (term, term), node)
        self._set(node, name, zero)

    def fold_reader(self, linear: Linear, axis: Axis, gamma: Node | None, beta: Node | None, factor: float) -> None:
        """Move γ into the reader's weight and β into its bias, created when missing."""
        node, now = linear.node, arguments(linear.node)
        weight, bias = now[linear.weight_arg], linear.bias and now[linear.bias_arg or ""]
        fake_weight, fake_out = value(weight), value(node)
        assert fake_weight is not None and fake_out is not None
        sizes = (axis.dim, axis.size, axis.inner)
        with self._before(node, weight, bias, gamma, beta):
            if beta is not None:
                dtype = fake_weight.dtype if linear.bias_arg is not None else fake_out.dtype
                bias = add_call(self.graph, ops.FOLD_SHIFT, (weight, beta, bias, factor, *sizes, dtype), node)
            if gamma is not None:
                weight = self._fold(ops.SCALE_FEATURES, (weight, gamma, *sizes), node)
        self._set(node, linear.weight_arg, weight)
        if beta is None:
            return
        if linear.bias_arg is not None:
            self._set(node, linear.bias_arg, bias)
            return
        with self.graph.inserting_after(node):
            total = add_call(self.graph, torch.ops.aten.add.Tensor, (node, node), node)
        self._replace(node, total)
        total.args = (node, bias)

    def finish(self) -> None:
        """Write the norms, drop what they no longer need, check the graph."""
        storages = storages_of(self.graph)
        leaving = {norm for norm, state in self.norms.items() if may_leave(state.output, storages)}
        for norm, state in self.norms.items():
            self._write_norm(norm, state)
        drop_dead_code(self.graph)
        if self.widths:
            widths = {self._now(node): width for node, width in self.widths.items()}
            resize(self.graph, widths, self.compressed)
        alive = set(self.graph.nodes)  # a norm that only a dropped value read is gone
        written = {norm: node for norm, node in self.written.items() if node in alive}
        fusion = Fusion(self.graph, written)
        fusion.centre_outputs()
        fusion.share(leaving)
        for site in self.fused:
            if site.norm in written:
                fusion.fuse(site)
        self.written, self.shared = fusion.written, fusion.shared
        self.graph.lint()
        self.gm.recompile()

    def _write_norm(self, norm: Norm, state: NormState) -> None:
        centred = state.centred or norm.kind == "RMSNorm"
        weight = norm.weight if state.affine else None
        bias = norm.bias if state.affine else None
        dim = norm.dims[0]
        op, correction = ops.RMS_NORM if centred else ops.LAYER_NORM, norm.correction
        if state.stored is not None:  # the divisor stays d − c
            op = ops.CRMS_NORM if state.stored.basis == "drop" else op
            correction += state.stored.width - state.stored.size
        args = (self._now(state.input), weight, bias, dim, norm.eps, norm.eps_place, correction, state.scale)
        with self._before(norm.output, *args[:3]):  # in the norm's own gradient mode
            written = new = add_call(self.graph, op, (*args, norm.compute_dtype, state.out_dtype, False), norm.output)
            if is_row_major(tensor(state.output)) and not is_row_major(tensor(new)):
                # a view may rely on it
                new = add_call(self.graph, torch.ops.aten.contiguous.default, (new,), norm.output)
        self._replace(state.output, new)
        self.written[norm] = written

    def _redirect(self, user: Node | Norm, old: Node, new: Node) -> None:
        if isinstance(user, Norm):
            self.norm(user).input = new
        else:
            user.replace_input_with(old, new)

    @contextmanager
    def _before(self, place: Node, *operands: Any) -> Iterator[None]:
        """New nodes stand before a node; operands of theirs that are computed after it move up.

        That they may is proved when the graph is read: what an edit needs is then an operand of what it replaces, or
        `Order.can_lift` of a value of parameters alone.
        """
        for operand in operands:
            if isinstance(operand, Node):
                self.order.lift(operand, place)
        with self.graph.inserting_before(place):
            yield

    def _first(self, norm: Norm) -> Node:
        """The earliest node of a norm."""
        return min(norm.nodes)

    def _replace(self, old: Node, new: Node) -> None:
        self.replaced[old] = new
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _now(self, node: Node) -> Node:
        """What a node of the plan has become."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _cast(self, node: Node, like: Node) -> Node:
        """The node, cast where its dtype differs from that of `like`."""
        want, have = value(like), value(node)
        assert want is not None and have is not None
        if want.dtype == have.dtype:
            return node
        with self._before(like, node):
            return add_call(self.graph, torch.ops.aten.to.dtype, (node, want.dtype), like)

    def _set(self, node: Node, name: str, new: Any) -> None:
        if name in node.kwargs:
            node.update_kwarg(name, new)
            return
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]  # an ATen call
        index = names.index(name)
        args = [*node.args, *[None] * (index + 1 - len(node.args))]
        args[index] = new
        node.args = tuple(args)


def _output_dims(linear: Node) -> dict[str, int]:
    """Arguments of a linear or convolution that run over its output features, with that dimension."""
    args = arguments(linear)
    if "mat1" in args:
        return {"mat2": 1, "self": len(shape(args["self"])) - 1}
    if "weight" not in args:
        return {"mat2" if "mat2" in args else "other": 1}
    target = linear.target.name()  # type: ignore[union-attr]
    transposed = args.get("transposed", "transpose" in target)
    dims = {"weight": 1 if transposed else 0}
    return {**dims, "bias": 0} if args["bias"] is not None else dims
