"""Canonical subgraphs → sites: norms, linears, residual streams."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from normfx.graph.facts import Facts
from normfx.ir.sites import Sites
from normfx.recognize.batch import find_batch_norms
from normfx.recognize.branches import find_branches
from normfx.recognize.composed import find_composed
from normfx.recognize.norms import find_norms
from normfx.recognize.pairs import find_pairs
from normfx.recognize.readers import find_all_readers, find_scaled
from normfx.recognize.residual import find_residuals
from normfx.recognize.scalings import find_scalings, told
from normfx.recognize.stream import find_streams


def recognize(facts: Facts, name: Callable[[Node], str], source: Callable[[Node], str], modules: bool = False) -> Sites:
    """All sites of a canonical graph.

    name, source: module path and source line of a node ("" when unknown); modules: norms will be modules of torch.nn
    """
    norms = find_norms(facts.graph, facts.parameters, name, source, facts.written, modules)
    scalings = {} if modules else find_scalings(facts, norms, name, source)
    over = [norm for norm in norms if norm.kind != "BatchNorm"]
    readers = find_all_readers(facts, [*over, *scalings], not modules, scalings)
    affines = tuple(told(scalings, readers, norms))
    scaled = {norm: found for norm in norms if (found := find_scaled(norm, facts)) is not None}
    batch_norms = tuple(find_batch_norms(facts, norms))
    return Sites(
        norms=tuple(sorted((*norms, *(site.norm for site in affines)), key=lambda norm: norm.output)),
        streams=find_streams(facts, norms),
        affines=affines,
        readers={norm: readers[norm] for norm in over},
        scaled=scaled,
        residuals=tuple(find_residuals(facts, norms, scaled.values())),
        batch_norms=batch_norms,
        composed=tuple(find_composed(facts)),
        pairs=tuple(find_pairs(facts)),
        branches=tuple(find_branches(facts, batch_norms)),
    )
