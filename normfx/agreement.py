"""Processes that compute one stream together rewrite it alike, or none of them does.

A sum over processes is centred only if each of them centres its term. Each decides for itself, from its own graph; what
it decides may hang on the memory that it has left, on its options, on a stage that failed. So before a graph with
collectives is compiled, the processes that run it compare what they decided, through the store by which they found
each other. The first of them says what it decided. If one differs, or does not come in time, all leave what passes
through others as it is. The outcome is one entry that is written once, so that all read the same.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node

from normfx.compat import pytree
from normfx.compat.distributed import everyone, is_distributed, is_even, ranks_of, ranks_of_group, shared_store
from normfx.compat.operators import OpOverload, OpOverloadPacket, namespace
from normfx.errors import NormfxError
from normfx.graph.regions import target_name

WAIT = timedelta(minutes=5)
"""How long a process waits for the others to compile the same graph. It is not the time that compiling takes."""

AGREED, REFUSED = "agreed", "refused"


class Decided(Protocol):
    """What came of a graph; `decided` says what other processes must have decided too."""

    @property
    def decided(self) -> str: ...


T = TypeVar("T", bound=Decided)


def together(gm: GraphModule, given: str, make: Callable[[bool], T]) -> tuple[T, str]:
    """What is made of a Dynamo graph, and why not what others take part in; "" where all of them decided the same, or
    there are no others.

    given: what else decides, the same in all processes
    make:  is told whether the others do the same

    Raises what `make` raises, after the others were told; and NormfxError where the others already run the graph
    rewritten and this process could not compute with them.
    """
    groups = {group for group in _groups(gm) if len(group) > 1}
    if not groups:
        return make(True), ""
    why = "tensors are spread over several groups of processes" if len(groups) > 1 else ""
    if not all(is_even(value) for value in _distributed(gm)):
        why = "the processes hold parts of different sizes"
    if why:
        return make(False), why
    (ranks,) = groups
    store = shared_store(f"normfx/{_digest(_question(gm, given, ranks))}")
    decided = "failed"
    try:
        made = make(True)
        decided = made.decided
    finally:
        agreed = _agree(store, _digest(decided), len(ranks))
    if agreed:
        return made, ""
    return make(False), "not all processes decided the same, or compiled this graph in time"


def _agree(store: Any, mine: str, count: int) -> bool:
    """Whether all decide as this process does, now. Once all have, one may decide otherwise only if all do so again."""
    for turn in itertools.count():
        first, state = _vote(store, mine, count, f"{turn}/")
        if first == mine or state == REFUSED:
            break
    if state == REFUSED and turn > 0:
        raise NormfxError(
            "normfx: the other processes run a graph that they rewrote together, and this one now decides otherwise: "
            "give all processes the same options and the same memory"
        )
    return state == AGREED


def _vote(store: Any, mine: str, count: int, turn: str) -> tuple[str, str]:
    """What the first process decided, and the outcome, which is the same for all who ask."""
    decided, votes, state = (turn + name for name in ("decided", "votes", "state"))
    first = store.compare_set(decided, "", mine).decode()
    if first != mine:
        store.compare_set(state, "", REFUSED)
    elif store.add(votes, 1) == count:
        store.compare_set(state, "", AGREED)
    try:
        store.wait([state], WAIT)
    except dist.DistStoreError:
        store.compare_set(state, "", REFUSED)
    return first, store.get(state).decode()


def _groups(gm: GraphModule) -> Iterator[frozenset[int]]:
    """The processes that take part in each call of a graph."""
    for value in _distributed(gm):
        yield ranks_of(value.device_mesh)
    for node in _nodes(gm):
        if _space(node.target).startswith("_c10d_functional") and len(node.args) > 1:  # the group's name comes last
            yield ranks_of_group(node.args[-1]) if isinstance(node.args[-1], str) else everyone()


def _nodes(gm: GraphModule) -> Iterator[Node]:
    """The nodes of a graph and of the regions in it."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def _space(target: object) -> str:
    if isinstance(target, OpOverload):
        return target.namespace
    return namespace(target) if isinstance(target, OpOverloadPacket) else ""


def _distributed(gm: GraphModule) -> Iterator[Any]:
    for node in _nodes(gm):
        yield from filter(is_distributed, pytree.tree_leaves(node.meta.get("example_value")))


def _question(gm: GraphModule, given: str, ranks: Iterable[int]) -> str:
    """What processes have in common that run the same program: calls, numbers, and sizes of what is computed."""
    modes = [torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))]
    lines = [f"{sorted(ranks)} {modes} {given}"]
    for node in _nodes(gm):
        name = "" if node.op == "placeholder" else target_name(node)
        numbers = [a for a in pytree.arg_tree_leaves(*node.args, **node.kwargs) if isinstance(a, (bool, int, float))]
        lines.append(f"{node.op} {name} {numbers} {_sizes(node)}")
    return "\n".join(lines)


def _sizes(node: Node) -> list[str]:
    """Sizes, dtypes and layouts; of a symbolic size the number seen, by which rules decide."""
    leaves = pytree.tree_leaves(node.meta.get("example_value"))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [
        f"{tensor.dtype}{[_size(dim) for dim in tensor.shape]}{getattr(tensor, 'placements', '')}{tensor.requires_grad}"
        for tensor in tensors
    ]


def _size(dim: Any) -> str:
    if isinstance(dim, int):
        return str(dim)
    return str(dim.node.hint if dim.node.has_hint() else "?")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
