"""Products of a value and a weight: which operand is which, and where Wβ would be added."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from normfx.graph.nodes import arguments, extent, op_name, shape, value
from normfx.ir.sites import Linear
from normfx.recognize.linears import einsum_letters


def product(user: Node, node: Node, dim: int) -> Linear | None:
    """The product in which `user` sums over this dimension of `node`, and over the weight's `in_dim`."""
    name = op_name(user)
    if name == "aten::einsum":
        return _einsum(user, node, dim)
    if name == "aten::tensordot":
        return _tensordot(user, node, dim)
    last = len(shape(node)) - 1
    found = _row_product(user) if dim == last else _column_product(user, node) if dim == last - 1 else None
    return found if found is not None and found.value is node else None


def _row_product(user: Node) -> Linear | None:
    """Which operands of a linear are its value, weight and bias; a stack of weights lies in the order (…, d, h)."""
    name = op_name(user)
    if name not in _READERS:
        return None
    args = arguments(user)
    if name == "aten::linear":
        return Linear(user, args["input"], args["weight"], args["bias"], "weight", "bias", 1)
    if name in ("aten::addmm", "aten::baddbmm"):
        bias = value(args["self"])
        if args["beta"] != 1 or args["alpha"] != 1 or bias is None:
            return None
        if name == "aten::baddbmm":
            return Linear(user, args["batch1"], args["batch2"], args["self"], "batch2", "self", 1)
        if bias.shape != shape(user)[1:]:
            return None
        return Linear(user, args["mat1"], args["mat2"], args["self"], "mat2", "self", 0)
    if name == "aten::_grouped_mm" and args["bias"] is not None:
        return None
    slot = "other" if name == "aten::matmul" else "mat2"
    weight = value(args[slot])
    if weight is None or weight.ndim < 2:
        return None
    grouped = name == "aten::_grouped_mm"
    return Linear(user, args["self"], args[slot], None, slot, None, weight.ndim - 2, takes_shift=not grouped)


_READERS = frozenset(f"aten::{name}" for name in ("linear", "addmm", "baddbmm", "mm", "bmm", "matmul", "_grouped_mm"))


def _column_product(user: Node, node: Node) -> Linear | None:
    """W y with a matrix W, of columns y."""
    if op_name(user) not in ("aten::mm", "aten::matmul"):
        return None
    args = arguments(user)
    matrix = value(args["self"])
    if matrix is None or matrix.ndim != 2:
        return None
    source = args["mat2" if "mat2" in args else "other"]
    return Linear(user, source, args["self"], None, "self", None, 1, out_dims=(len(shape(user)) - 2,))


def _einsum(user: Node, node: Node, dim: int) -> Linear | None:
    """Linear in each operand: γ goes into the one that has the letter of the features, which the output has not.

    β does where Wβ, of that operand alone, has a place in the output: where there are two, and no other letter is
    summed over.
    """
    args = arguments(user)
    operands = args["tensors"]
    spelled = einsum_letters(args["equation"], [len(shape(operand)) for operand in operands], len(shape(user)))
    if spelled is None or node not in operands:
        return None
    inputs, output = spelled
    own = operands.index(node)
    letter = inputs[own][dim]
    holders = [i for i, letters in enumerate(inputs) if letter in letters and i != own]
    if len(holders) != 1 or letter in output or inputs[own].count(letter) > 1:
        return None
    (part,) = holders
    weight, letters = operands[part], inputs[part]
    in_dim = letters.index(letter)
    if letters.count(letter) > 1 or extent(shape(weight)[in_dim]) != extent(shape(node)[dim]):
        return None
    rest = [other for other in letters if other != letter]
    kept = all(inputs[own].count(a) == 1 and a in output for a in inputs[own] if a != letter)
    kept = kept and len(operands) == 2 and len(set(rest)) == len(rest) and all(a in output for a in rest)
    if not kept or not all(isinstance(size, int) for size in shape(weight)):
        return Linear(user, node, weight, None, "tensors", None, in_dim, part=part, takes_shift=False)
    places = tuple(output.index(a) for a in rest)
    return Linear(user, node, weight, None, "tensors", None, in_dim, part=part, out_dims=places)


def _tensordot(user: Node, node: Node, dim: int) -> Linear | None:
    """Free dimensions of the first operand, then those of the second."""
    args = arguments(user)
    own, other = ("self", "other") if args["self"] is node else ("other", "self")
    weight = args[other]
    sums, dims = ([d % len(shape(args[n])) for d in args[f"dims_{n}"]] for n in (own, other))
    if args[own] is not node or value(weight) is None or sums != [dim]:
        return None
    if extent(shape(weight)[dims[0]]) != extent(shape(node)[dim]):
        return None
    free = len(shape(weight)) - 1
    first = len(shape(user)) - free if own == "self" else 0
    static = all(isinstance(size, int) for size in shape(weight))
    found = Linear(user, node, weight, None, other, None, dims[0], out_dims=tuple(range(first, first + free)))
    return found if static else replace(found, takes_shift=False)
