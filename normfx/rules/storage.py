"""In which entries crms_norm stores the rows of a stream: which channel goes, and how wide rows are.

Any choice is exact. In low precision it is not the same: an entry that is not stored comes back as a sum of all others,
with their rounding errors, and goes into what the readers take of it. So the channel is chosen by what the writers put
into each (E, the variance it gets of inputs of variance one) and what the readers take of each (R = Σ (γ W)²):

    "drop"          the error of xₚ = −Σu is that of the others: least Rₚ · Σ_{i ≠ p} Eᵢ
    "orthonormal"   every entry gets xₚ/(√d − 1), and xₚ = Σv/√d: least Eₚ · ΣR/(√d − 1)² + Rₚ · ΣE/d
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from normfx.edit import Stored
from normfx.graph.nodes import op_name, value
from normfx.ir.sites import Axis, Leaf, Readers, Stream
from normfx.recognize.flow import LINEARS

ALIGNED = 8
"""Entries of two bytes in an access of 16 bytes. Products with an odd width took 10 % of a training step on a CPU, and
on CUDA an odd row is read entry by entry: docs/crms.md."""

BASES = ("orthonormal", "drop")
WIDTHS = ("auto", "exact", "padded")

SAMPLE = 512
"""Rows of a table, or inputs of a weight, that are looked at."""


def storage(
    stream: Stream, readers: Iterable[Readers], basis: str, width: str, values: Mapping[Node, Tensor]
) -> Stored:
    """How to store the rows of a stream whose norms have these readers.

    width:  "exact": d − 1 entries; "padded": up to a multiple of ALIGNED; "auto": padded with gradients and on CUDA
    values: the present ones of parameters; without any, the last channel goes
    """
    d, fake = stream.norms[0].size, value(stream.norms[0].input)
    pads = width == "padded" or (width == "auto" and (torch.is_grad_enabled() or fake is None or fake.is_cuda))
    wide = -(-(d - 1) // ALIGNED) * ALIGNED if pads else d - 1
    written = sum((_written(leaf, values, d) for leaf in stream.leaves), torch.zeros(d, dtype=torch.float64))
    read = sum((_read(each, values, d) for each in readers), torch.zeros(d, dtype=torch.float64))
    return Stored(basis, d, _channel(basis, written, read), wide)


def _channel(basis: str, written: Tensor, read: Tensor) -> int:
    d = written.shape[0]
    if basis == "drop":
        errors = read * (written.sum() - written)
    else:
        errors = written * read.sum() / (math.sqrt(d) - 1) ** 2 + read * written.sum() / d
    known = bool(torch.isfinite(errors).all()) and bool(errors.any())
    return int(errors.argmin()) if known else d - 1


def _written(leaf: Leaf, values: Mapping[Node, Tensor], d: int) -> Tensor:
    """Variance that a leaf gives each channel, of its centred form."""
    zero = torch.zeros(d, dtype=torch.float64)
    if leaf.kind == "embedding":
        table = values.get(leaf.node.all_input_nodes[0])
        return zero if table is None else _energy(table, Axis(1, d), mean=True)
    if leaf.kind == "scaled" and leaf.linear is not None and leaf.scale is not None:
        scale = values.get(leaf.scale)
        sources = [(node, axis) for node, axis in _weights(leaf.linear, d) if node in values]
        factor = 1.0 if scale is None else scale.detach().cpu().double().reshape(-1) ** 2
        return sum((_energy(values[node], axis, mean=False) for node, axis in sources), zero) * factor
    value = values.get(leaf.node)
    if value is None:
        return zero
    weighs = any(isinstance(user, Node) and op_name(user) in LINEARS for user in leaf.users) and value.ndim > 1
    return _energy(value, leaf.axis, mean=not weighs)


def _weights(linear: Node, d: int) -> list[tuple[Node, Axis]]:
    """Parameters of a writer, with the dimension of its output features."""
    found = []
    for node in linear.all_input_nodes:
        dims = [dim for dim, n in enumerate(node.meta["val"].shape) if n == d]
        if dims:
            found.append((node, Axis(dims[0], d)))
    return found


def _read(readers: Readers, values: Mapping[Node, Tensor], d: int) -> Tensor:
    gamma = None if readers.norm.weight is None else values.get(readers.norm.weight)
    found = torch.zeros(d, dtype=torch.float64)
    for linear, axis, _ in readers.linears:
        weight = values.get(linear.weight)
        if weight is not None:
            found += _energy(weight, axis, mean=False, centred=False)
    return found if gamma is None else found * gamma.detach().cpu().double().reshape(-1) ** 2


def _energy(value: Tensor, axis: Axis, mean: bool, centred: bool = True) -> Tensor:
    """Squares summed over everything but the features, or their mean; from a sample of it."""
    rows = value.detach().movedim(axis.dim, -1).reshape(-1, axis.size)
    step = -(-rows.shape[0] // SAMPLE)
    rows = rows[::step].to("cpu", torch.float64)
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    squares = rows.square()
    return squares.mean(0) if mean else squares.sum(0) * step
