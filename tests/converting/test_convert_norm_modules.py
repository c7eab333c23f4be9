"""normfx.convert, norms whose modules do more than a norm: refused if that would be lost, kept if it only looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from converting_models import moved, norms
from torch import Tensor, nn

import normfx
from normfx.converting.written import Copy


class Guarded(nn.LayerNorm):
    """A norm, and what `do` does before or after it."""

    def __init__(self, before: Any = None, then: Any = None) -> None:
        super().__init__(8)
        self.before, self.then = before, then

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(self.before(x) if self.before else x)
        out: Tensor = self.then(y) if self.then else y
        return out


def around(norm: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8)).double()
    moved(model)
    return model


MORE = {
    "clamp": {"before": lambda x: x.clamp(-50, 50)},
    "no nan": {"before": torch.nan_to_num},
    "flip": {"then": lambda y: y.flip(-1)},
    "a little": {"then": lambda y: y + 1e-9},
    "a mask": {"then": lambda y: torch.where(y > 1e6, 0.0, y)},
    "other rows": {"before": lambda x: x.reshape(-1, 2, 8), "then": lambda y: y.reshape(-1, 8)},
}
RESHAPED = {
    "rows": {"before": lambda x: x.reshape(-1, 8), "then": lambda y: y.view(2, -1, 8)},
    "one more": {"before": lambda x: x.unsqueeze(0), "then": lambda y: y.squeeze(0)},
    "a copy": {"before": lambda x: x.clone(), "then": lambda y: y.contiguous()},
}


@pytest.mark.parametrize("case", RESHAPED)
def test_a_norm_that_reshapes(case: str) -> None:
    model, x = around(Guarded(**RESHAPED[case])), torch.randn(2, 4, 8, dtype=torch.float64)
    converted = normfx.convert(model, (x,))
    assert norms(converted) == {"RMSNorm": 1}
    torch.testing.assert_close(converted(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("case", MORE)
def test_a_norm_that_does_more(case: str, hook: bool) -> None:
    """It is refused, whether the given arguments show what would be lost or not."""
    if not hook:
        model = around(Guarded(**MORE[case]))
    else:
        model = around(nn.LayerNorm(8))
        for when, do in MORE[case].items():
            if when == "before":
                model[1].register_forward_pre_hook(lambda _, args, do=do: (do(args[0]),))
            else:
                model[1].register_forward_hook(lambda _, args, out, do=do: do(out))
    with pytest.raises(normfx.ConvertError, match="'1' computes more than a norm"):
        normfx.convert(model, (torch.randn(2, 4, 8, dtype=torch.float64),))


def test_hooks_stay() -> None:
    """One that only looks is called by the norm that the copy has."""
    seen: list[Tensor] = []
    model = around(nn.LayerNorm(8))
    model[1].register_forward_hook(lambda _, args, out: seen.append(out))
    x = torch.randn(4, 8, dtype=torch.float64)
    converted = normfx.convert(model, (x,))
    assert norms(converted) == {"RMSNorm": 1}
    seen.clear()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-12, atol=1e-12)
    assert len(seen) == 2


def test_complex_results_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copy, "write", lambda self: None)
    monkeypatch.setattr("normfx.converting.prove", lambda *args: None)

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = around(nn.LayerNorm(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_complex(self.inner(x).view(-1, 4, 2))

    model = Complex().eval()
    normfx.convert(model, (torch.randn(4, 8, dtype=torch.float64),))  # nothing was written: the same
    monkeypatch.setattr(Copy, "write", lambda self: self.model.inner[2].bias.data.add_(1.0))
    with pytest.raises(normfx.ConvertError, match="is off by"):
        normfx.convert(model, (torch.randn(4, 8, dtype=torch.float64),))


class Twice(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def test_a_norm_that_norms_twice() -> None:
    model = around(Twice(8, elementwise_affine=False))
    with pytest.raises(normfx.ConvertError, match="computes more than a norm"):
        normfx.convert(model, (torch.randn(4, 8, dtype=torch.float64),))


def test_hooks_of_state_dicts() -> None:
    """They know the module that they were made for; the copy's weights can be loaded."""
    model = around(nn.LayerNorm(8))
    model[1].register_load_state_dict_pre_hook(lambda *args: None)
    model[1].register_full_backward_hook(lambda *args: None)
    converted = normfx.convert(model, (torch.randn(4, 8, dtype=torch.float64),))
    assert norms(converted) == {"RMSNorm": 1}
    converted.load_state_dict(converted.state_dict())
    assert len(converted[1]._backward_hooks) == 1 and converted[1]._is_full_backward_hook
