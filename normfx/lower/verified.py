"""options={"verify": True}: on the first call also run the original graph, and compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from normfx.compat import pytree
from normfx.compat.dynamo import with_inputs_apart
from normfx.errors import VerifyError

TOLERANCE = {
    torch.float64: 1e-8,  # round-off of reordered sums, with room for long networks
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,  # 8 bits: a wrong fold is off by far more (0.1 to 5, maths)
}
"""Largest difference accepted, relative to the largest entry of the original output."""


def verified(compiled: Callable[..., Any], original: GraphModule) -> Callable[..., Any]:
    """A callable that compares its first result with that of the original graph. Raises VerifyError.

    The original runs on copies of the inputs, without gradients, and from the same random state.
    """
    pending = True

    def run(*args: Any) -> Any:
        nonlocal pending
        if not pending:
            return compiled(*args)
        pending = False
        copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        devices = sorted({a.device.index for a in args if isinstance(a, torch.Tensor) and a.is_cuda})
        with torch.random.fork_rng(devices), torch.no_grad():
            expected = original(*copies)
        actual = compiled(*args)
        _compare(actual, expected)
        return actual

    return with_inputs_apart(run)


def _compare(actual: Any, expected: Any) -> None:
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for i, (got, want) in enumerate(pairs):
        if not isinstance(want, torch.Tensor) or not want.is_floating_point() or want.numel() == 0:
            continue
        difference = (got.detach().double() - want.double()).abs().max().item()
        scale = want.double().abs().max().item()
        if not difference <= TOLERANCE.get(want.dtype, 1e-1) * max(scale, torch.finfo(want.dtype).tiny):
            raise VerifyError(
                f"normfx: verify: output {i} of the rewritten graph differs from the original by {difference:.3g} "
                f"(largest entry {scale:.3g}). Switch rules off one by one (options={{'rules': 'default,-NAME'}}) "
                "to find which, and please report it."
            )
