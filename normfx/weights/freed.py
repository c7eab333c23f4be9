"""Parameters whose memory was freed: compiled kernels would read what is not there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from normfx.weights.live import live_folds
from normfx.weights.watch import is_ordinary, storage_of


def check_memory(tensors: Sequence[Tensor]) -> None:
    """Raises for a tensor whose storage was freed, as eager mode does."""
    for tensor in tensors:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        if tensor.numel() and storage_of(tensor).nbytes() < needed:
            raise RuntimeError(
                f"normfx: a parameter of shape {tuple(tensor.shape)} has no memory: its storage was freed or made "
                f"smaller ({storage_of(tensor).nbytes()} bytes, {needed} needed). Fill it before calling the model."
            )


def read_by_live_folds(gm: GraphModule, weights: Collection[Node]) -> tuple[int, ...]:
    """The positions of inputs that are read by folds which the graph computes in each call.

    A linear layer as it was hands its weight to a library, which asks for its memory; a fold is a generated kernel,
    which does not.
    """
    work, seen = [*live_folds(gm.graph, [node for node in gm.graph.nodes if node in weights])], set[Node]()
    while work:
        node = work.pop()
        if node not in seen:
            seen.add(node)
            work += node.all_input_nodes
    inputs = gm.graph.find_nodes(op="placeholder")
    return tuple(i for i, node in enumerate(inputs) if node in seen and node in weights)


def refusing_freed(call: Callable[..., Any], positions: Sequence[int]) -> Callable[..., Any]:
    """The call, before which the memory of the arguments at these positions is asked for."""
    if not positions:
        return call

    def checked(*args: Any) -> Any:
        for i in positions:
            given = args[i]
            if is_ordinary(given) and storage_of(given).nbytes() < given.nbytes:
                check_memory((given,))
        return call(*args)

    return checked
