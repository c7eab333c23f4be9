"""The graph of a model whose folds are kept, and the expressions of its folds."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import TestCase
from torch import nn

from normfx.backend import transform
from normfx.options import Options
from normfx.printing.printer import print_graph


class Goldens(TestCase):
    maxDiff = None

    def test_graph_with_kept_folds(self) -> None:
        """Without gradients the folds are inputs; each expression is the same program for every layer of its form."""
        self.assertExpectedInline(
            kept_example(),
            """\
l_x_: f32[3, 6]
normfx_fold_0: f32[16]
normfx_fold_1: f32[16, 6]
normfx_fold_2: f32[16]
normfx_fold_3: f32[16, 16]
normfx_fold_4: f32[16]
normfx_fold_5: f32[16, 16]
normfx_fold_6: f32[5]
normfx_fold_7: f32[5, 16]
%0 = linear(l_x_, normfx_fold_1, normfx_fold_0): f32[3, 16]
%1 = rms_norm(%0, dim=1, eps=1e-05): f32[3, 16]
%2 = linear(%1, normfx_fold_3, normfx_fold_2): f32[3, 16]
%3 = tanh(%2): f32[3, 16]
%4 = linear(%3, normfx_fold_5, normfx_fold_4): f32[3, 16]
%5 = add_rms_norm(%0, %4, dim=1, eps=1e-05): f32[3, 16]
%6 = linear(%5, normfx_fold_7, normfx_fold_6): f32[3, 5]
return [%6]

(1) v0 = normfx.center.default(a0, 0, 16, 1, torch.float32){}
(1) v0 = normfx.center.default(a0, 0, 16, 1, torch.float32){}
(3) v0 = normfx.fold_shift.default(a0, a1, a2, 1.0, 1, 16, 1, torch.float32){}
(2) v0 = normfx.scale_features.default(a0, a1, 1, 16, 1, torch.float32){}
(1) v0 = normfx.center.default(a0, 0, 16, 1, torch.float32){}
(1) v0 = normfx.center.default(a0, 0, 16, 1, torch.float32){}
(3) v0 = normfx.fold_shift.default(a0, a1, a2, 1.0, 1, 16, 1, torch.float32){}
(2) v0 = normfx.scale_features.default(a0, a1, 1, 16, 1, torch.float32){}
""",
        )


def kept_example() -> str:
    """Graph and fold expressions of a pre-norm block, compiled without gradients."""
    torch.manual_seed(0)
    model, texts = PreNorm().eval(), []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        ready = transform(gm, example_inputs, Options.parse({"strict": True}, environ={"NORMFX_VERIFY": "1"}))
        assert ready.folding is not None
        graph = ready.graph_module.graph
        names = {node: node.name for node in graph.find_nodes(op="placeholder")}
        texts.append(print_graph(graph, names, frozenset(), lambda node: ""))
        texts.extend(fold.expression.key for fold in ready.folding.folds.folds)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(3, 6))
    return "\n".join(texts) + "\n"


class PreNorm(nn.Module):
    """Two norms on a stream, all readers linear."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.up, self.down, self.head = (nn.Linear(i, o) for i, o in ((6, 16), (16, 16), (16, 16), (16, 5)))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        h = h + self.down(torch.tanh(self.up(self.norm1(h))))
        return self.head(self.norm2(h))
