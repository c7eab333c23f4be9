"""Folds among several models, callables and threads; what they hold, and how long."""

from __future__ import annotations

import copy
import gc
import io
import threading
from pathlib import Path

import pytest
import torch
from folding import KEPT, X, check, compiled, net
from torch import Tensor, nn
from writes import WRITES

import normfx
from normfx.weights import store


@pytest.mark.parametrize("fold", KEPT)
def test_deepcopy(fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.down.weight.mul_(3.0)
    check(compiled(twin, fold), twin, before)
    check(call, model)


@pytest.mark.parametrize("fold", KEPT)
def test_one_callable_over_several_modules(fold: str) -> None:
    """Dynamo does not guard which parameters it was called with."""
    models = [net(seed) for seed in range(4)]
    run = torch.compile(
        lambda model, x: model(x), backend="normfx", fullgraph=True, options={"fold": fold, "strict": True}
    )
    with torch.no_grad():
        for _ in range(3):
            for model in models:
                assert torch.allclose(run(model, X), model(X), rtol=0, atol=1e-12)
                model.up.weight.data.mul_(1.3)
    graphs = [g.weights for g in normfx.compiled_report().graphs]
    assert len(graphs) == 1 and graphs[0].parameter_sets == len(models)
    assert graphs[0].variants == ("cached",), "several parameter sets: never frozen"


@pytest.mark.parametrize("fold", KEPT)
def test_two_callables_share_one_model(fold: str) -> None:
    model = net()
    first, second = compiled(model, fold), compiled(lambda x: model(x), fold)
    before = check(first, model)
    size = store.STORE.bytes
    check(second, model)
    assert len(normfx.compiled_report().graphs) == 2
    assert store.STORE.bytes == size, "the second callable uses the values of the first"
    for write in (WRITES["p.data.add_"], WRITES["p.data = t"], WRITES["SGD fused"]):
        write(model)
        before = check(second, model, before)
        check(first, model)


@pytest.mark.parametrize("fold", KEPT)
def test_threads_call_while_another_updates_between_calls(fold: str) -> None:
    model = net()
    # without fullgraph=True: called in threads with it, torch 2.11 compiles nothing after a later graph break
    call = torch.no_grad()(torch.compile(model, backend="normfx", options={"fold": fold, "strict": True}))
    before = check(call, model)
    barrier, wrong = threading.Barrier(3), []
    expected: list[Tensor] = [before]

    def caller() -> None:
        for _ in range(40):
            barrier.wait()  # the update is done
            for _ in range(3):
                if not torch.allclose(call(X), expected[0], rtol=0, atol=1e-12):
                    wrong.append(1)
            barrier.wait()

    callers = [threading.Thread(target=caller) for _ in range(2)]
    for thread in callers:
        thread.start()
    for i in range(40):
        for p in model.parameters():
            p.data.mul_(1.01 if i % 2 else 0.98)
        with torch.no_grad():
            expected[0] = model(X)
        barrier.wait()
        barrier.wait()
    for thread in callers:
        thread.join()
    assert not wrong
    assert (expected[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("fold", KEPT)
def test_state_dict_is_untouched(fold: str) -> None:
    def saved(model: nn.Module) -> bytes:
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        return buffer.getvalue()

    model = net()
    before, names = saved(model), [name for name, _ in model.named_parameters()]
    call = compiled(model, fold)
    check(call, model)
    model.up.weight.data.mul_(1.0)
    check(call, model)
    assert saved(model) == before
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("fold", ["cached", "frozen"])
@pytest.mark.slow
def test_nothing_grows_over_compile_and_delete(fold: str) -> None:
    def cycle(seed: int) -> None:
        model = net(seed)
        check(compiled(model, fold), model)

    def alive() -> tuple[int, int, int]:
        gc.collect()
        # not fakes, which hold no memory: Inductor's freezing in torch 2.13 keeps those of each graph it freezes
        tensors = sum(type(x) in (Tensor, nn.Parameter) for x in gc.get_objects())
        return tensors, len(store.STORE), store.STORE.bytes

    for seed in range(3):
        cycle(seed)
        torch._dynamo.reset()
    before = alive()
    for seed in range(50):
        cycle(seed)
        torch._dynamo.reset()
    after = alive()
    assert after[1:] == before[1:] == (0, 0)
    assert after[0] <= before[0]


def test_values_go_with_the_model_while_the_callable_stays() -> None:
    run = torch.compile(
        lambda model, x: model(x), backend="normfx", fullgraph=True, options={"fold": "cached", "strict": True}
    )
    keep = net(0)
    with torch.no_grad():
        run(keep, X)
        size = store.STORE.bytes
        assert size > 0
        for seed in range(1, 6):
            run(net(seed), X)
        gc.collect()
        assert store.STORE.bytes <= 2 * size, "of the dead, the last one's memory may be kept, for a successor"
        run(keep, X)
    assert store.STORE.bytes == size


def test_returned_weights_are_not_the_kept_ones() -> None:
    """A folded or composed weight that leaves the graph must not change under its owner."""

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.read = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.read(self.norm(x)), self.read.weight

    model = Returns().double().eval()
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": "cached", "strict": True})
    with torch.no_grad():
        _, weight = call(X)
        kept = weight.clone()
        model.read.parametrizations.weight.original0.data.mul_(3.0)
        out, fresh = call(X)
        assert torch.equal(weight, kept)
        assert torch.allclose(out, model(X)[0], rtol=0, atol=1e-12)
        assert torch.allclose(fresh, 3 * kept, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fold", KEPT)
def test_parameters_side_by_side_in_one_mapped_file(fold: str, tmp_path: Path) -> None:
    """Two models take turns in it, at odd offsets, as in a file of weights; single entries anywhere are written."""
    file = tmp_path / "weights"
    torch.randn(40_000, dtype=torch.float64).numpy().tofile(file)
    flat = torch.from_file(str(file), shared=False, size=40_000, dtype=torch.float64)
    models, begin = [net(seed, width=80) for seed in range(2)], 3
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        for p in parameters:
            p.data = flat[begin : begin + p.numel()].view_as(p)
            begin += p.numel() + 5
    calls = [compiled(model, fold) for model in models]
    for place in torch.randint(begin, (60,), generator=torch.Generator().manual_seed(0)).tolist():
        flat[place] += 1.0
        for k, (call, model) in enumerate(zip(calls, models, strict=True)):
            if place % (3 + k):
                check(call, model)
