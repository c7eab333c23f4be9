"""Why a norm is left alone: a stream that is also returned, and a post-norm block."""

import torch
from torch import Tensor, nn

import normfx


class Tapped(nn.Module):
    """A pre-norm block that also returns its raw hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.write = nn.Embedding(10, 16), nn.Linear(16, 16)
        self.norm, self.final, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        x = x + self.write(self.norm(x))
        return self.head(self.final(x)), x


def main() -> None:
    with torch.no_grad():
        report = normfx.explain(Tapped())(torch.arange(6).reshape(2, 3))
    for site in report.sites:
        print(f"{site.name}: applied {', '.join(site.rules)}")
        for refusal in site.refusals:
            print(f"  {refusal.rule} refused, {refusal.code}: {refusal.detail}\n  hint: {refusal.hint}")


if __name__ == "__main__":
    main()
