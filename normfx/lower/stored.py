"""Residual sums that Inductor stores once, without gradients, instead of adding them up again in each kernel.

Inductor computes a pointwise value again in every kernel that reads it, until that takes more than four reads. Along a
residual stream s₁ = x + f₁, s₂ = s₁ + f₂ … the kernels that add and normalise read 2, 3, 4 and 5 times the bytes of a
sum, and the fourth writes its sum. With every sum stored each reads two and, but for the last, writes one (the norm's
output is written either way):

    sums   computed again   stored
    2      2 + 3            3 + 2
    3      2 + 3 + 4        3 + 3 + 2
    n      3.75 n           3 n           (in the long run)

So streams of three sums or more store theirs. Where gradients are recorded the backward reads the sums, and autograd's
partitioner decides what is stored. Nothing of this was measured on a device: see docs/benchmarks/cuda.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from normfx.compat.distributed import is_distributed
from normfx.compat.inductor import register_lowering
from normfx.graph.aliasing import mutated
from normfx.graph.calls import add_call
from normfx.graph.nodes import extent, op_name, tensor, value
from normfx.graph.views import settle
from normfx.ir.fused_ops import BODIES as FUSED
from normfx.ir.ops import define
from normfx.lower.choice import is_fusible, product_between, readers_of
from normfx.weights.kept import records_gradients

LEAST = 3
"""Sums of a stream, from which on storing them moves fewer bytes."""


def _clone(x: Tensor) -> Tensor:
    return x.clone()


STORED = define("stored(Tensor x) -> Tensor", _clone, "CompositeExplicitAutograd")
"""The same value, in memory: a copy, except in Inductor, where it is the value itself that is stored."""


def _store(x: Any) -> Any:
    """Inductor's form of the op, on its own values."""
    x.realize()
    return x


register_lowering(STORED, type_promotion_kind=None)(_store)


def pays(total: Tensor) -> bool:
    """Whether storing may pay on the device of a sum. On a CPU Inductor computes a sum before a norm in its own kernel,
    which reads and writes as much as is saved: six ViT-S blocks, float32, 0.90 to 1.02 times as fast, median 1.00."""
    return total.device.type != "cpu"


def store_sums(gm: GraphModule) -> int:
    """Let Inductor store the sums of residual streams, in place, where that moves fewer bytes; how many."""
    graph = gm.graph
    if records_gradients(graph):
        return 0
    order = {node: i for i, node in enumerate(graph.nodes)}
    after = _successors(graph, order)
    chosen = [total for add in after if _length(add, after) >= LEAST and (total := _total(add)) is not None]
    for node in chosen:
        users = list(node.users)
        with graph.inserting_after(node):
            new = add_call(graph, STORED, (node,), node)
        for user in users:
            user.replace_input_with(node, new)
    if chosen:
        settle(gm)
    return len(chosen)


def _successors(graph: Graph, order: Mapping[Node, int]) -> dict[Node, Node]:
    """Each add of a stream whose sum two kernels need, and the next add: a product of the one goes into the other."""
    written = mutated(graph)
    found: dict[Node, Node] = {}
    for add in filter(_adds, graph.nodes):
        total = _total(add)
        if total is None or total in written or not pays(tensor(total)):
            continue
        readers = readers_of(total)
        if not all(map(is_fusible, readers)):
            continue  # it is stored in any case
        follow = (r for r in readers if _adds(r) and _alike(r.args[0], total) and product_between(add, r, order))
        found.update((add, reader) for reader in itertools.islice(follow, 1))
    return found


def _length(add: Node, after: Mapping[Node, Node]) -> int:
    """How many adds the stream of an add has."""
    before = {later: earlier for earlier, later in after.items()}
    count, node = 1, add
    while node in before:
        count, node = count + 1, before[node]
    while add in after:
        count, add = count + 1, after[add]
    return count


def _adds(node: Node) -> bool:
    """Whether a node adds two values of one shape and dtype, alone or in one op with a norm."""
    if node.target not in FUSED and op_name(node) != "aten::add.Tensor":
        return False
    x, residual = node.args[:2]
    return _alike(x, residual) and (node.target in FUSED or _alike(x, node))


def _total(add: Node) -> Node | None:
    """The sum, if anything reads it but the norm that is in one op with the add."""
    if add.target not in FUSED:
        return add
    return next((part for part in add.users if part.args[1] == 1), None)


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments are tensors of one shape and floating-point dtype, not DTensors (never adds a guard)."""
    x, y = value(a), value(b)
    if x is None or y is None or x.dtype != y.dtype or not x.is_floating_point() or is_distributed(x):
        return False
    return [extent(d) for d in x.shape] == [extent(d) for d in y.shape]
