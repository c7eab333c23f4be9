"""A graph on its way through the stages of the backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from normfx.capture.trace import Captured
from normfx.checks.verify import Checked
from normfx.edit.writer import Rewritten
from normfx.graph.names import module_path
from normfx.ir.sites import Sites
from normfx.lower.hoist import Folding
from normfx.lower.triton import Lowered
from normfx.options import Options
from normfx.plan import Plan
from normfx.printing.printer import print_lines
from normfx.records import Picture
from normfx.report import GraphReport


@dataclass(eq=False)
class Work:
    """A graph on its way through the stages: what it starts with, and what each stage finds for later ones.

    original: Dynamo's graph, None for an exported program's
    freezes: the canonical graph is wanted even if no rule applies, for a frozen variant; forced: for a test
    parameters_only: rules may exchange parameters and norms, and add no op and drop none
    excess:  weights whose folds do not fit into the memory that folds may take
    stage:   the one that runs, or failed; seconds: by stage
    """

    settings: Options
    freezes: bool = False
    original: GraphModule | None = None
    example_inputs: Sequence[Any] = ()
    joined: bool = True
    parameters_only: bool = False
    forced: bool = False
    captured: Captured = field(init=False)
    values: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    sites: Sites = field(init=False)
    plan: Plan = field(init=False)
    before: str = ""
    lines: Mapping[Node, int] = field(default_factory=dict)
    picture: Picture = field(init=False)
    done: Rewritten = field(default_factory=Rewritten)
    lowered: Lowered = field(default_factory=Lowered)
    report: GraphReport = field(init=False)
    excess: frozenset[Node] = frozenset()
    folding: Folding | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    stored_sums: int = 0
    checked: Checked = field(default_factory=dict)
    stage: str = "capture"
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def canonical(self) -> GraphModule:
        return self.captured.graph_module

    @property
    def computes_folds(self) -> bool:
        """Whether folds are computed in each run of an exported program."""
        return self.original is None and self.settings.fold == "auto"

    @property
    def adds_apart(self) -> bool:
        """Whether a bias that a product did not have takes passes of its own: exported programs pack no weights."""
        return self.original is None and not self.parameters_only and self.settings.fold != "live"

    @property
    def used(self) -> bool:
        """Whether the canonical graph is compiled, whatever else becomes of it."""
        return self.plan.changes or self.freezes or self.forced

    @property
    def names(self) -> Mapping[Node, str]:
        """Names of inputs, parameters and buffers."""
        return {node: source.name for node, source in self.captured.sources.items()}

    def text(self) -> tuple[str, Mapping[Node, int]]:
        """The graph as it is printed, and the line of each node."""
        return print_lines(self.canonical.graph, self.names, self.captured.weights, module_path)
