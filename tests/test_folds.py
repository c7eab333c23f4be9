"""Kept and frozen folds are true to the parameters of every call, whatever wrote them (maths T18, T19)."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfx
from normfx.weights import probe, store

KEPT = ("cached", "frozen")


class Net(nn.Module):
    """A pre-norm block: writers are centred, γ and β go into the readers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = h + self.down(torch.tanh(self.up(self.norm1(h))))
        return self.head(self.norm2(h))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().eval()


X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6).sin()


def compiled(model: Callable[[Tensor], Tensor], fold: str, **options: Any) -> Callable[[Tensor], Tensor]:
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": fold, "strict": True, **options})

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return call(x)

    return run


def folding() -> normfx.report.FoldReport:
    """Of the graph compiled last."""
    weights = normfx.compiled_report().graphs[-1].weights
    assert weights is not None
    return weights


def check(call: Callable[[Tensor], Tensor], model: nn.Module, before: Tensor | None = None) -> Tensor:
    """The very next call is right, and, given `before`, differs from what a stale fold would give."""
    with torch.no_grad():
        expected = model(X)
    assert torch.allclose(call(X), expected, rtol=0, atol=1e-12)
    if before is not None:
        assert (expected - before).abs().max() > 1e-3, "the write does not show: the check could not fail"
    return expected


def give_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def step(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        give_gradients(model)
        make(model.parameters(), lr=0.1, **settings).step()

    return write


FUSED = [
    kind
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and "fused" in inspect.signature(kind.__init__).parameters
]
OPTIMISERS = {
    "sgd": step(torch.optim.SGD, foreach=False),
    "adam foreach": step(torch.optim.Adam, foreach=True),
    **{f"{kind.__name__} fused": step(kind, fused=True) for kind in FUSED},
}


def load(model: nn.Module, seed: int, **settings: Any) -> None:
    model.load_state_dict(net(seed).state_dict(), **settings)


def load_twice(model: nn.Module) -> None:
    load(model, 1, assign=True)
    load(model, 2, assign=True)


def in_mode(mode: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        with mode():
            for p in model.parameters():
                p.mul_(1.5)

    return write


def each(write: Callable[[nn.Parameter], Any]) -> Callable[[nn.Module], None]:
    def all_of(model: nn.Module) -> None:
        for p in model.parameters():
            write(p)

    return all_of


def assign_data(p: nn.Parameter) -> None:
    p.data = torch.randn_like(p)


def add_data(p: nn.Parameter) -> None:
    p.data += 0.5


def through_vector(model: nn.Module) -> None:
    size = sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(torch.randn(size, dtype=torch.float64), model.parameters())


def through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[...] = np.sin(np.arange(p.numel())).reshape(p.shape)


def through_dlpack(p: nn.Parameter) -> None:
    torch.from_dlpack(p.detach()).copy_(torch.randn_like(p))


def replace_parameter(model: nn.Module) -> None:
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))
    model.norm1.bias = nn.Parameter(torch.randn_like(model.norm1.bias))


def fused_function(model: nn.Module) -> None:
    """A fused optimiser's kernel without its optimiser."""
    weights = [p.detach() for p in model.parameters()]
    torch._fused_sgd_(
        weights, [torch.randn_like(w) for w in weights], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=True,
    )  # fmt: skip


def there_and_back(model: nn.Module) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float64)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    **OPTIMISERS,
    "load_state_dict": lambda m: load(m, 1),
    "load_state_dict(assign=True)": lambda m: load(m, 1, assign=True),
    "load_state_dict(assign=True) twice": load_twice,
    "copy_ under no_grad": lambda m: [p.copy_(torch.randn_like(p)) for p in m.parameters()],
    "in place under no_grad": in_mode(torch.no_grad),
    "in place under inference_mode": in_mode(torch.inference_mode),
    "p.data = t": each(assign_data),
    "p.data += x": each(add_data),
    "p.data.add_": each(lambda p: p.data.add_(0.5)),
    "p.detach().add_": each(lambda p: p.detach().add_(0.5)),
    "vector_to_parameters": through_vector,
    "numpy": each(through_numpy),
    "dlpack": each(through_dlpack),
    "parameter replaced": replace_parameter,
    "fused function": fused_function,
    "to(dtype) and back": there_and_back,
    "one bias": lambda m: m.norm2.bias.data.add_(1.0),
}


@pytest.mark.parametrize("fold", KEPT)
@pytest.mark.parametrize("name", WRITES)
def test_next_call_after_a_write(name: str, fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    assert fold in folding().variants
    with torch.no_grad() if name.startswith("copy_") else torch.enable_grad():
        WRITES[name](model)
    before = check(call, model, before)
    check(call, model)
    with torch.no_grad() if name.startswith("copy_") else torch.enable_grad():
        WRITES[name](model)
    check(call, model, None if "load_state_dict" in name or name in ("numpy", "to(dtype) and back") else before)


def test_every_fused_optimiser_is_there() -> None:
    assert {kind.__name__ for kind in FUSED} >= {"SGD", "Adam", "AdamW", "Adagrad"}


@pytest.mark.parametrize("fold", KEPT)
def test_a_fused_step_the_fingerprint_cannot_see(fold: str) -> None:
    """One entry between the samples moves: the optimiser's hook tells."""
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    weight = model.up.weight
    hidden = next(i for i in range(weight.numel()) if i not in probe.sample_indices(weight.numel()))
    weight.grad = torch.zeros_like(weight)
    weight.grad.view(-1)[hidden] = 1.0
    torch.optim.SGD([weight], lr=20.0, fused=True).step()
    check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
def test_refold_after_a_write_nothing_can_see(fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    weight = model.up.weight
    hidden = next(i for i in range(weight.numel()) if i not in probe.sample_indices(weight.numel()))
    weight.detach().numpy().reshape(-1)[hidden] = 50.0
    normfx.refold()
    check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
def test_ema_swap(fold: str) -> None:
    model, average = net(0), net(1)
    call = compiled(model, fold)
    before = check(call, model)
    for _ in range(3):
        for p, q in zip(model.parameters(), average.parameters(), strict=True):
            p.data, q.data = q.data, p.data
        before = check(call, model, before)
    for p, q in zip(model.parameters(), average.parameters(), strict=True):
        kept = p.detach().clone()
        p.data.copy_(q.data)
        q.data.copy_(kept)
    check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
def test_peft_merge_and_unmerge(fold: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=8, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(net(), config).double().eval()
    call = compiled(model, fold)
    start = check(call, model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(3.0)
    before = check(call, model, start)
    model.merge_adapter()
    check(call, model)
    with torch.no_grad():
        model.base_model.model.up.base_layer.weight.mul_(1.5)
    before = check(call, model, before)
    model.unmerge_adapter()
    check(call, model)


@pytest.mark.parametrize("fold", KEPT)
def test_requires_grad_flips(fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    model.requires_grad_(False)
    before = check(call, model)
    model.up.weight.data.mul_(2.0)
    before = check(call, model, before)
    model.requires_grad_(True)
    model.up.weight.data.mul_(2.0)
    check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
def test_training_and_evaluation_alternate(fold: str) -> None:
    model, reference = net(), net()
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": fold, "strict": True})
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.05, fused=True) for m in (model, reference)]
    before = None
    for _ in range(4):
        for m, forward, optimiser in ((model, call, optimisers[0]), (reference, reference, optimisers[1])):
            m.train()
            optimiser.zero_grad()
            forward(X).square().sum().backward()
            optimiser.step()
            m.eval()
        with torch.no_grad():
            expected, actual = reference(X), call(X)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-9)
        assert before is None or (expected - before).abs().max() > 1e-3
        before = expected


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
    call = compiled(model, fold)
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
def test_parameters_made_under_inference_mode(fold: str) -> None:
    """They have no version, so nothing is believed of them."""
    with torch.inference_mode():
        model = net()
        call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": fold, "strict": True})
        before = model(X)
        assert torch.allclose(call(X), before, rtol=0, atol=1e-12)
        model.up.weight.view(-1)[5] += 20.0
        after = model(X)
        assert torch.allclose(call(X), after, rtol=0, atol=1e-12)
    assert (after - before).abs().max() > 1e-3


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


@pytest.mark.parametrize("fold", KEPT)
def test_a_value_change_never_recompiles(fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    check(call, model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in ("p.data = t", "p.data.add_", "load_state_dict(assign=True)", "in place under no_grad"):
        WRITES[name](model)
        check(call, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_only_what_depends_on_a_write_is_computed_again() -> None:
    model = net()
    call = compiled(model, "cached")
    check(call, model)
    first = folding().refreshes
    check(call, model)
    assert folding().refreshes == first
    model.enter.bias.data.add_(1.0)  # P b, alone
    check(call, model)
    assert folding().refreshes == first + 1
    model.head.weight.data.mul_(2.0)  # W·γ, and c + Wβ
    check(call, model)
    assert folding().refreshes == first + 3


@pytest.mark.parametrize("name", ["p.data = t", "p.data.add_", "load_state_dict(assign=True) twice"])
def test_values_stay_at_their_address(name: str) -> None:
    """CUDA graphs replay on fixed addresses."""
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    entries = sorted(entry.value.data_ptr() for entry in store.STORE.entries())
    WRITES[name](model)
    check(call, model, before)
    gc.collect()
    assert sorted(entry.value.data_ptr() for entry in store.STORE.entries()) == entries


def test_frozen_again_once_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    monkeypatch.setattr("normfx.lower.folded.REFREEZE_AFTER", 4)
    call = compiled(model, "frozen")
    before = check(call, model)
    assert folding().freezes == 1
    for write in ("p.data.add_", "p.data = t"):
        WRITES[write](model)
        freezes = folding().freezes
        before = check(call, model, before)
        assert folding().variants == ("cached",)
        for _ in range(40):
            check(call, model)
        assert folding().variants == ("cached", "frozen") and folding().freezes == freezes + 1


def test_not_frozen_again_while_parameters_keep_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    monkeypatch.setattr("normfx.lower.folded.REFREEZE_AFTER", 4)
    call = compiled(model, "frozen")
    before = check(call, model)
    for _ in range(20):
        model.up.weight.data.add_(0.1)
        before = check(call, model, before)
    assert folding().freezes == 1


def test_inductor_freezing_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    """fold="auto" and Inductor's own switch, which alone goes stale."""
    model = net()
    call = compiled(model, "auto", inductor={"freezing": True})
    before = check(call, model)
    assert "frozen" in folding().variants
    model.up.weight.data.mul_(2.0)
    check(call, model, before)


def test_inductor_freezing_switched_on_for_the_process() -> None:
    """Dynamo then makes the parameters attributes of the graph."""
    model = net()
    call = compiled(model, "auto")
    with torch._inductor.config.patch(freezing=True):
        before = check(call, model)
        assert "frozen" in folding().variants
        for name in ("p.data.add_", "p.data = t", "SGD fused", "parameter replaced"):
            WRITES[name](model)
            before = check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
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


def test_live_where_gradients_are_needed() -> None:
    """Frozen weights of a training graph are kept, trained ones are live."""
    model = net()
    model.up.weight.requires_grad_(False)
    model.norm1.requires_grad_(False)
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"strict": True})
    for _ in range(2):
        model.zero_grad()
        out = call(X)
        out.sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(X).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert torch.allclose(grads[name], p.grad, rtol=0, atol=1e-12)
        model.up.weight.data.mul_(1.5)


def test_backward_sees_the_weights_of_its_forward() -> None:
    """A kept value that a backward pass still needs is not overwritten."""
    model = net()
    model.up.requires_grad_(False)
    model.norm1.requires_grad_(False)
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": "cached", "strict": True})
    losses = []
    for run in (model, call):
        x = X.clone().requires_grad_()
        out = run(x)
        kept = model.up.weight.data
        model.up.weight.data = kept * 2  # the old tensor stays what it was: eager's backward still has it
        run(X)
        out.sum().backward()
        model.up.weight.data = kept
        losses.append(x.grad)
    assert torch.allclose(*losses, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reader", ["native", "python", "device"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128])
def test_probe_sees_whole_writes(reader: str, dtype: torch.dtype) -> None:
    """The three probes agree, on strided tensors too."""
    tensors = [torch.randn(8, 10).to(dtype).t(), torch.randn(3).to(dtype), torch.randn(0).to(dtype)]
    library = probe.native_library()
    assert library is not None
    make = {
        "native": lambda ts: probe.NativeProbe(library, ts),
        "python": probe.PythonProbe,
        "device": probe.DeviceProbe,
    }[reader]
    looked = make(tensors)

    def look() -> list[tuple[int, ...]]:
        seen = looked.read(tensors)
        looked.accept(tensors, [t._version for t in tensors], seen)
        assert not looked.changed(tensors)
        return seen

    seen = look()
    assert [len(group) > 0 for group in seen] == [True, True, False]
    kept = tensors[1].clone()
    tensors[1].data.fill_(7)
    assert looked.changed(tensors)
    tensors[1].data.copy_(kept)
    assert not looked.changed(tensors)
    tensors[0].data.fill_(7)
    assert looked.changed(tensors)
    assert look()[0] != seen[0]
    tensors[1].copy_(tensors[1].clone())  # the same entries, another version
    assert looked.changed(tensors)
    look()
    other = [tensors[0].clone(), *tensors[1:]]
    assert looked.changed(other)
    tensors[0].data = tensors[0].clone()
    assert looked.changed(tensors)


def test_swapping_tensors_is_still_possible() -> None:
    """A weak reference to a parameter would forbid it."""
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    with torch.no_grad():
        torch.utils.swap_tensors(model.up.weight, nn.Parameter(torch.randn_like(model.up.weight)))
    check(call, model, before)


def test_without_a_compiler_python_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "native_library", lambda: None)
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    model.up.weight.data.mul_(2.0)
    check(call, model, before)


def test_a_compiled_optimiser_step_is_not_broken_by_the_hook() -> None:
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    give_gradients(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.compile(optimiser.step)()
    check(call, model, before)


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


STARTS = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from torch._dynamo.utils import counters
from test_folds import X, net

call = torch.compile(net(), backend={backend!r}, fullgraph=True)
with torch.no_grad():
    call(X)
print(json.dumps([counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "normfx"])
def test_a_second_process_starts_warm(backend: str, tmp_path: Path) -> None:
    """Inductor's and AOTAutograd's caches hit with normfx as they do without."""
    code = STARTS.format(tests=str(Path(__file__).parent), backend=backend)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    starts = [
        json.loads(
            subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
        )
        for _ in range(2)
    ]
    assert starts == [[0, 0], [1, 1]]
