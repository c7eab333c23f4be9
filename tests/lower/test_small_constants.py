"""Short vectors of numbers reach Inductor as numbers, not as inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from normfx.backend import forced, transform
from normfx.lower.small_constants import write_small_constants
from normfx.options import Options

VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda x: x[torch.tensor([2, -1])],
    "float32": lambda x: x[:3] * torch.tensor([0.1, float("inf"), -0.0]),
    "bfloat16": lambda x: x[:2] * torch.tensor([0.1, 3.3], dtype=torch.bfloat16),
    "bool": lambda x: torch.where(torch.tensor([True, False, True]), x[:3], 0.0),
    "int8": lambda x: x[:2] * torch.tensor([-128, 127], dtype=torch.int8),
    "empty": lambda x: x[torch.tensor([], dtype=torch.long)],
    "written": lambda x: torch.tensor([1.0, 2.0]).add_(x[:2]),
    "twice": lambda x: (t := torch.tensor([1, 0])) * x[t],
}

LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "long": lambda x: x * torch.tensor([0.5] * 9),
    "matrix": lambda x: x[:2] * torch.tensor([[0.5, 1.5]]),
    "complex": lambda x: x[:2] * torch.tensor([1j, 2.0]),
}


def written(body: Callable[[Tensor], Tensor], x: Tensor) -> tuple[GraphModule, Tensor]:
    """Return the canonical graph of a function with its short constants written, and the function's result."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with forced():
            graphs.append(transform(gm, example_inputs, Options.parse({"strict": True})).graph_module)
        write_small_constants(graphs[-1])
        graphs[-1].graph.lint()
        run: Callable[..., Any] = graphs[-1].forward
        return run

    assert torch.compile(body, backend=backend, fullgraph=True)(x).equal(body(x))
    return graphs[0], body(x)


def attributes(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="get_attr"))


@pytest.mark.parametrize("name", VECTORS)
def test_numbers_are_in_the_graph(name: str) -> None:
    x = torch.linspace(-1, 1, 9)
    gm, expected = written(VECTORS[name], x)
    assert attributes(gm) == 0
    (found,) = gm(x)
    assert found.dtype == expected.dtype and found.equal(expected)


@pytest.mark.parametrize("name", LEFT)
def test_other_constants_stay_attributes(name: str) -> None:
    x = torch.linspace(-1, 1, 9)
    gm, expected = written(LEFT[name], x)
    assert attributes(gm) == 1
    assert gm(x)[0].equal(expected)


@pytest.mark.parametrize("name", ["index", "float32", "written"])
def test_compiled_by_inductor(name: str) -> None:
    x = torch.linspace(-1, 1, 9)
    compiled = torch.compile(VECTORS[name], backend="normfx", options={"strict": True})
    assert compiled(x).equal(VECTORS[name](x))
    assert compiled(x).equal(VECTORS[name](x))
