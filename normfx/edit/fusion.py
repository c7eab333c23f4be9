"""Canonical norms and what stands next to them, become one op: a centring of the output, an equal norm of the same
value, the residual add that a norm reads, the norm before that add."""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node

from normfx.graph.calls import add_call, add_norm
from normfx.graph.nodes import SHAPE_READS, arguments, grad_modes, occurrences, op_name, shape
from normfx.graph.order import Order
from normfx.graph.recompute import region_of
from normfx.ir import ops
from normfx.ir.fused_ops import ADDS, CALLS, Inner, norm_call
from normfx.ir.sites import Norm, Residual


class Fusion:
    """Fuses norms and residual adds of one graph, after all norms were written.

    written: the op of each norm, kept up to date; shared: norms that became one with an earlier one
    """

    def __init__(self, graph: Graph, written: Mapping[Norm, Node]) -> None:
        self.graph, self.written = graph, dict(written)
        self.shared: dict[Norm, Norm] = {}
        self.norms: dict[Node, list[Norm]] = {}
        self.modes = grad_modes(graph)
        self.order = Order(graph)

    def centre_outputs(self) -> None:
        """A norm whose rows are read centred alone emits them so (maths M9)."""
        for node in dict.fromkeys(self.written.values()):
            centrings = [user for user in node.users if op_name(user) not in SHAPE_READS]
            if not centrings or not all(self._centres(user, node) for user in centrings):
                continue
            dtype: Any = centrings[0].args[4]
            if any(centring.args[4] != dtype for centring in centrings):
                continue
            call = norm_call(node)
            node.args = replace(call, form=call.form._replace(out_dtype=dtype, centre_output=True)).args
            node.meta["val"] = centrings[0].meta["val"]
            for centring in centrings:
                centring.replace_all_uses_with(node)
                self.graph.erase_node(centring)

    def _centres(self, user: Node, node: Node) -> bool:
        if user.target is not ops.CENTER or node.target is ops.CRMS_NORM:
            return False
        dim = norm_call(node).form.dim
        whole = (node, dim, shape(node)[dim], 1)
        same = self.modes[user] == self.modes[node] and region_of(user) == region_of(node)
        return user.args[:4] == whole and same

    def share(self, leaving: Collection[Norm]) -> None:
        """Norms that have become the same function of the same value are computed once.

        leaving: norms whose memory the graph returns or writes; each has its own
        """
        first: dict[Hashable, Norm] = {}
        for norm, node in sorted(self.written.items(), key=lambda item: item[1]):
            if norm in leaving:
                continue
            known = first.setdefault((node.target, node.args, self.modes[node], region_of(node)), norm)
            if known is not norm:
                node.replace_all_uses_with(self.written[known])
                self.graph.erase_node(node)
                self.written[norm], self.shared[norm] = self.written[known], known
        for norm, node in self.written.items():
            self.norms.setdefault(node, []).append(norm)

    def fuse(self, site: Residual) -> None:
        """The add, the norm that reads it and the norm that feeds it, as far as they still stand side by side."""
        norm, add = self.written[site.norm], site.node
        if norm.target not in ADDS or norm.args[0] is not add:
            return  # shared with a norm that has taken the add in
        given = arguments(add)
        x, residual, alpha = given["other" if site.argument == "self" else "self"], given[site.argument], site.alpha
        if site.scaled is not None and residual is site.scaled:
            alpha, residual = alpha * _factor(residual), _source(residual)
        inner = self.written.get(site.inner) if site.inner is not None else None
        if inner is not None and (x is not inner or set(inner.users) != {add} or occurrences(add, inner) != 1):
            inner = None
        place = min([user for user in add.users if user is not norm and user < norm], default=norm)
        vectors = [vector for vector in norm.args[1:3] if isinstance(vector, Node)]
        if not all(self.order.can_lift(vector, place) for vector in vectors):
            return  # a centred copy of the sum was made before its weight
        for vector in vectors:
            self.order.lift(vector, place)
        with self.graph.inserting_before(place):
            new = self._write(norm, inner, x, residual, alpha)
            out, total = (add_call(self.graph, operator.getitem, (new, i), like) for i, like in enumerate((norm, add)))
        self.modes.update(dict.fromkeys((new, out, total), self.modes[norm]))
        for old, part in ((norm, out), (add, total)):
            old.replace_all_uses_with(part)
        for old in (norm, add, *([inner] if inner is not None else ())):
            self.graph.erase_node(old)
        for node in (norm, *([inner] if inner is not None else ())):
            self.written.update(dict.fromkeys(self.norms[node], new))

    def _write(self, norm: Node, inner: Node | None, x: Any, residual: Any, alpha: float) -> Node:
        call, first = norm_call(norm), None
        if inner is not None:
            before = norm_call(inner)
            x, first = before.x, Inner(before.weight, before.bias, before.form)
        return add_norm(self.graph, replace(call, x=x, residual=residual, alpha=alpha, inner=first), norm)


def _factor(product: Node) -> float:
    args = arguments(product)
    numbers = [args[name] for name in ("self", "other") if not isinstance(args[name], Node)]
    return 1.0 / numbers[0] if op_name(product).startswith("aten::div") else float(numbers[0])


def _source(product: Node) -> Node:
    (source,) = product.all_input_nodes
    return source


def centres_output(node: Node) -> bool:
    """Whether a canonical norm, or the norm before an add, emits centred rows."""
    return node.target in CALLS and any(form.centre_output for form in norm_call(node).forms)
