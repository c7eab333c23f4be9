"""Layers of one value in one product: the same results, true to every write, and apart where a part could be seen."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import EagerBackend
from folding import net
from packing import count, pack_all
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from writes import WRITES

from normfx.lower import affordable, joined
from normfx.weights.store import STORE

WIDTH = 12

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@pytest.fixture(autouse=True)
def _pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_all(monkeypatch)
    torch._dynamo.reset()
    gc.collect()


class Layers(nn.Module):
    """Layers of a norm's output, and what is made of their results."""

    def __init__(
        self, use: Callable[..., Any], sizes: tuple[int, ...] = (12, 12, 12), bias: tuple[bool, ...] = ()
    ) -> None:
        super().__init__()
        given = bias or (True,) * len(sizes)
        self.norm, self.use = nn.LayerNorm(WIDTH), use
        self.layers = nn.ModuleList(nn.Linear(WIDTH, out, bias=b) for out, b in zip(sizes, given, strict=True))
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.uniform_(self.norm.bias, -1.0, 1.0)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.use(*(layer(y) for layer in self.layers))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    split = [t.view(*t.shape[:2], 2, -1).transpose(1, 2) for t in (q, k, v)]
    return scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def products(model: nn.Module, x: Tensor, **options: Any) -> tuple[int, Any]:
    """How many products the model has, and what calls it; it computes what the model computes."""
    backend = EagerBackend({"fold": "cached", "strict": True, **options})
    call = torch.compile(model, backend=backend, fullgraph=True)
    same(call, model, x)
    return count(backend), call


def same(call: Any, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        actual, expected = call(x), copy.deepcopy(model).double()(x.double())
    for a, e in zip(*((t if isinstance(t, tuple) else (t,)) for t in (actual, expected)), strict=True):
        assert (a - e).norm() <= (2e-2 if a.dtype == torch.bfloat16 else 1e-6) * e.norm()


X = torch.randn(2, 5, WIDTH)

JOINED: dict[str, tuple[Layers, int]] = {
    "attention": (Layers(attend), 1),
    "no bias": (Layers(attend, bias=(False, False, False)), 1),
    "one without bias": (Layers(attend, bias=(True, False, True)), 1),  # β of the norm is one
    "gate and up": (Layers(lambda a, b: torch.nn.functional.silu(a) * b, (20, 20)), 1),
    "other widths": (Layers(lambda a, b, c: a.sum(-1, keepdim=True) * b + c.mean(), (7, 12, 30)), 1),
    "a part is written that only the model sees": (Layers(lambda a, b: (a.mul_(2.0) + b, b * 3), (12, 12)), 1),
    "rows of both": (Layers(lambda a, b: (a.flatten(0, 1).relu(), b.reshape(-1).relu()), (12, 12)), 1),
}


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_results(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, expected = JOINED[name]
    found, _ = products(copy.deepcopy(model).to(dtype), X.to(dtype))
    assert found in ((expected, 0) if dtype == torch.bfloat16 else (expected,))  # bfloat16 is packed on some processors


APART: dict[str, Layers] = {
    "a part is returned": Layers(lambda a, b: (a.relu(), b), (12, 12)),
    "a view of a part is returned": Layers(lambda a, b: (a.relu(), b.view(2, 5, 3, 4).transpose(1, 2)), (12, 12)),
    "a view that no part has": Layers(lambda a, b: (a.view(2, 60).relu(), b.view(-1).relu()), (12, 12)),
    "a part in other strides": Layers(lambda a, b: (a.as_strided((10,), (12,)).relu(), b.relu()), (12, 12)),
}


@pytest.mark.parametrize("name", APART)
def test_what_could_be_seen_stays_apart(name: str) -> None:
    torch.manual_seed(0)
    model = copy.deepcopy(APART[name])
    found, call = products(model, X)
    assert found == 2
    with torch.no_grad():
        assert [t.stride() for t in torch.utils._pytree.tree_leaves(call(X))] == [
            t.stride() for t in torch.utils._pytree.tree_leaves(model(X))
        ]


def test_the_others_are_joined() -> None:
    """Two of three, where the third is returned."""
    assert products(Layers(lambda a, b, c: (a.relu() + b, c)), X)[0] == 2


@pytest.mark.parametrize("swapped", [False, True])
def test_layers_of_a_part(swapped: bool) -> None:
    """A layer's result that is part of a joint one is read by two layers, which become one in turn."""

    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            a, b, c, d, e, f = self.layers
            first, second = (a(y), b(y)) if not swapped else (b(y), a(y))
            return c(first).relu() * d(first).relu() + (e(second).relu() - f(second).relu())

    assert products(Tree(), X)[0] == 3


def test_a_view_that_its_place_forbids() -> None:
    """Pairs that are read as complex numbers have to begin at an even entry."""

    def use(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.view_as_complex(b.unflatten(-1, (6, 2))).abs() + a.sum() + c.sum()

    assert products(Layers(use, (7, 12, 7)), X)[0] == 2
    torch._dynamo.reset()
    assert products(Layers(use, (8, 12, 6)), X)[0] == 1


def test_one_layer_twice() -> None:
    """It has one part, and its weight stands once in the joint one."""

    class Twice(Layers):
        def forward(self, x: Tensor) -> Any:
            y = self.norm(x)
            a, b = self.layers
            return a(y).relu() + a(y).sigmoid() + b(y).tanh()

    found, _ = products(Twice(lambda: None, (12, 12)), X)
    assert found == 1 and STORE.bytes == 4 * (2 * 12 * 12 + 2 * 12)


def test_layers_of_a_loop() -> None:
    """Layers that are called for several values keep one joint weight."""

    class Loop(Layers):
        def forward(self, x: Tensor) -> Any:
            for _ in range(3):
                y = self.norm(x)
                a, b = self.layers
                x = x + a(y).relu() * b(y).sigmoid()
            return x

    found, _ = products(Loop(lambda: None, (12, 12)), X)
    assert found == 3 and STORE.bytes == 4 * (2 * 12 * 12 + 2 * 12)


def test_a_value_that_is_written_between() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            first = self.one(y).relu()
            y.mul_(2.0)
            return first + self.other(y).relu()

    assert products(Writes(), X)[0] in (0, 2)


@pytest.mark.parametrize("reason", ["rows", "size", "gradients", "autocast"])
def test_layers_that_stay(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers(attend)
    if reason == "rows":
        monkeypatch.setattr(joined, "ROWS", 9)
    if reason == "size":
        monkeypatch.setattr(joined, "LARGEST", 10 * WIDTH * WIDTH - 1)
    backend = EagerBackend({"fold": "cached", "strict": True})
    with torch.set_grad_enabled(reason == "gradients"), torch.autocast("cpu", enabled=reason == "autocast"):
        torch.compile(model, backend=backend, fullgraph=True)(X)
    (module,) = backend.modules
    found = [str(node.target) for node in module.graph.nodes if "linear" in str(node.target)]
    assert len(found) == 3


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_followed(name: str) -> None:
    """Whichever weight, bias or norm changes, in whichever way."""

    class Two(nn.Module):
        """The parameters of `net`, and a second layer of its norm's output."""

        def __init__(self) -> None:
            super().__init__()
            self.whole, self.other = net(dtype=torch.float32), nn.Linear(16, 9)

        def forward(self, x: Tensor) -> Tensor:
            y = self.whole.norm1(self.whole.enter(x))
            return self.whole.up(y).relu().sum(-1) * self.other(y).relu().sum(-1)

    torch.manual_seed(0)
    model, x = Two(), torch.randn(4, 6)
    found, call = products(model, x)
    assert found == 2
    with torch.no_grad() if name.startswith("copy_") else torch.enable_grad():
        WRITES[name](model.whole)
    same(call, model, x)
    with torch.no_grad():
        model.other.weight.mul_(-2.0)
        model.other.bias.data = torch.randn(9)
    same(call, model, x)
    same(call, model, x)


def test_lengths() -> None:
    model = Layers(attend)
    call = torch.compile(model, backend="normfx", dynamic=True, options={"fold": "cached", "strict": True})
    for tokens in (5, 1, 40, 7):
        same(call, model, torch.randn(2, tokens, WIDTH))


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A joined weight that does not fit into the memory leaves each layer its own."""
    monkeypatch.setattr(affordable, "beyond", lambda *_: frozenset())
    for memory, expected in ((4 * 3 * WIDTH * WIDTH + 400, 1), (1300, 0)):
        torch._dynamo.reset()
        found, _ = products(Layers(attend), X, fold_memory=memory)
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "Llama", "ViT", "OPT", "Whisper"])
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real models, by their error against float64: fewer products, where the model's cache does not return them."""
    import transformers as t

    torch.manual_seed(0)
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97, "hidden_size": 64}
    made: dict[str, Callable[[], nn.Module]] = {
        "Bert": lambda: t.BertModel(t.BertConfig(**text, intermediate_size=128)),
        "Llama": lambda: t.LlamaModel(t.LlamaConfig(**text, intermediate_size=128, use_cache=False)),
        "ViT": lambda: t.ViTModel(
            t.ViTConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, image_size=48)
        ),
        "OPT": lambda: t.OPTModel(t.OPTConfig(**text, ffn_dim=128, word_embed_proj_dim=64, use_cache=False)),
        "Whisper": lambda: t.models.whisper.modeling_whisper.WhisperEncoder(
            t.WhisperConfig(encoder_layers=2, encoder_attention_heads=4, d_model=64, max_source_positions=60)
        ),
    }
    model = made[name]().eval()
    x = {"ViT": torch.randn(2, 3, 48, 48), "Whisper": torch.randn(2, 80, 120)}.get(name, torch.randint(97, (2, 30)))
    counts, results = [], []
    for least in (joined.LARGEST, 0):
        torch._dynamo.reset()
        monkeypatch.setattr(joined, "LARGEST", least)
        backend = EagerBackend({"fold": "cached", "strict": True})
        with torch.no_grad():
            results.append(torch.compile(model, backend=backend)(x)[0])
        counts.append(sum(str(node.target).count("packed_linear") for m in backend.modules for node in m.graph.nodes))
    assert counts[0] < counts[1]
    with torch.no_grad():
        wanted = model.double()(x.double() if x.is_floating_point() else x)[0]
    errors = [float((result - wanted).norm()) for result in results]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Granite", "Starcoder2", "ModernBert", "Glm4"])
def test_models_whose_weights_change(name: str) -> None:
    """Joined layers and the attention kernel under Inductor, between writes, by their error against float64."""
    import transformers as t

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    more: dict[str, Any] = {"intermediate_size": 128, "pad_token_id": 0}
    if name == "ModernBert":
        more["local_attention"] = 16
    else:
        more.update(num_key_value_heads=2, use_cache=False, head_dim=16)
    model = getattr(t, f"{name}Model")(getattr(t, f"{name}Config")(**sizes, **more)).eval()
    x = torch.randint(1, 97, (2, 33))
    call = torch.compile(model, backend="normfx", options={"strict": True, "attention": "normfx"})
    for write in (lambda p: p.add_(0.05 * torch.randn_like(p)), lambda p: p.mul_(1.1), lambda p: p.data.add_(0.02)):
        with torch.no_grad():
            for p in model.parameters():
                write(p)
            wanted = copy.deepcopy(model).double()(x)[0]
            eager, own = (float((run(x)[0] - wanted).norm()) for run in (model, call))
        assert own <= 1.5 * eager
