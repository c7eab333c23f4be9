"""Who calls the compiled graph, and with what: torch with fakes, function transforms, DDP with several buckets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from folding import KEPT, Net, compiled, net
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from normfx.lower import folded


class Blocks(nn.Module):
    """Three blocks of 0.5 MB each: DDP cuts them into buckets of 1 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Net(180) for _ in range(3))
        self.back = nn.ModuleList(nn.Linear(5, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block, back in zip(self.blocks, self.back, strict=True):
            x = back(block(x))
        return x


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def as_it_is(gm: Any, example_inputs: Any, patches: Any) -> Any:
    return gm


def check_ddp(fold: str, frozen_layers: bool) -> None:
    """Outputs, after a write too, and every gradient, against eager mode."""
    torch.manual_seed(0)
    model = Blocks().double()
    if frozen_layers:
        model.blocks[0].requires_grad_(False)
        model.blocks[1].norm1.requires_grad_(False)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    call = torch.compile(wrapped, backend="normfx", options={"fold": fold, "strict": True})
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.set_grad_enabled(frozen_layers):
        for _ in range(3):
            out = call(x)
            torch.testing.assert_close(out, model(x), rtol=1e-12, atol=1e-12)
            for block in model.blocks:
                block.norm1.weight.data[3:5] *= -2.0
                block.up.weight.data[:, 7] += 1.0
    if frozen_layers:
        trained = [p for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        call(x).square().sum().backward()
        gradients = [p.grad for p in trained]
        expected = torch.autograd.grad(model(x).square().sum(), trained)
        torch.testing.assert_close(gradients, list(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen_layers", [False, True])
@pytest.mark.parametrize("fold", ["auto", *KEPT])
def test_ddp_with_several_buckets(group: None, fold: str, frozen_layers: bool) -> None:
    with mock.patch.object(folded, "compile_graph", as_it_is):
        check_ddp(fold, frozen_layers)


@pytest.mark.slow
@pytest.mark.parametrize("frozen_layers", [False, True])
@pytest.mark.parametrize("fold", ["auto", *KEPT])
def test_ddp_with_inductor(group: None, fold: str, frozen_layers: bool) -> None:
    check_ddp(fold, frozen_layers)


@pytest.mark.parametrize("fold", KEPT)
def test_called_with_fakes(fold: str) -> None:
    """The compiled callable of one graph, as DDP's optimiser calls it: shapes come out, and nothing is kept of them."""
    model, x = net(), torch.randn(3, 6, dtype=torch.float64)
    seen: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        made = torch._dynamo.lookup_backend("normfx")(gm, example_inputs, options={"fold": fold, "strict": True})
        seen.append((made, list(example_inputs)))
        return made

    with mock.patch.object(folded, "compile_graph", as_it_is), torch.no_grad():
        call = torch.compile(model, backend=backend)
        torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)
        ((made, inputs),) = seen
        mode = FakeTensorMode()
        (out,) = made(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in inputs))
        assert out.fake_mode is mode and out.shape == (3, 5)
        torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fold", KEPT)
def test_inside_vmap(fold: str) -> None:
    """A function transform around the compiled model, or within it."""
    model, x = net(), torch.randn(4, 3, 6, dtype=torch.float64)
    with mock.patch.object(folded, "compile_graph", as_it_is), torch.no_grad():
        call = compiled(lambda rows: torch.vmap(lambda row: model(row))(rows), fold)
        torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)
        model.up.weight.data[2, 3] += 1.0
        torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)
