"""The folds of an exported program become buffers, and parameters that nothing reads any more are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node

from normfx.capture.cleanup import drop_dead_code
from normfx.capture.sources import Source
from normfx.capture.trace import Captured
from normfx.compat.tensors import FakeTensor, storage_key
from normfx.converting.rows import centre_parameters
from normfx.errors import ExportError
from normfx.graph.views import settle
from normfx.weights.kept import Kept, keepable, kept_values

_STATE = (InputKind.PARAMETER, InputKind.BUFFER)


def freeze(
    program: ExportedProgram, captured: Captured, signature: ExportGraphSignature
) -> tuple[ExportGraphSignature, dict[str, torch.Tensor]]:
    """Make buffers of what the graph computes from parameters alone, in place. Returns the program's new signature and
    state dict.

    A buffer is called like the parameter of its shape that it is computed from, with `_folded` after it, or like the
    largest one. Parameters that only folds read are dropped, under all of their names.

    Raises ExportError where the weights have no values.
    """
    gm, held = captured.graph_module, {**program.state_dict, **program.constants}
    centre_parameters(captured, shared=False)
    free = keepable(gm.graph, captured.weights, frozenset())
    state, specs = dict(program.state_dict), list(signature.input_specs)
    known: dict[object, Node] = {}
    sources: set[int] = set()
    for kept in kept_values(gm.graph, free):
        own = [captured.sources[source] for source in kept.sources]
        names = [each.name for each in own]
        key = kept.expression.key, tuple(names)
        if key not in known:
            name = _unused(f"{_main(kept.node, own, held)}_folded", {*held, *state})
            state[name] = _computed(kept, [held[each] for each in names])
            known[key] = _placed(captured, kept.node, name, specs)
        kept.node.replace_all_uses_with(known[key])
        sources.update(_storage(held[each]) for each in names)
    drop_dead_code(gm.graph)
    unread = {node.name: node for node in gm.graph.find_nodes(op="placeholder") if not node.users}
    gone = [
        spec
        for spec in specs
        if spec.arg.name in unread and spec.target in state and _storage(state[spec.target]) in sources
    ]
    for spec in gone:
        gm.graph.erase_node(unread[spec.arg.name])
    left = [spec for spec in specs if spec not in gone]
    settle(gm)
    return ExportGraphSignature(left, signature.output_specs), _still_held(state, gone, left)


def _main(value: Node, sources: list[Source], held: Mapping[str, torch.Tensor]) -> str:
    """The name of the parameter that a value stands for: of several, the last one, since the bias of a layer is added
    to what others contribute."""
    shape = value.meta["val"].shape
    ranked = (
        (source.kind == "parameter", held[source.name].shape == shape, held[source.name].numel(), place, source.name)
        for place, source in enumerate(sources)
    )
    return max(ranked)[-1]


def _unused(name: str, taken: Iterable[str]) -> str:
    numbered = (f"{name}_{number}" for number in range(2, 10**6))
    return name if name not in taken else next(each for each in numbered if each not in taken)


def _computed(kept: Kept, sources: list[torch.Tensor]) -> torch.Tensor:
    if any(isinstance(source, FakeTensor) or source.device.type == "meta" for source in sources):
        raise ExportError(
            "normfx.rewrite: fold='frozen' computes weights, but those of the program have no values (they are fake, "
            "or on the meta device); load them first, or keep fold='live'"
        )
    fake = kept.node.meta["val"]  # what the graph says of its layout
    laid_out = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return laid_out.copy_(kept.expression(*(source.detach() for source in sources)))


def _placed(captured: Captured, node: Node, name: str, specs: list[InputSpec]) -> Node:
    """A new input for a buffer, after the other parameters and buffers, which come first in a program."""
    graph = captured.graph_module.graph
    inputs = graph.find_nodes(op="placeholder")
    place = next((i for i, spec in enumerate(specs) if spec.kind not in _STATE), len(specs))
    where = graph.inserting_before(inputs[place] if place < len(inputs) else next(iter(graph.nodes)))
    with where:
        new = graph.placeholder("b_" + name.replace(".", "_"))
    fake = node.meta["val"]
    with fake.fake_mode, torch.no_grad():
        new.meta["val"] = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    specs.insert(place, InputSpec(InputKind.BUFFER, TensorArgument(new.name), name, persistent=True))
    return new


def _still_held(
    state: dict[str, torch.Tensor], gone: Iterable[InputSpec], left: Iterable[InputSpec]
) -> dict[str, torch.Tensor]:
    """The state dict without tensors that nothing reads any more, under whatever names: tied ones have several."""
    kept = {_storage(state[spec.target]) for spec in left if spec.target in state}
    dropped = {_storage(state[spec.target]) for spec in gone if spec.target in state} - kept
    return {name: tensor for name, tensor in state.items() if _storage(tensor) not in dropped}


def _storage(tensor: torch.Tensor) -> int:
    """A number for tensors that share memory; a sparse one, which no fold reads, has its own."""
    return storage_key(tensor.untyped_storage()) if tensor.layout == torch.strided else id(tensor)
