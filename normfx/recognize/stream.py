"""Residual streams: which values may be stored centred, proved on the graph.

Backwards from the input of every LayerNorm, through the M3 ops of flow.py, lie the values that could be centred
("candidates"). A candidate may be centred in place iff each of its uses is a LayerNorm over exactly its feature axis,
or an M3 op whose result may itself be centred ("blind"). All others are "raw": somebody reads their mean. Values that
enter the blind region from outside (parameters, raw values, activations) are leaves; the region reads centred copies
of them, so their other users never forbid anything. Regions connected through blind values or shared leaves form one
Stream, which is decided as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import networkx
from torch.fx import Graph, Node

from normfx.graph.facts import Facts
from normfx.graph.nodes import (
    arguments,
    bytes_of,
    entry_readers,
    is_getitem,
    occurrences,
    op_name,
    shape,
    size_hint,
    value,
)  # fmt: skip
from normfx.graph.packing import packed_sources
from normfx.graph.shards import crossing, is_split, is_summed
from normfx.ir.sites import Axis, Block, Leaf, LeafKind, Norm, Stream
from normfx.recognize.flow import LINEARS, Constants, Flow, flow, scales_rows
from normfx.recognize.packed import Packing
from normfx.recognize.pieces import block_of


@dataclass
class _Region:
    """Candidates of a graph with their axis, and what reads raw ones."""

    facts: Facts
    norms: dict[Node, list[Norm]]
    outputs: Mapping[Node, Norm]
    constants: Constants
    packing: Packing
    axes: dict[Node, Axis] = field(default_factory=dict)
    flows: dict[Node, Flow] = field(default_factory=dict)
    conflicts: set[Node] = field(default_factory=set)
    witness: dict[Node, Node] = field(default_factory=dict)

    def blind(self, node: Node) -> bool:
        return node in self.flows and node not in self.witness


def find_streams(facts: Facts, norms: Iterable[Norm]) -> tuple[Stream, ...]:
    """All streams of a graph, in the order of their first norm; each LayerNorm is in exactly one."""
    graph = facts.graph
    seeds: dict[Node, list[Norm]] = {}
    outputs = {norm.output: norm for norm in norms}
    alone: list[Stream] = []
    for norm in outputs.values():
        if norm.kind != "LayerNorm":
            continue
        if norm.obstacle:
            alone.append(Stream((norm,), (), obstacle="opaque_norm", detail=norm.obstacle))
        elif norm.axis is None:
            detail = f"dimensions {norm.dims} of {norm.input.name}"
            alone.append(Stream((norm,), (), obstacle="several_axes", detail=detail))
        else:
            seeds.setdefault(norm.input, []).append(norm)
    region = _Region(facts, seeds, outputs, Constants(facts.written), Packing(facts))
    _collect(region)
    _mark_raw(graph, region)
    _enter_late(graph, region)
    place = {node: i for i, node in enumerate(graph.nodes)}
    return tuple(sorted([*alone, *_streams(graph, region, place)], key=lambda s: place[s.norms[0].output]))


def _collect(region: _Region) -> None:
    """Candidates: everything reached backwards through M3 ops, each with its feature axis."""
    work: list[tuple[Node, Axis]] = []
    for node, norms in region.norms.items():
        for norm in norms:
            assert norm.axis is not None
            work.append((node, norm.axis))
    while work:
        node, axis = work.pop()
        if node in region.axes:
            if region.axes[node] != axis:
                region.conflicts.add(node)
            continue
        if node in region.facts.parameters or node in region.facts.written or node in region.outputs:
            continue
        step = flow(node, axis, region.constants)
        if step is None or any(_also_coefficient(node, operand, step) for operand, _ in step.carried):
            continue
        if region.packing.unpacks(node, (operand for operand, _ in step.carried)):
            continue
        region.axes[node], region.flows[node] = axis, step
        work.extend(step.carried)


def _also_coefficient(node: Node, operand: Node, step: Flow) -> bool:
    return occurrences(node, operand) != sum(operand is carried for carried, _ in step.carried)


def _mark_raw(graph: Graph, region: _Region) -> None:
    """Fill `witness`: raw candidates, with the node that observes them (directly or through other raw values)."""
    for node in reversed(graph.nodes):
        if node not in region.flows:
            continue
        if node in region.conflicts:
            region.witness[node] = node
            continue
        for user in entry_readers(node):
            if _is_norm_use(node, user, region):
                continue
            axis = next((a for o, a in region.flows[user].carried if o is node), None) if user in region.flows else None
            if axis != region.axes[node]:
                region.witness[node] = user
                break
            if user in region.witness:
                region.witness[node] = region.witness[user]
                break

    for node in graph.nodes:
        if region.blind(node):
            for operand, _ in region.flows[node].carried:
                if value(operand) is None and not region.blind(operand):
                    region.witness[node] = region.witness.get(operand, operand)  # only single tensors can be leaves


def _enter_late(graph: Graph, region: _Region) -> None:
    """An activation that ops make smaller on its way into a stream enters after them: centring it is cheaper there.
    Token-mixing linears and poolings are such ops."""
    for node in graph.nodes:
        origin, chain = _origin(node, region)
        if origin is not None and size_hint(bytes_of(node), (node,)) < size_hint(bytes_of(origin), (origin,)):
            for passed in chain:
                del region.flows[passed], region.axes[passed]


def _origin(node: Node, region: _Region) -> tuple[Node | None, list[Node]]:
    """The activation that alone goes into a value of a stream, and the ops between, which nothing else reads."""
    chain: list[Node] = []
    while region.blind(node) and value(node) is not None and len(region.flows[node].carried) == 1:
        chain.append(node)
        ((operand, _),) = region.flows[node].carried
        if operand in region.norms or any(u is not node and region.blind(u) for u in operand.users):
            break
        if operand not in region.flows:
            known = (
                operand in region.facts.parameters or operand in region.outputs or op_name(operand) == "aten::embedding"
            )
            return (None if known or value(operand) is None else operand), chain
        if entry_readers(operand) != [node]:
            break
        node = operand
    return None, chain


def _is_norm_use(node: Node, user: Node, region: _Region) -> bool:
    """Whether this use is that of LayerNorms over exactly the candidate's axis."""
    for norm in region.norms.get(node, ()):
        if user in norm.nodes and norm.axis == region.axes[node]:
            return True
    return False


def _streams(graph: Graph, region: _Region, order: Mapping[Node, int]) -> list[Stream]:
    """Connected components of blind values, the norms that read them and their leaves."""
    links = networkx.Graph()
    operands: dict[Node | Norm, list[tuple[Node, Axis]]] = {}
    for node in graph.nodes:
        for norm in region.norms.get(node, ()):
            assert norm.axis is not None
            operands[norm] = [(node, norm.axis)]
        if region.blind(node):
            operands[node] = list(region.flows[node].carried)
    for reader, carried in operands.items():
        links.add_node(reader)
        for operand, axis in carried:
            if _inside(operand, axis, region):
                links.add_edge(reader, operand)
            elif operand not in region.facts.parameters:
                links.add_edge(reader, (operand, axis))  # one centred copy serves all: they are decided together
    streams = []
    for component in networkx.connected_components(links):
        norms = sorted((p for p in component if isinstance(p, Norm)), key=lambda n: order[n.output])
        nodes = sorted((p for p in component if isinstance(p, Node)), key=order.__getitem__)
        if norms:
            streams.append(_stream(norms, nodes, operands, region))
    return streams


def _inside(node: Node, axis: Axis, region: _Region) -> bool:
    return region.blind(node) and region.axes[node] == axis


def _stream(
    norms: list[Norm], nodes: list[Node], operands: Mapping[Node | Norm, list[tuple[Node, Axis]]], region: _Region
) -> Stream:
    users: dict[tuple[Node, Axis], list[Node | Norm]] = {}
    readers: list[Node | Norm] = [*nodes, *norms]
    for reader in readers:
        for operand, axis in operands[reader]:
            if not _inside(operand, axis, region):
                users.setdefault((operand, axis), []).append(reader)
    leaves = {key: _leaf(key, found, region) for key, found in users.items()}
    reads = {
        reader: tuple(o if _inside(o, axis, region) else leaves[o, axis] for o, axis in operands[reader])
        for reader in readers
    }
    dropped = tuple((node, name) for node in nodes for name in region.flows[node].dropped)
    written = any(op_name(n) in LINEARS for n in nodes) or any(leaf.kind == "packed" for leaf in leaves.values())
    joins = not written or any(_joins(node, region) for node in nodes)
    axes = {node: region.axes[node] for node in nodes}
    return Stream(tuple(norms), tuple(leaves.values()), reads, dropped, joins, region.facts.live, axes)


def _joins(node: Node, region: _Region) -> bool:
    step = region.flows[node]
    return bool(step.dropped) or (len(step.carried) > 1 and op_name(node) not in LINEARS)


def _leaf(key: tuple[Node, Axis], users: list[Node | Norm], region: _Region) -> Leaf:
    node, axis = key
    kind: LeafKind = "value"
    scale = linear = block = None
    path: tuple[tuple[Node, Axis], ...] = ()
    if node in region.facts.parameters:
        kind = "parameter"
    elif op_name(node) == "aten::embedding":
        kind = "embedding"
    elif node in region.flows:
        block = _block(node, axis, users, region)
        if block is not None and region.packing.multiplies(block.linear):
            kind, block = "packed", None
        else:
            kind = "raw" if block is None else "piece"
    elif node in region.outputs:
        norm = region.outputs[node]
        centred = norm.kind == "LayerNorm" and norm.weight is None and norm.bias is None and norm.axis == axis
        kind = "centred" if centred else "norm"
    elif region.constants.zero(node, axis):
        kind = "centred"
    elif crossing(node) and is_split(value(node.args[0]), axis.dim):
        kind = "sharded"
    else:
        scaled = _scaled_writer(node, axis, users, region)
        if region.packing.writes(node) if scaled is None else region.packing.multiplies(scaled[0][-1][0]):
            kind = "packed"
        elif scaled is not None:
            kind, (path, scale) = "scaled", scaled
            linear = path[-1][0]
    obstacle = _leaf_obstacle(node, kind, linear if block is None else block.linear, region)
    alone = set(node.users) <= _graph_users(users)
    witness = region.witness.get(node)
    return Leaf(node, axis, kind, tuple(users), witness, scale, linear, path, alone, obstacle, block)


def _block(node: Node, axis: Axis, users: list[Node | Norm], region: _Region) -> Block | None:
    """The output features of a linear that a raw value is, where the stream alone reads them."""
    readers = [user for user in users if isinstance(user, Node)]
    if is_getitem(node):
        return block_of(node, axis, _graph_users(users), region.facts, region.constants)
    return block_of(node, axis, readers, region.facts, region.constants) if len(readers) == len(users) else None


def _leaf_obstacle(node: Node, kind: LeafKind, linear: Node | None, region: _Region) -> str:
    fake = value(node)
    if node in region.facts.written:
        return "mutated"
    if fake is None or not fake.is_floating_point() or is_summed(fake):
        return "uncentred_input"
    written = [node] if kind == "parameter" else []
    if linear is not None:  # whose weight would take λ, and be centred
        written += [operand for operand in linear.all_input_nodes if operand in region.facts.parameters]
    return "packed_weight" if any(map(packed_sources, written)) else ""


def _scaled_writer(
    node: Node, axis: Axis, users: list[Node | Norm], region: _Region
) -> tuple[tuple[tuple[Node, Axis], ...], Node] | None:
    """(What stands between λ's product and the linear, which is last; λ) when the node is λ ⊙ linear with a parameter λ
    over the whole feature axis, and nothing else reads either (M11). Ops that pass rows on may stand between."""
    if op_name(node) != "aten::mul.Tensor" or set(entry_readers(node)) - _graph_users(users):
        return None
    args = arguments(node)
    for scale, source in ((args["self"], args["other"]), (args["other"], args["self"])):
        if scale not in region.facts.parameters or source in region.facts.parameters or value(source) is None:
            continue
        fake = value(scale)
        ndim = len(shape(node))
        if fake is None or fake.numel() != axis.size or region.constants.broadcast(scale, ndim, axis):
            continue
        if shape(source) != shape(node):
            continue
        inside, path = axis, []
        mode = region.facts.modes[node]
        while len(entry_readers(source)) == 1 and source not in region.facts.written and source not in region.outputs:
            if op_name(source) == "aten::detach" or region.facts.modes[source] != mode:
                break  # λ would lose or gain a gradient
            step = flow(source, inside, region.constants)
            if step is None or inside.inner != 1 or shape(source)[inside.dim] != axis.size:
                break
            path.append((source, inside))
            if op_name(source) in LINEARS:
                whole = all(o in region.facts.parameters for o, _ in step.carried) and not step.dropped
                whole = whole and region.facts.order.can_lift(scale, source)
                return (tuple(path), scale) if whole and scales_rows(source, inside, step) else None
            if len(step.carried) != 1 or step.dropped:
                break
            source, inside = step.carried[0]
    return None


def _graph_users(users: Iterable[Node | Norm]) -> set[Node]:
    found: set[Node] = set()
    for user in users:
        found |= user.nodes if isinstance(user, Norm) else {user}
    return found
