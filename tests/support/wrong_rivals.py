"""`normfx …` under Triton's interpreter, with rivals that are wrong: what normfx.bench.rivals says of the others holds.

In a process of its own: triton reads TRITON_INTERPRET when imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from normfx.bench import rivals
from normfx.bench.norms import definition
from normfx.bench.rivals import Function, Rival
from normfx.cli import main
from normfx.kernels.spec import Spec


def right(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: Spec) -> Tensor:
    wide_residual, wide_weight, wide_bias = (None if t is None else t.float() for t in (residual, weight, bias))
    return definition(spec, x.float(), wide_residual, wide_weight, wide_bias)[0].to(x.dtype)


def spoiled(spoil: Callable[[Tensor], Tensor]) -> Callable[[Spec], Function]:
    def make(spec: Spec) -> Function:
        def function(
            x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, ...]:
            y = spoil(right(x, residual, weight, bias, spec))
            return (y,) if residual is None else (y, x + residual)

        return function

    return make


def one_row_off(y: Tensor) -> Tensor:
    return torch.cat([y[:-1], 1.1 * y[-1:]])


BUFFERS: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


def one_row_unwritten(y: Tensor) -> Tensor:
    """Into the same memory at every call, which the benchmark has filled with NaN."""
    out = BUFFERS.setdefault((y.shape, y.dtype), torch.zeros_like(y)).detach()
    out[1:] = y[1:]
    return out


def no_mean(spec: Spec) -> Function:
    """An RMSNorm, whatever the norm."""
    return spoiled(lambda y: y)(Spec(spec.width, centre=False, x=spec.x, out=spec.out))


def raises(y: Tensor) -> Tensor:
    raise RuntimeError("no such kernel")


def writes_into_grad(spec: Spec) -> Function:
    """Right, but its backward overwrites dy, as Liger's does."""

    class Rms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return args[0].clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            kept = grads[0].clone()
            grads[0].zero_()
            return kept

    return spoiled(Rms.apply)(spec)


rivals.RIVALS.update(
    {
        "right": Rival(spoiled(lambda y: y)),
        "writes-into-grad": Rival(writes_into_grad),
        "one-row-off": Rival(spoiled(one_row_off)),
        "one-row-unwritten": Rival(spoiled(one_row_unwritten)),
        "no-mean": Rival(no_mean),
        "raises": Rival(spoiled(raises)),
        "no-such-norm": Rival(lambda spec: None),
        "not-installed": Rival(spoiled(lambda y: y), "no_such_module", "no-such-package"),
    }
)

if __name__ == "__main__":
    sys.exit(main())
