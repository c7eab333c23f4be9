"""What defer_norm decides of: a norm with its readers, and what deferring it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from normfx.compat.operators import OpOverload
from normfx.graph.nodes import bytes_of, entries, op_name, shape, size_hint, total
from normfx.ir.sites import Linear, Norm, Readers
from normfx.recognize.flow import RESHAPES
from normfx.rules import cut, fold_affine
from normfx.rules.device import GPU, device_costs
from normfx.rules.rule import Cost, Objection


@dataclass(frozen=True, eq=False)
class Deferred:
    """A norm and its readers.

    plain:      no mean is subtracted: an RMSNorm, or rows that another rule has centred
    compressed: crms_norm stores the norm's rows, or those that a reader writes, in fewer entries
    folded:     γ and β are in the readers already
    followers:  BatchNorms that may be folded into a reader
    """

    readers: Readers
    plain: bool
    compressed: bool
    folded: bool
    followers: tuple[Node, ...]

    @property
    def norm(self) -> Norm:
        return self.readers.norm

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,)

    @property
    def folds(self) -> bool:
        """Whether the readers' weights become others."""
        return not self.plain or self.norm.weight is not None or self.norm.bias is not None

    @property
    def rows(self) -> tuple[Node, ...]:
        """The values that the readers read, each once."""
        return tuple(dict.fromkeys(linear.value for linear, _, _ in self.readers.linears))

    @property
    def live(self) -> tuple[Linear, ...]:
        """Readers whose weight would be folded in every call."""
        given = (self.norm.weight, self.norm.bias)
        found = [linear for linear, _, _ in self.readers.linears if self.folds]
        return tuple(linear for linear in found if not self.readers.live.isdisjoint({linear.weight, *given} - {None}))


def price_objections(site: Deferred) -> Iterator[Objection]:
    """What speaks against it in bytes: passes over rows, then over weights that are folded in every call."""
    weights = total(_live_cost(linear, site) for linear in site.live)
    price, sizes = cost(site), (site.norm.input, *site.rows, *_products(site), *(li.weight for li in site.live))
    before, after, folds = (size_hint(expr, sizes) for expr in (price.before, price.after, weights))
    if after - folds >= before:
        spread = [node for node in _products(site) if not _scaled_for_free(node)]
        found = ", ".join(node.name for node in spread) or site.norm.input.name
        yield "no_gain", f"{found}: {before} bytes before, {after - folds} after", (*spread, site.norm.output)
    elif after >= before:
        count = size_hint(total(entries(shape(linear.weight)) for linear in site.live), sizes)
        detail = f"{count} entries of weights, {size_hint(entries(shape(site.norm.output)), sizes)} normalised"
        yield "live_weights", detail, tuple(linear.node for linear in site.live)


def _products(site: Deferred) -> tuple[Node, ...]:
    return tuple(linear.node for linear, _, _ in site.readers.linears)


def _live_cost(linear: Linear, site: Deferred) -> sympy.Expr:
    """Bytes and launches for a weight that is folded in every call; γ and β count where no rule has folded them."""
    norm, costs = site.norm, device_costs(linear.node)
    passes = launches = 0
    if not site.folded and (norm.weight is not None or norm.bias is not None):
        passes, launches = fold_affine.LIVE_PASSES, fold_affine.LIVE_LAUNCHES
    if not site.plain:
        passes, launches = passes + cut.LIVE_PASSES, launches + cut.LIVE_LAUNCHES
    return passes * bytes_of(linear.weight) + sympy.Integer(launches * costs.launch)


def cost(site: Deferred) -> Cost:
    """Passes over rows, and over weights that are folded in every call.

    The norm: its statistics, one pass that writes the normalised rows, γ and β where they are not folded. Deferred: the
    statistics of each value that readers read. The products read x instead of the normalised rows. What they compute is
    read and written once more for the factor, and in backward too, unless only pointwise ops read it, into whose loop
    the compiler takes the factor. On a GPU rows that only the norm reads, and that no product stores, are now stored.
    """
    norm, costs = site.norm, device_costs(site.norm.output)
    rows, gpu = bytes_of(norm.output), costs is GPU
    statistics = (costs.rms_norm if site.plain else costs.layer_norm) - (0 if gpu else 1)
    trained = bool(site.live) and torch.is_grad_enabled()
    affine = costs.affine + (costs.affine_grad if trained else 0)
    affine = 0 if site.folded or (norm.weight is None and norm.bias is None) else affine
    spread = total(bytes_of(node) for node in _products(site) if not _scaled_for_free(node))
    unstored = gpu and norm.input.op == "call_function" and _is_pointwise(norm.input) and _is_only_reader(norm)
    after = total(statistics * bytes_of(node) for node in site.rows) + 2 * (2 if trained else 1) * spread
    after += (rows if unstored else 0) + total(_live_cost(linear, site) for linear in site.live)
    return Cost((statistics + 1 + affine) * rows, after)


def _scaled_for_free(product: Node) -> bool:
    """Whether pointwise ops alone read it, also through views."""
    readers = list(product.users)
    for user in readers:
        if op_name(user) in RESHAPES:
            readers += user.users
    return bool(readers) and all(op_name(user) in RESHAPES or _is_pointwise(user) for user in readers)


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_only_reader(norm: Norm) -> bool:
    return norm.nodes.issuperset(norm.input.users)
