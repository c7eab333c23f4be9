"""Takes the folds of a graph out of it, as far as they fit into the memory that they may take: they become inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from normfx.capture.trace import Captured
from normfx.errors import NormfxError
from normfx.graph.nodes import tensor
from normfx.lower.affordable import UNPACK, chosen
from normfx.lower.hoist import Folding, hoist
from normfx.lower.joined import join_linears
from normfx.lower.packed import pack_linears, take_gelus
from normfx.lower.packed_convolution import pack_convolutions
from normfx.lower.wide import widen
from normfx.options import Options
from normfx.weights.budget import budget
from normfx.weights.kept import keepable, kept_values, records_gradients


def keepable_weights(captured: Captured, settings: Options) -> frozenset[Node]:
    """The weights whose folds may be kept between calls under these options."""
    graph = captured.graph_module.graph
    return keepable(graph, captured.weights, captured.trained, everywhere=settings.fold != "auto")


def keep_folds_outside(
    captured: Captured,
    settings: Options,
    packs: bool,
    widens: bool,
    values: Mapping[Node, torch.Tensor],
    plain_row: Callable[[torch.dtype], bool],
) -> tuple[Folding | None, Mapping[str, Any]]:
    """Take the folds out of the graph, as far as they fit into the memory that they may take.

    packs:     and the weights of its linear layers and convolutions, where packed ones are faster
    widens:    and let bfloat16 products and attention compute in float32, where that is faster
    plain_row: whether products of one row are as fast by weights of a dtype that are not packed
    Returns them and the fields of records.FoldReport that say what fitted.
    """
    gm, free = captured.graph_module, keepable_weights(captured, settings)
    if widens:
        widen(gm, free)
    if packs:
        join_linears(gm, free, plain_row)
        pack_linears(gm, free, values, plain_row)
        pack_convolutions(gm, free, values)
    devices = {tensor(node).device for node in free}
    budgets = functools.cache(partial(budget, settings.fold_memory))
    names = {node: source.name for node, source in captured.sources.items()}
    rebinds = records_gradients(gm.graph)
    fitting = chosen(gm, kept_values(gm.graph, free), lambda device: budgets(device).room, names, values, rebinds)
    folding = hoist(gm, fitting.kept, partial(_fits, settings.fold_memory, tuple(devices)))
    take_gelus(gm)
    left = [node.name for node in gm.graph.nodes if node.target in UNPACK]
    if left:
        raise NormfxError(f"normfx: packed weights that cannot be kept: {', '.join(left)}; please report this graph")
    return folding, {"budget": sum(budgets(device).limit for device in devices), "left": fitting.left}


def _fits(fold_memory: int | None, devices: Sequence[torch.device], more: int) -> bool:
    return all(budget(fold_memory, device).room >= more for device in devices)
