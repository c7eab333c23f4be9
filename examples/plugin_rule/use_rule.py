"""Use a rule of another package: run `pip install ./examples/plugin_rule` first."""

import torch
from torch import Tensor, nn

import normfx


class Negated(nn.Module):
    """A norm with a minus sign, which `negation_rule` moves into the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return -self.norm(self.read(x))


def main() -> None:
    torch.manual_seed(0)
    model, x = Negated().eval(), torch.randn(3, 6)
    with torch.no_grad():
        for rules in ("default", "default,-fold_negation"):
            report = normfx.explain(model, options={"rules": rules})(x)
            print(f"{rules}: applied {', '.join(report.sites[0].rules)}")
        # strict: a mistake in a rule is an error; else normfx warns and compiles the untouched graph
        compiled = torch.compile(model, backend="normfx", options={"strict": True})
        print(f"largest difference from eager: {(compiled(x) - model(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
