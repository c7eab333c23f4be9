"""The edits that a rule may ask for. Norms are written last, once each (writer.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from normfx.edit.branches import merge_branches
from normfx.edit.surgery import Surgery, output_dims, set_argument, set_weight, weight_of
from normfx.errors import NormfxError
from normfx.graph.affine import composed
from normfx.graph.calls import add_call, fake_result
from normfx.graph.nodes import BAKED, arguments, grad_modes, op_name, tensor, value
from normfx.ir import ops
from normfx.ir.affine import Affine
from normfx.ir.sites import Axis, BatchNorm, Block, Branch, Leaf, Linear, Norm, Pair, Readers, Residual, Stream
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
    """How rows of `size` entries whose sum is 0 are stored: in a basis, without a channel, in `width` entries."""

    basis: str
    size: int
    channel: int
    width: int


class Edit:
    """What a rule may ask for, on one graph.

    norm, center, drop_term, fold_reader, compose, drop_affine, defer, absorb, fuse, compress, bake,
    fold_into_writer, merge and merge_branches are the edits; a rule may also read

    values:  present values of parameters, as far as they are known: they decide between forms that are all exact
    options: of the rules, by name
    """

    def __init__(self, graph: Graph, values: Mapping[Node, Tensor], options: Mapping[str, str]) -> None:
        self.values, self.options = values, options
        self.surgery = Surgery(graph)
        self.norms: dict[Norm, NormState] = {}
        self.fused: list[Residual] = []
        self.centres: dict[Leaf, list[Node]] = {}
        self.widths: dict[Node, tuple[Axis, int]] = {}
        self.compressed: list[Node] = []
        calls = {getattr(node.target, "__name__", "") for node in graph.nodes}
        self._switches_grad = "_set_grad_enabled" in calls
        self._modes = grad_modes(graph)
        self._linears = {node: arguments(node) for node in graph.nodes if op_name(node) in LINEARS}

    def norm(self, norm: Norm) -> NormState:
        """What becomes of a norm, to be read and set; the norm is written again as this says.

        Raises NormfxError for a norm that no canonical op computes, which a rule has to refuse.
        """
        if norm.fixed:
            raise NormfxError(f"normfx: a rule was applied to the norm {norm.name} although {norm.fixed}")
        if norm not in self.norms:
            self.norms[norm] = NormState(norm.input, norm.output, norm.out_dtype)
        return self.norms[norm]

    def center(self, leaf: Leaf) -> None:
        """What reads a leaf inside a stream reads its centred form from now on."""
        made: list[Node] = []
        if leaf.kind == "scaled":
            assert leaf.linear is not None and leaf.scale is not None
            self._fold_output_scale(leaf.linear, leaf.scale, leaf.node)
            made = self._center_writer(leaf.linear, leaf.axis)
        elif leaf.block is not None:
            made = self._center_block(leaf.block)
        elif leaf.kind == "parameter":
            made = self._center_operand(leaf.node, leaf.axis, leaf.users)
        elif leaf.kind != "centred":
            made = self._center_value(leaf.node, leaf.axis, leaf.users)
        self.centres[leaf] = made

    def drop_term(self, node: Node, name: str) -> None:
        """Replace an additive term that is constant along the features by its centred form, 0.

        A tensor becomes c − c, so that a parameter still gets a zero gradient, and NaN or inf still spread.
        """
        term = arguments(node)[name]
        fake = value(term)
        if fake is None:
            set_argument(node, name, 0)
            return
        with self.surgery.before(node, term):
            if not fake.is_floating_point():
                zero = add_call(self.surgery.graph, torch.ops.aten.zeros_like.default, (term,), node)
            else:
                zero = add_call(self.surgery.graph, torch.ops.aten.sub.Tensor, (term, term), node)
        set_argument(node, name, zero)

    def fold_reader(self, linear: Linear, axis: Axis, gamma: Node | None, beta: Node | None, factor: float) -> None:
        """Move γ into the reader's weight and β into its bias, created when missing.

        In a convolution γ and β are of its channels; β may move to one that sums over all of its weight everywhere.
        """
        node, now = linear.node, arguments(linear.node)
        weight, bias = weight_of(linear), linear.bias and now[linear.bias_arg or ""]
        fake_weight, fake_out = value(weight), value(node)
        assert fake_weight is not None and fake_out is not None
        over = linear.groups > 0
        sizes = (axis.dim, linear.groups) if over else (axis.dim, axis.size, axis.inner)
        place = linear.holder
        with self.surgery.before(place, weight, bias, gamma, beta):
            if beta is not None:
                dtype = fake_weight.dtype if linear.bias_arg is not None else fake_out.dtype
                op, rest = (ops.INPUT_SHIFT, sizes[1:]) if over else (ops.FOLD_SHIFT, sizes)
                bias = add_call(self.surgery.graph, op, (weight, beta, bias, factor, *rest, dtype), node)
                bias = self.surgery.lay_out(bias, linear)
            if gamma is not None:
                op = ops.SCALE_CHANNELS if over else ops.SCALE_FEATURES
                weight = self.surgery.fold(op, (weight, gamma, *sizes), place)
        set_weight(linear, weight)
        if beta is None:
            return
        if linear.bias_arg is not None:
            set_argument(node, linear.bias_arg, bias)
            return
        with self.surgery.graph.inserting_after(node):
            total = add_call(self.surgery.graph, torch.ops.aten.add.Tensor, (node, node), node)
        self.surgery.replace(node, total)
        total.args = (node, bias)

    def compose(self, affine: Affine, place: Node) -> tuple[Node | None, Node | None]:
        """γ and β of some steps, computed before a node."""
        with self.surgery.graph.inserting_before(place):
            return composed(self.surgery.graph, affine.steps, place)

    def drop_affine(self, norm: Norm) -> None:
        """What reads a scaling and shift reads what was scaled, in the same dtype and layout."""
        output, source = norm.output, self.surgery.now(norm.input)
        source = self.surgery.cast(source, output)
        with self.surgery.before(output, source):
            source = self.surgery.stored_as(source, tensor(output), output)
        self.surgery.replace(output, source)

    def defer(self, readers: Readers) -> None:
        """The linears that read a norm read its input, and rstd multiplies what comes out (maths M8).

        γ and β are theirs already. Where the mean of the input is not 0, their weights are centred: W P x = W (x − μ).
        """
        norm = readers.norm
        state = self.norm(norm)
        source = self.surgery.now(state.input)
        kind = "rms_norm" if state.centred else norm.form.kind
        self.surgery.check_unwritten(source)
        norm.output.replace_all_uses_with(source)
        del self.norms[norm]  # it is not written again
        factors: dict[Node, Node] = {}
        for linear, axis, _ in sorted(readers.linears, key=lambda reader: reader[0].node):
            rows = source if linear.value is norm.output else linear.value
            if rows not in factors:
                dim = tensor(rows).ndim - 1
                form = (kind, dim, norm.eps, norm.eps_place, norm.correction, norm.compute_dtype)
                with self.surgery.before(linear.node, rows):
                    factors[rows] = add_call(self.surgery.graph, ops.ROW_FACTOR, (rows, *form), linear.node)
            if kind == "layer_norm":
                self._center_slot(linear.node, linear.weight_arg, axis)
            product, shift = self._without_bias(linear)
            with self.surgery.graph.inserting_after(product):
                given = (product, factors[rows], shift, tensor(linear.node).dtype)
                scaled = add_call(self.surgery.graph, ops.SCALE_ROWS, given, linear.node)
            self.surgery.replace(linear.node, scaled)

    def _without_bias(self, linear: Linear) -> tuple[Node, Node | None]:
        """The product of a linear alone, and its bias."""
        node, now = linear.node, arguments(linear.node)
        if linear.bias_arg is None or now[linear.bias_arg] is None:
            return node, None
        if linear.bias_arg == "bias":
            set_argument(node, "bias", None)
            return node, now["bias"]
        with self.surgery.before(node):
            product = add_call(self.surgery.graph, torch.ops.aten.mm.default, (now["mat1"], now["mat2"]), node)
        return product, now["self"]

    def absorb(self, norm: Norm, node: Node) -> None:
        """The norm now also computes `node`, a multiple of its output.

        Where a centring was put between the two, it stays, after the norm that computes the multiple: P(kx) = k P x.
        """
        state = self.norm(norm)
        fake = value(node)
        assert fake is not None
        operands = node.all_input_nodes
        if self.surgery.now(norm.output) not in operands:
            (between,) = operands
            self.surgery.replace(node, between)
            return
        state.output, state.out_dtype = node, fake.dtype

    def fuse(self, site: Residual) -> None:
        """The norm and the sum it reads become one op (edit/fusion.py), when all norms are written."""
        for norm in site.norms:
            self.norm(norm)
        self.fused.append(site)

    def compress(self, stream: Stream, readers: Iterable[Readers], inside: Mapping[Node, Axis], stored: Stored) -> None:
        """Store the rows of a centred stream in fewer entries: what was centred is compressed, the readers of its norms
        take that, and every value between (`inside`) gets the new width."""
        sizes = (stored.basis, stored.channel, stored.width)
        for node in [node for leaf in stream.leaves for node in self.centres[leaf]]:
            x, dim, _, _, dtype = node.args
            node.target, node.args = ops.COMPRESS, (x, dim, *sizes, dtype)
            node.meta["val"] = fake_result(node.target, node.args, {})
            self.compressed.append(node)
        for leaf in stream.leaves:
            if leaf.kind == "centred":
                with self.surgery.graph.inserting_after(leaf.node):
                    copy = self.surgery.fold(ops.COMPRESS, (leaf.node, leaf.axis.dim, *sizes), leaf.node)
                self.compressed.append(copy)
                for user in leaf.users:
                    self._redirect(user, leaf.node, copy)
        for linear, axis in [(linear, axis) for found in readers for linear, axis, _ in found.linears]:
            weight = weight_of(linear)
            with self.surgery.before(linear.node, weight):
                folded = self.surgery.fold(ops.COMPRESS_INPUT, (weight, axis.dim, *sizes), linear.node)
            set_weight(linear, folded)
        for norm in stream.norms:
            self.norm(norm).stored = stored
        self.widths.update({node: (axis, stored.width) for node, axis in inside.items()})

    def bake(self, node: Node) -> None:
        """The value of parameters alone is to be computed outside the graph."""
        node.meta[BAKED] = True

    def fold_into_writer(self, site: BatchNorm) -> None:
        """The linear or convolution that a BatchNorm reads computes its output: s·W and s·(b − mean) + β."""
        linear, norm = site.writer, site.norm
        assert linear is not None
        now = arguments(linear.node)
        weight, bias = now[linear.weight_arg], now[linear.bias_arg or ""]
        operands = (site.mean, site.var, norm.weight, norm.bias)
        with self.surgery.before(linear.node, weight, bias, *operands):
            scale = add_call(self.surgery.graph, ops.CHANNEL_SCALE, (site.var, norm.weight, norm.eps), linear.node)
            map_of_bias = (site.mean, scale, norm.bias, bias, tensor(linear.weight).dtype)
            shift = add_call(self.surgery.graph, ops.CHANNEL_SHIFT, map_of_bias, linear.node)
            sizes = (1 - linear.in_dim, linear.groups)
            weight = self.surgery.fold(ops.SCALE_CHANNELS, (weight, scale, *sizes), linear.node)
        set_argument(linear.node, linear.weight_arg, weight)
        set_argument(linear.node, linear.bias_arg or "", shift)
        self._drop_batch_norm(site)

    def merge(self, site: Pair) -> None:
        """The inner layer computes what the outer one does: W₂W₁ and W₂b₁ + b₂, of the weights as they stand now."""
        inner, outer = site.inner, site.outer
        place = self.surgery.call(inner.node)  # which may have been merged with what it read
        first, second = arguments(place), arguments(outer.node)
        (one, bias), (two, shift) = ((args["weight"], args["bias"]) for args in (first, second))
        dtype = tensor(outer.weight).dtype
        with self.surgery.before(place, two, shift):
            if bias is not None:
                given = (two, bias, shift, 1.0, 1, dtype)
                shift = add_call(self.surgery.graph, ops.INPUT_SHIFT, given, outer.node)
            weight = self.surgery.fold(ops.MERGE_WEIGHTS, (two, one), outer.node)
        set_argument(place, "weight", weight)
        set_argument(place, "bias", shift)
        self.surgery.replace(outer.node, place)
        self.surgery.keep_layout(place, tensor(outer.node))

    def merge_branches(self, host: Branch, rest: Iterable[Branch]) -> None:
        """The layer of one term of a sum computes some of the other terms too, which leave the sum."""
        merge_branches(self.surgery, host, tuple(rest))

    def _drop_batch_norm(self, site: BatchNorm) -> None:
        """What reads a BatchNorm reads its input; in the same layout, and in memory of its own if it leaves."""
        output, source = site.norm.output, self.surgery.now(site.norm.input)
        with self.surgery.before(output, source):
            stored = self.surgery.stored_as(source, tensor(output), output)
            if stored is source and site.copies:
                stored = add_call(self.surgery.graph, torch.ops.aten.clone.default, (source,), output)
        self.surgery.replace(output, stored)

    def _center_value(self, node: Node, axis: Axis, users: Iterable[Node | Norm]) -> list[Node]:
        """Readers of a value read its centred copy, made right after it.

        Where gradients are not recorded, a value may still have one: a graph input of a graph that starts so, or one
        handed on by an op that returns it itself. A copy made there would lose it, so each reader gets its own.
        """
        if self._switches_grad and (node.op == "placeholder" or not self._modes[node]):
            return self._center_operand(node, axis, users)
        last = node
        while node.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        with self.surgery.graph.inserting_after(last):
            centred = self._center(node, axis, node)
        for user in users:
            self._redirect(user, node, centred)
        return [centred]

    def _center_operand(self, node: Node, axis: Axis, users: Iterable[Node | Norm]) -> list[Node]:
        """Each reader of a weight, bias or table gets its centred form, computed just before the reader."""
        made: list[Node] = []
        for user in users:
            if isinstance(user, Node) and user in self._linears:
                slots = [name for name, operand in self._linears[user].items() if operand is node]
                made += [self._center_slot(user, name, axis) for name in slots]
                continue
            with self.surgery.before(min(user.nodes) if isinstance(user, Norm) else user, node):
                like = user.output if isinstance(user, Norm) else user
                centred = self._center(node, axis, like)
            self._redirect(user, node, centred)
            made.append(centred)
        return made

    def _center_writer(self, linear: Node, axis: Axis) -> list[Node]:
        """Centre the weight and bias of a linear over its whole output axis, as they stand now."""
        dims = output_dims(linear)
        return [self._center_slot(linear, name, Axis(dim, axis.size)) for name, dim in dims.items()]

    def _center_block(self, block: Block) -> list[Node]:
        """Centre some rows of the weight and bias of a linear, as they stand now."""
        linear, made = block.linear, []
        for name, dim in output_dims(linear).items():
            for first, end in block.places:
                operand = arguments(linear)[name]
                given = (operand, dim, block.period, first, end, block.axis.size, block.axis.inner)
                with self.surgery.before(linear, operand):
                    made.append(self.surgery.fold(ops.CENTER_BLOCK, given, linear))
                set_argument(linear, name, made[-1])
        return made

    def _center_slot(self, linear: Node, name: str, axis: Axis) -> Node:
        """Centre what stands in an argument of a linear now: another rule may have folded something into it."""
        operand = arguments(linear)[name]
        with self.surgery.before(linear, operand):
            centred = self._center(operand, axis, linear)
        set_argument(linear, name, centred)
        return centred

    def _center(self, node: Node, axis: Axis, like: Node) -> Node:
        return self.surgery.fold(ops.CENTER, (node, axis.dim, axis.size, axis.inner), like)

    def _fold_output_scale(self, linear: Node, scale: Node, product: Node) -> None:
        """scale ⊙ linear → the linear with λ in weight and bias; readers of the product read its other operand."""
        fake = value(scale)
        assert fake is not None
        for name, dim in output_dims(linear).items():
            operand = arguments(linear)[name]
            with self.surgery.before(linear, operand, scale):
                scaled = self.surgery.fold(ops.SCALE_FEATURES, (operand, scale, dim, fake.numel(), 1), linear)
            set_argument(linear, name, scaled)
        args = arguments(product)
        plain = args["other"] if args["self"] is scale else args["self"]
        self.surgery.replace(product, self.surgery.cast(plain, product))

    def _redirect(self, user: Node | Norm, old: Node, new: Node) -> None:
        if isinstance(user, Norm):
            self.norm(user).input = new
        else:
            user.replace_input_with(old, new)
