"""A pass for Inductor's graphs as a user might have one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from normfx.compat.inductor import CustomGraphPass


class Marks(CustomGraphPass):
    """Counts the matrix products that are in the graph when it runs."""

    def __init__(self, name: str | None = "marks") -> None:
        self.name, self.seen = name, 0

    def __call__(self, graph: Graph) -> None:
        self.seen += sum(
            node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in graph.nodes
        )

    def uuid(self) -> Any:
        return self.name
