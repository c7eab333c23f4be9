"""Kept folds become inputs of their graph, which the store feeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from normfx.capture.cleanup import drop_dead_code
from normfx.graph.regions import attribute
from normfx.graph.views import settle
from normfx.lower.affordable import kept_bytes
from normfx.weights.kept import Kept, records_gradients
from normfx.weights.store import Fold, Folds


@dataclass(frozen=True, eq=False)
class Folding:
    """A graph whose kept folds are inputs, at the end; `folds` computes them from the other inputs and `attributes`."""

    graph_module: GraphModule
    folds: Folds
    inputs: tuple[Node, ...]
    attributes: tuple[torch.Tensor, ...]


def hoist(gm: GraphModule, kept: Sequence[Kept], fits: Callable[[int], bool] = lambda more: True) -> Folding | None:
    """Make inputs of the kept values of a graph, in place; None when there are none.

    fits: whether so many bytes more may be kept, asked when the graph is called with further sets of parameters
    """
    if not kept:
        return None
    placeholders = gm.graph.find_nodes(op="placeholder")
    sources = list(dict.fromkeys(node for item in kept for node in item.sources))
    held = [node for node in sources if node.op == "get_attr"]
    attributes = tuple(attribute(gm, str(node.target)) for node in held)
    place = {node: i for i, node in enumerate([*placeholders, *held])}
    order = {node: i for i, node in enumerate(sources)}
    rebinds = records_gradients(gm.graph)
    sizes = [kept_bytes(item.node) for item in kept]
    inputs = _feed(gm, [item.node for item in kept], "normfx_fold")
    folds = [
        _fold(item, tuple(order[n] for n in item.sources), node.meta["val"], size)
        for item, node, size in zip(kept, inputs, sizes, strict=True)
    ]
    return Folding(gm, Folds(folds, [place[n] for n in sources], rebinds, fits), inputs, attributes)


def _feed(gm: GraphModule, nodes: Sequence[Node], prefix: str) -> tuple[Node, ...]:
    """Replace values of a graph, in place, by new inputs after the old ones: the caller computes them.

    The inputs are marked static, as Dynamo marks parameters: their memory does not move from call to call.
    """
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1:]
    inputs: list[Node] = []
    for i, node in enumerate(nodes):
        where = gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
        with where:
            new = gm.graph.placeholder(f"{prefix}_{i}")
        new.meta["val"] = _detached(node.meta["val"])
        new.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        node.replace_all_uses_with(new)
        inputs.append(new)
        last = [new]
    drop_dead_code(gm.graph)
    settle(gm)
    return tuple(inputs)


def _detached(fake: Any) -> torch.Tensor:
    """A fake like this one, without history, that is not a view."""
    with fake.fake_mode, torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


def _fold(kept: Kept, sources: tuple[int, ...], fake: torch.Tensor, size: int) -> Fold:
    return Fold(kept.expression, sources, tuple(fake.shape), fake.stride(), fake.dtype, fake.device, size)


def fed(call: Callable[..., Any], folding: Folding) -> Callable[..., Any]:
    """What runs the graph, given only the arguments it had before folds became inputs."""
    values, attributes = folding.folds.values, folding.attributes
    if attributes:
        return lambda *args: call(*args, *values((*args, *attributes)))
    return lambda *args: call(*args, *values(args))
