"""What reads a norm: linears reached through ops that pass whole rows on, and everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Node

from normfx.compat.distributed import is_distributed
from normfx.graph.facts import Facts
from normfx.graph.nodes import (
    SHAPE_READS,
    arguments,
    entry_readers,
    extent,
    is_getitem,
    is_one,
    occurrences,
    op_name,
    shape,
    value,
)
from normfx.graph.shards import crossing, is_summed
from normfx.ir.affine import Affine
from normfx.ir.sites import Axis, Linear, Norm, Readers, Scaled
from normfx.recognize.axes import reshape_axis
from normfx.recognize.flow import CASTS, CONVOLUTIONS, PARTS, RESHAPES, Constants, flow
from normfx.recognize.packed import Packing
from normfx.recognize.products import product

ROW_OPS = (
    RESHAPES
    | (CASTS - {"aten::detach"})  # through it γ and β would get gradients that they do not have
    | PARTS
    | {
        "aten::permute", "aten::transpose.int", "aten::t", "aten::mT", "aten::swapaxes", "aten::movedim.int",
        "aten::movedim.intlist", "aten::expand", "aten::expand_as", "aten::dropout", "aten::select.int",
        "aten::slice.Tensor", "aten::narrow", "aten::index_select", "aten::index.Tensor", "aten::gather",
        "aten::take_along_dim", "aten::unfold", "aten::roll", "aten::flip",
        "aten::repeat", "aten::repeat_interleave.self_int", "aten::mean.dim", "aten::adaptive_avg_pool1d",
        "aten::adaptive_avg_pool2d",
    }
)  # fmt: skip
"""Ops whose every output row is an input row or a mean of input rows: γ and β pass them (M7). Not cat, padding, sums or
token scales."""

LARGEST_FACTOR = 2.0**24
"""Numbers beyond it, and below its reciprocal, stay where a model multiplies by them."""

NUMBER_SCALES = frozenset({"aten::mul.Tensor", "aten::mul.Scalar", "aten::div.Tensor", "aten::div.Scalar"})


def find_all_readers(
    facts: Facts, norms: Iterable[Norm], convolutions: bool = True, scalings: Mapping[Norm, Affine] | None = None
) -> dict[Norm, Readers]:
    """Readers of each norm, with the weights that norms of different γ or β share.

    Rows of a norm are no weight of another's reader (a product of queries and keys): they too would lose γ and β.

    convolutions: they may take γ and β (a norm over channels is seldom a module of torch.nn itself)
    scalings: what those among the norms that are none do
    """
    constants = Constants(facts.written)
    packing = Packing(facts)
    found = {norm: find_readers(norm, facts, constants, packing, convolutions) for norm in norms}
    rows = frozenset(node for readers in found.values() for node in readers.axes)
    found = {norm: readers.without_weights(rows) for norm, readers in found.items()}
    affines: dict[Node, set[object]] = {}
    for norm, readers in found.items():
        own = (scalings or {}).get(norm, (norm.weight, norm.bias))
        for linear, _, _ in readers.linears:
            affines.setdefault(linear.weight, set()).add(own)
    for norm, readers in found.items():
        shared = tuple(linear.node for linear, _, _ in readers.linears if len(affines[linear.weight]) > 1)
        found[norm] = replace(readers, shared=shared)
    return found


def is_ordinary(factor: float) -> bool:
    """Whether a factor may move to another value. That makes nothing overflow or vanish, except entries that are near
    the limits of their dtype already."""
    return 1 / LARGEST_FACTOR <= abs(factor) <= LARGEST_FACTOR


def number_factor(node: Node, operand: Node) -> float | None:
    """k where the node is operand·k or operand/k with an ordinary number k."""
    if op_name(node) not in NUMBER_SCALES:
        return None
    args = arguments(node)
    other = args["other"] if args["self"] is operand else args["self"]
    if not isinstance(other, (int, float)) or isinstance(other, bool):
        return None
    divides = op_name(node).startswith("aten::div")
    if divides and args["self"] is not operand:
        return None
    if not is_ordinary(other):
        return None
    return 1.0 / other if divides else float(other)


def find_scaled(norm: Norm, facts: Facts) -> Scaled | None:
    """norm(x)·k, when the multiplication is the norm's only reader, in the same gradient mode, and never written."""
    users = [u for u in norm.output.users if op_name(u) not in SHAPE_READS]
    if norm.fixed or len(users) != 1 or facts.modes[users[0]] != facts.modes[norm.output]:
        return None
    factor = number_factor(users[0], norm.output)
    return None if factor is None or users[0] in facts.written else Scaled(norm, users[0], factor)


def find_readers(
    norm: Norm, facts: Facts, constants: Constants, packing: Packing, convolutions: bool = True
) -> Readers:
    """Walk forwards from a norm's output along its feature axis.

    Nothing in another gradient mode than the norm can take γ and β on: they would gain or lose gradients.
    """
    barred, modes = facts.written, facts.modes
    linears: list[tuple[Linear, Axis, float]] = []
    path: list[Node] = []
    others: list[Node] = []
    padded: list[Node] = []
    packed: list[Node] = []
    axis = norm.axis
    axes = {norm.output: axis} if axis is not None else {}
    work = [(norm.output, axis, 1.0)] if axis is not None else []
    if axis is None:
        others += norm.output.users
    while work:
        node, axis, factor = work.pop()
        for user in entry_readers(node):
            same_mode = modes[user] == modes[norm.output]
            linear = None
            if value(node) is not None:  # it is no list of pieces
                linear = linear_reader(user, node, axis, facts.parameters, norm.bias is not None)
                linear = linear or looked_up_reader(user, node, axis, norm, facts, constants)
                if linear is None and convolutions and (over := channel_reader(user, node, axis, facts.parameters)):
                    linear = None if norm.bias is not None and not sums_all(user) else over
                    padded += [user] if linear is None and same_mode else []
                linear = linear if linear is None or laid_out_alike(linear, norm) else None
            factor_here = number_factor(user, node)
            onward = _forward(user, node, axis, constants) if passes_rows(user) else None
            if not same_mode:
                others.append(user)
            elif packing.multiplies(user) and (linear is None or linear.weight not in facts.parameters):
                packed.append(user)
            elif (
                linear is not None and user not in barred and linear.weight not in barred and linear.bias not in barred
            ):
                linears.append((linear, Axis(linear.in_dim, axis.size, axis.inner), factor))
            elif factor_here is not None and is_ordinary(factor * factor_here) and user not in barred:
                path.append(user)
                axes[user] = axis
                work.append((user, axis, factor * factor_here))
            elif onward is not None and user not in barred:
                path.append(user)
                axes[user] = onward
                work.append((user, onward, factor))
            else:
                others.append(user)
    computed = frozenset(linear.weight for linear, _, _ in linears) - facts.parameters
    return Readers(
        norm,
        tuple(linears),
        tuple(path),
        tuple(others),
        tuple(padded),
        tuple(packed),
        live=facts.live | computed,
        axes=axes,
        computed=computed,
        adds_apart=facts.adds_apart,
    )


def laid_out_alike(linear: Linear, norm: Norm) -> bool:
    """Whether a linear's weight and a norm's γ and β are all DTensors, or all none: one op takes no mixture."""
    affine = [node for node in (norm.weight, norm.bias) if node is not None]
    return len({is_distributed(value(node)) for node in (linear.weight, *affine)}) == 1


def passes_rows(user: Node) -> bool:
    """Whether every row that comes out is one that went in, or a mean of such."""
    if op_name(user) in ("aten::pad", "aten::constant_pad_nd"):
        args = arguments(user)
        copies = args.get("mode", "constant") in ("reflect", "replicate", "circular")
        return copies or not any(args["pad"])  # Swin's blocks pad in any case
    if crossing(user):
        return not any(is_summed(value(node)) for node in (user, user.args[0]))
    return op_name(user) in ROW_OPS or is_getitem(user)


def _forward(user: Node, node: Node, axis: Axis, constants: Constants) -> Axis | None:
    """The axis inside `user` that flow() traces back to `axis` of `node`."""
    fake = value(user)
    if op_name(user) in RESHAPES:
        found = reshape_axis(shape(node), shape(user), axis)
        candidates = [] if found is None else [found]
    else:
        ndim = fake.ndim if fake is not None else len(value_of_part(user).shape)
        candidates = [axis.at(dim) for dim in range(ndim)]
    for candidate in candidates:
        step = flow(user, candidate, constants)
        if step is not None and step.carried == ((node, axis),) and not step.dropped and occurrences(user, node) == 1:
            return candidate
    return None


def value_of_part(node: Node):  # type: ignore[no-untyped-def]  # a fake tensor, whose class is torch-private
    """Fake value of the first piece of a list-valued node."""
    return node.meta["val"][0]


def linear_reader(user: Node, node: Node, axis: Axis, parameters: frozenset[Node], shifted: bool) -> Linear | None:
    """The linear through which `user` reads `node` over its feature axis, with a floating weight: a matrix, or, of
    parameters alone, a stack of them.

    shifted: the norm has a β. Some products have no place for Wβ: a grouped one would need each row's own group's
    """
    found = product(user, node, axis.dim)
    if found is None or occurrences(user, node) != 1 or (shifted and not found.takes_shift):
        return None
    weight = value(found.weight)
    if weight is None or not weight.is_floating_point() or (found.bias is not None and value(found.bias) is None):
        return None
    if weight.ndim != 2 and (weight.ndim < 2 or len(shape(node)) < 2):
        return None
    return found if found.weight in parameters or weight.ndim == 2 else None


def looked_up_reader(
    user: Node, node: Node, axis: Axis, norm: Norm, facts: Facts, constants: Constants
) -> Linear | None:
    """A product with weights that are looked up in a parameter, for each row its own: γ goes into the parameter.

    A β stays: each row would need the Wβ of its own weight.
    """
    found = product(user, node, axis.dim)
    alone = norm.kind != "Affine" and norm.bias is None and norm.weight is not None
    if found is None or not alone or norm.weight is None or occurrences(user, node) != 1:
        return None
    weight, reader, inside = found.weight, user, Axis(found.in_dim, axis.size * axis.inner)
    while weight not in facts.parameters:
        step = None if value(weight) is None else flow(weight, inside, constants)
        if step is None or len(step.carried) != 1 or step.dropped or entry_readers(weight) != [reader]:
            return None
        ((operand, inside),) = step.carried
        if weight in facts.written or facts.modes[weight] != facts.modes[norm.output] or op_name(weight) in _DETACHES:
            return None
        reader, weight = weight, operand
        if occurrences(reader, weight) != 1:
            return None
    names = [name for name, operand in arguments(reader).items() if operand is weight] if op_name(reader) else []
    whole = inside.inner == 1 and shape(weight)[inside.dim] == axis.size * axis.inner
    if reader is user or len(names) != 1 or not whole or not facts.order.can_lift(norm.weight, reader):
        return None
    return replace(
        found, weight=weight, bias=None, weight_arg=names[0], in_dim=inside.dim, part=None, out_dims=None, lookup=reader
    )


_DETACHES = ("aten::detach",)
"""Through these γ would get no gradient."""


def channel_reader(user: Node, node: Node, axis: Axis, parameters: frozenset[Node]) -> Linear | None:
    """The convolution through which `user` reads `node` over its features, which are all of the channels."""
    found = convolution(user)
    if found is None or found.value is not node or occurrences(user, node) != 1 or not of_parameters(found, parameters):
        return None
    channels = len(shape(node)) - len(shape(found.weight)) + 1
    whole = axis.inner == 1 and extent(shape(node)[axis.dim]) == axis.size
    return found if axis.dim == channels and whole else None


def sums_all(node: Node) -> bool:
    """Whether each entry that a convolution computes is a sum over all of its weight: it pads nothing, and is not
    transposed."""
    args = arguments(node)
    places = shape(args["weight"])[2:]
    padding: Any = args["padding"]
    if isinstance(padding, str):
        unpadded = padding == "valid" or all(is_one(n) for n in places)
    else:
        unpadded = all(isinstance(n, int) and n == 0 for n in padding)
    return unpadded and not args.get("transposed", "transpose" in op_name(node))


def convolution(node: Node) -> Linear | None:
    """A convolution as a linear: its operands, and its groups."""
    if op_name(node) not in CONVOLUTIONS:
        return None
    args = arguments(node)
    transposed = args.get("transposed", "transpose" in op_name(node))
    in_dim = 0 if transposed else 1
    return Linear(node, args["input"], args["weight"], args["bias"], "weight", "bias", in_dim, args["groups"])


def of_parameters(linear: Linear, parameters: frozenset[Node]) -> bool:
    """Whether the weight is a floating value of parameters alone, and the bias, if there is one, too."""
    weight = value(linear.weight)
    bias = linear.bias is None or (linear.bias in parameters and value(linear.bias) is not None)
    return bias and linear.weight in parameters and weight is not None and weight.is_floating_point()
