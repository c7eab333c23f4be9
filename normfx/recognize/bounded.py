"""Values whose entries are numbers of about 1 or smaller: norms, functions like tanh, x / sqrt(x² + c)."""

from __future__ import annotations

from torch.fx import Node

from normfx.graph.nodes import arguments, extent, op_name, shape, value
from normfx.recognize.readers import number_factor, passes_rows
from normfx.recognize.rows import same_shape

MULTIPLIES = frozenset({"aten::mul.Tensor", "aten::multiply.Tensor"})
DIVIDES = frozenset({"aten::div.Tensor", "aten::divide.Tensor", "aten::true_divide.Tensor"})

_FUNCTIONS = frozenset({
    "aten::tanh", "aten::erf", "aten::sigmoid", "aten::sin", "aten::cos", "aten::atan", "aten::arctan",
    "aten::hardtanh", "aten::hardsigmoid", "aten::relu6", "aten::softmax.int",
})  # fmt: skip

_ROOTS = {**dict.fromkeys(MULTIPLIES, "aten::rsqrt"), **dict.fromkeys(DIVIDES, "aten::sqrt")}

_SAME_ORDER = frozenset({"aten::reshape", "aten::view", "aten::contiguous", "aten::clone"})
"""Ops that keep the entries in their order."""


def is_bounded(node: Node, norms: frozenset[Node]) -> bool:
    """Whether a value is the output of a norm or such a function; numbers that multiply it are left aside.

    norms: outputs of norms
    """
    while node not in norms:
        if op_name(node) in _FUNCTIONS or _is_unit(node):
            return True
        inputs = node.all_input_nodes
        if len(inputs) != 1 or not (passes_rows(node) or number_factor(node, inputs[0]) is not None):
            return False
        (node,) = inputs
    return True


def _is_unit(node: Node) -> bool:
    """x / sqrt(s + c), or x · rsqrt(s + c): s is x², or the mean of x² over groups of entries (PowerNorm)."""
    name = op_name(node)
    if name not in _ROOTS:
        return False
    args = arguments(node)
    pairs = [(args["self"], args["other"])] + ([(args["other"], args["self"])] if name in MULTIPLIES else [])
    for x, root in pairs:
        if not isinstance(x, Node) or not isinstance(root, Node) or op_name(root) != _ROOTS[name]:
            continue
        inner = arguments(root)["self"]
        if op_name(inner) in ("aten::add.Tensor", "aten::add.Scalar"):
            terms = (arguments(inner)["self"], arguments(inner)["other"])
            return any(_is_square(term, x) or _is_mean_square(term, x) for term in terms)
    return False


def _is_square(node: object, x: Node) -> bool:
    """x², of a value with the entries of x in their order."""
    if not isinstance(node, Node) or op_name(node) not in MULTIPLIES | {"aten::square", "aten::pow.Tensor_Scalar"}:
        return False
    args = arguments(node)
    if args.get("exponent", 2) != 2 or args.get("other", args["self"]) is not args["self"]:
        return False
    return _flat(args["self"]) is _flat(x)


def _is_mean_square(node: object, x: Node) -> bool:
    """The mean of x² over runs of consecutive entries, once for each entry."""
    if not isinstance(node, Node):
        return False
    repeated = _flat(node)
    if op_name(repeated) not in ("aten::repeat_interleave.self_int", "aten::expand"):
        return False
    mean = _flat(arguments(repeated)["self"])
    if op_name(mean) != "aten::mean.dim":
        return False
    squares = arguments(mean)["self"]
    last = len(shape(squares)) - 1
    own = arguments(mean)
    if [dim % (last + 1) for dim in own["dim"] or ()] != [last] or not own["keepdim"] or not _is_square(squares, x):
        return False
    if "repeats" in (args := arguments(repeated)):
        along = args["dim"] is not None and args["dim"] % (last + 1) == last
        if not along or args["repeats"] != shape(squares)[-1]:
            return False
    whole = tuple(shape(repeated)), tuple(shape(squares))
    return same_shape(*whole) and extent(shape(node)[-1]) == extent(shape(x)[-1])


def _flat(node: Node) -> Node:
    """What holds the same entries in the same order, further up."""
    while op_name(node) in _SAME_ORDER and value(node) is not None:
        node = arguments(node)["self"]
    return node
