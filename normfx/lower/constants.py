"""The graph of a frozen variant: weights are constants, so that Inductor packs them and folds what depends on them.

Constants are copies, since a variant keeps no model alive; folds are the kept values themselves. Tables whose rows are
looked up gain nothing by it and stay inputs, as does what does not fit into the memory that may be taken.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat.inductor import PyCodeCache
from normfx.compat.modules import drop_tensors
from normfx.compat.tracing import TracingContext, detect_fake_mode, tracing
from normfx.graph.aliasing import mutated
from normfx.graph.nodes import tensor
from normfx.graph.regions import attribute
from normfx.lower.affordable import LAUNCH, Rooms, is_table, overflow, product_gain
from normfx.lower.gemm import onednn_is_faster, packing
from normfx.lower.hoist import Folding
from normfx.lower.inductor import compile_graph
from normfx.weights.kept import is_plain
from normfx.weights.watch import identity


class FrozenTemplate:
    """Builds the frozen variant of a graph. `weights`: its parameters, buffers and constants.

    sizes: bytes of the constants by type of device, kept folds among them
    left:  names and bytes of the weights that stay inputs because they do not fit
    """

    def __init__(
        self,
        gm: GraphModule,
        folding: Folding | None,
        weights: Iterable[Node],
        patches: Mapping[str, Any],
        room: Rooms,
    ) -> None:
        self.gm, self.folding, self.patches = with_constants(gm, {}), folding, {**patches, "freezing": True}
        inputs = gm.graph.find_nodes(op="placeholder")
        fed = set(folding.inputs) if folding else set()
        written = mutated(gm.graph)
        watched = [n for n in weights if n not in written and is_plain(n)]
        place = {node: i for i, node in enumerate(inputs)}
        self.picks = [place[node] for node in watched if node.op == "placeholder"]
        self.attributes = [attribute(gm, str(node.target)) for node in watched if node.op == "get_attr"]
        self.sizes = dict[str, int]()
        for node in folding.inputs if folding else ():
            kind = tensor(node).device.type
            self.sizes[kind] = self.sizes.get(kind, 0) + _frozen_bytes(tensor(node))
        useful = [node for node in watched if node.op == "placeholder" and node.users and not is_table(node)]
        constants = self._fitting(useful, room)
        self.left = {node.name: _frozen_bytes(tensor(node)) for node in useful if node not in constants}
        self.names = [node.name for node in constants]
        self.constants = [place[node] for node in constants]
        frozen = {*self.constants, *(place[n] for n in fed)}
        self.kept_inputs = [i for i in range(len(inputs)) if i not in frozen]
        self.static = not any(isinstance(node.meta.get("val"), torch.SymInt) for node in inputs)

    def _fitting(self, useful: Sequence[Node], room: Rooms) -> list[Node]:
        """The weights whose copies fit next to the folds; the largest gain per byte goes first."""
        left: set[Node] = set()
        for device in {tensor(node).device for node in useful}:
            sizes = {node: _frozen_bytes(tensor(node)) for node in useful if tensor(node).device == device}
            gains = {node: product_gain(node) + LAUNCH / max(1, size) for node, size in sizes.items()}
            folds = self.sizes.get(device.type, 0)
            left.update(overflow(sizes, gains, max(0, room(device) - folds)))
            self.sizes[device.type] = folds + sum(size for node, size in sizes.items() if node not in left)
        return [node for node in useful if node not in left]

    def let_go(self) -> None:
        """Drop the kept folds while their values are constants: the kept variant computes them when it is called."""
        if self.folding is not None:
            self.folding.folds.let_go()

    def build(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        """Compile with copies of the parameters among these arguments as constants: a variant keeps no model alive."""
        values = dict(zip(self.names, _copies([arguments[i] for i in self.constants]), strict=True))
        if self.folding is not None:
            folds = self.folding.folds.values((*arguments, *self.folding.attributes))
            values.update(zip((n.name for n in self.folding.inputs), folds, strict=True))
        gm = with_constants(self.gm, values)
        # fakes of Dynamo's own symbols: a real input would bring new ones, and guards on them that cannot be checked
        rest = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        mode = detect_fake_mode(rest)
        loaded = len(PyCodeCache.modules)
        packed = packing() if any(t.device.type == "cpu" for t in values.values()) else nullcontext()
        with tracing(TracingContext(mode)), torch.inference_mode(False), torch.no_grad(), packed:
            compiled = compile_graph(gm, rest, self.patches)
        drop_tensors(gm)  # the compiled function keeps the module, and has what it needs of these tensors itself
        _release_modules(loaded)
        return compiled


MKL = 2
"""Times its own size that a weight takes where MKL packs it: itself, and as much again packed (lower/packed.py)."""


def _frozen_bytes(weight: torch.Tensor) -> int:
    """Bytes that a weight takes as a constant, packed or not."""
    by_mkl = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.ndim == 2
    return weight.nbytes * (MKL if by_mkl and not onednn_is_faster() else 1)


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the same strides; tensors that are the same stay the same."""
    made: dict[Any, torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for t in tensors:
            if identity(t) not in made:
                empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                made[identity(t)] = empty.copy_(t)
    return [made[identity(t)] for t in tensors]


def _release_modules(loaded: int) -> None:
    """Let generated modules with constants, those after the first `loaded`, live only as long as their code is in use.

    Inductor lists every module it generated for the life of the process, and frozen parameters are attributes of them.
    """
    for module in PyCodeCache.modules[loaded:]:
        if any(isinstance(held, torch.Tensor) for held in vars(module).values()):
            PyCodeCache.modules.remove(module)
            sys.modules.pop(module.__name__, None)


def with_constants(gm: GraphModule, values: Mapping[str, torch.Tensor]) -> GraphModule:
    """A copy of a graph module in which the inputs of these names are attributes holding these tensors."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    held = {str(node.target): attribute(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.name in values:
            path = f"frozen_{node.name}"
            held[path] = values[node.name]
            copies[node] = graph.get_attr(path)
            copies[node].meta["val"] = node.meta["val"]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    result = GraphModule(held, graph)
    result.meta.update(gm.meta)
    return result
