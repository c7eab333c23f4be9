"""A small pre-LN transformer without attention, and tokens for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Blocks(nn.Module):
    """A small pre-LN model; `style` says how its residual branches are written."""

    def __init__(self, style: str = "plain", depth: int = 2, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style = style
        self.table = nn.Embedding(20, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, 5, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.2 * torch.randn_like(p))

    def branch(self, x: Tensor, i: int) -> Tensor:
        return self.down[i](F.gelu(self.up[i](self.norms[i](x))))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for i in range(len(self.norms)):
            if self.style == "in place":
                y = self.branch(x, i)
                y += x
                x = y
            elif self.style == "checkpoint":
                x = x + torch.utils.checkpoint.checkpoint(self.branch, x, i, use_reentrant=False)
            elif self.style == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = x + self.branch(x, i)
            elif self.style == "cond":
                x = x + self.branch(x, i)
                if i == 0:
                    x = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            elif self.style == "break":
                x = x + self.branch(x, i)
                torch._dynamo.graph_break()
            else:
                x = x + self.branch(x, i)
        return self.head(self.final(x))


def ids(tokens: int = 6, batch: int = 2) -> Tensor:
    return torch.randint(0, 20, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
