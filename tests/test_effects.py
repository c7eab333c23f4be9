"""Ops that write what their schemas do not say: running statistics of norms in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import transformed
from torch import Tensor, nn

from normfx.ir.effects import WRITES_STATISTICS


class Observer(nn.Module):
    """A norm in training whose output is not used, next to a LayerNorm that becomes an RMSNorm."""

    def __init__(self, seen: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.seen, self.shape = seen, shape
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen(x.repeat(1, 6).reshape(self.shape))
        out: Tensor = self.last(self.norm(self.first(x)))
        return out


class Functional(nn.Module):
    """Calls an op of ATen directly."""

    def __init__(self, op: Callable[..., Any], *rest: Any) -> None:
        super().__init__()
        self.op, self.rest = op, rest
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Any:
        return self.op(x, None, None, self.mean, self.var, True, 0.1, 1e-5, *self.rest)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (20, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (5, 6, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, track_running_stats=True), (5, 6, 4)),
    "native_batch_norm": (lambda: Functional(torch.native_batch_norm), (20, 6)),
    "torch.batch_norm": (lambda: Functional(torch.batch_norm, False), (20, 6)),
    "torch.instance_norm": (lambda: Functional(torch.instance_norm, False), (5, 6, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_an_unused_norm_are_written(name: str) -> None:
    make, shape = NORMS[name]
    torch.manual_seed(0)
    model = Observer(make(), shape).double().eval()
    model.seen.train()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64) + 1
    with torch.no_grad():
        got, report = transformed(model, (x,), {"fold": "cached"})
        torch.testing.assert_close(got, twin(x))
    assert report.counts["to_rms_norm"] == 1
    before = make().double().state_dict()
    assert any(not torch.equal(before[key], value) for key, value in twin.seen.state_dict().items())
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_every_such_op_is_known() -> None:
    """Every op of this torch that takes running statistics is annotated, known to write them, or only reads them."""
    unknown = set()
    for schema in torch._C._jit_get_all_schemas():
        running = [a for a in schema.arguments if a.name.startswith("running_")]
        annotated = any(a.alias_info is not None and a.alias_info.is_write for a in running)
        if running and schema.name.startswith("aten::") and not annotated:
            unknown.add(schema.name.removeprefix("aten::"))
    only_read = {name for name in unknown if name.endswith(("_backward", "_functional", "_no_training", "_no_update"))}
    assert unknown - only_read == WRITES_STATISTICS & unknown
    assert {"batch_norm", "instance_norm"} <= unknown
