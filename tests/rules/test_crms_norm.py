"""rules="default,+crms_norm": streams of width d − 1 in real models, in float64, with outliers, and over 300 steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from equivalence import LOW_PRECISION, EagerBackend, assert_same_float64, exact
from models import VISION, named
from torch import Tensor, nn

from normfx.ir import ops
from normfx.rules.storage import BASES

CRMS = {"rules": "default,+crms_norm", "fold": "live", "crms_width": "exact"}
D, CHANNELS = 6, (0, 2, 5)


@pytest.mark.parametrize("width", [D - 1, 8])
@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("basis", BASES)
def test_what_is_stored(basis: str, channel: int, width: int) -> None:
    """A reader gets of the stored row what it gets of the row; the norm of the stored row is that of the row."""
    x, weight = torch.randn(3, D, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    centred, form = x - x.mean(-1, keepdim=True), (basis, channel, width, torch.float64)
    kept = ops.compress(x, -1, *form)
    assert kept.shape == (3, width) and not kept[:, D - 1 :].any()
    read = ops.compress_input(weight, 1, *form)
    torch.testing.assert_close(kept @ read.T, centred @ weight.T, rtol=1e-13, atol=1e-13)
    norm = ops.CRMS_NORM if basis == "drop" else ops.RMS_NORM
    normal = norm(kept, None, None, -1, 1e-5, "inside", width - D, 1.0, torch.float64, torch.float64)
    layer = nn.functional.layer_norm(x, (D,), eps=1e-5)
    torch.testing.assert_close(normal @ read.T, layer @ weight.T, rtol=1e-13, atol=1e-13)
    if basis == "orthonormal":
        torch.testing.assert_close(kept.norm(dim=-1), centred.norm(dim=-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("correction", [0, -1, 1])
@pytest.mark.parametrize("op", [ops.RMS_NORM, ops.CRMS_NORM], ids=str)
def test_derivative(op: Any, correction: int) -> None:
    form = (-1, 1e-3, "inside", correction, 1.5, torch.float64, torch.float64)
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4,), (4,))]
    assert torch.autograd.gradcheck(lambda *t: op(*t, *form), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: op(*t, *form), tensors)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_derivative_is_proved(n: int, compressed: bool) -> None:
    """dx = rstd·(t − w·Σ(t u)·rstd²/d), w = u + Σu in a CRMSNorm and u else, for n = d − 1 stored entries."""
    u, t = sympy.symbols(f"u:{n}", real=True), sympy.symbols(f"t:{n}", real=True)
    eps, d = sympy.Symbol("eps", positive=True), sympy.Integer(n + 1)
    total = sum(u) if compressed else sympy.Integer(0)
    root = (sum(x**2 for x in u) + total**2) / d + eps
    product = sum(a * b for a, b in zip(t, u, strict=True))
    for own, grad in zip(u, t, strict=True):
        formula = (grad - (own + total) * product / root / d) / sympy.sqrt(root)
        assert (
            sympy.simplify((sympy.diff(product / sympy.sqrt(root), own) - formula) * root ** sympy.Rational(3, 2)) == 0
        )


def _classifier(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**VISION))

    return build


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x).logits
        return out


QUICK = [("gpt2", "orthonormal", "exact", 5), ("gpt2", "drop", "padded", 5), ("whisper", "orthonormal", "exact", 12)]
STREAMS = {
    "gpt2": 5, "gpt_neox parallel": 5, "gpt_neox serial": 5, "opt": 5, "torchvision vit": 5, "timm vit": 5,
    "timm vit layer scale": 5, "whisper": 12, "bloom": 5, "falcon": 3, "cait": 9, "gptj": 3,
}  # fmt: skip
"""Norms on a compressed stream; BLOOM's first one starts the stream."""

ALL = [(name, basis, width, n) for name, n in STREAMS.items() for basis in BASES for width in ("exact", "padded")]


def _check(name: str, basis: str, width: str, norms: int) -> None:
    case = named(name)
    options = {**CRMS, "crms_basis": basis, "crms_width": width}
    report = assert_same_float64(case.make(), case.inputs(), options, promoted=case.promoted)
    assert sum("crms_norm" in site.rules for site in report.sites) == norms


@pytest.mark.parametrize(("name", "basis", "width", "norms"), QUICK)
def test_models(name: str, basis: str, width: str, norms: int) -> None:
    _check(name, basis, width, norms)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "basis", "width", "norms"), [case for case in ALL if case not in QUICK])
def test_all_models(name: str, basis: str, width: str, norms: int) -> None:
    _check(name, basis, width, norms)


@pytest.mark.parametrize(("name", "norms"), [pytest.param("ViT", 5, marks=pytest.mark.slow), ("Dinov2", 0)])
def test_classifiers(name: str, norms: int) -> None:
    """ViT's head reads its last norm. DINOv2's reads two rows side by side: no linear over the norm's features."""
    torch.manual_seed(0)
    model = Logits(_classifier(name)()).eval()
    report = assert_same_float64(model, (torch.randn(2, 3, 32, 32),), CRMS)
    assert sum("crms_norm" in site.rules for site in report.sites) == norms
    codes = {r.code for site in report.sites for r in site.refusals if r.rule == "crms_norm"}
    assert codes == (set() if norms else {"reader_not_linear"})


class Mixed(nn.Module):
    """The last norm reads the stream and an activation that does not pay to centre."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.down = nn.Embedding(10, 8), nn.Parameter(torch.randn(3, 8)), nn.Linear(6, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.head = nn.Linear(8, 6), nn.Linear(8, 3)

    def forward(self, ids: Tensor, x: Tensor) -> Any:
        h = self.table(ids) + self.places
        h = h + self.down(torch.relu(self.up(self.norm1(h))))
        return self.head(self.norm2(h + torch.relu(x)))


def test_a_norm_that_stays_keeps_the_width() -> None:
    """The first norm converts, the second does not, and reads what the first one's stream is made of."""
    report = assert_same_float64(Mixed(), (torch.arange(6).reshape(2, 3), torch.randn(2, 3, 8)), CRMS)
    first, second = report.sites
    assert first.to_rms_norm and not second.to_rms_norm
    assert "crms_norm" not in (*first.rules, *second.rules)
    assert {r.code for r in first.refusals if r.rule == "crms_norm"} == {"fixed_width"}


class Narrow(nn.Module):
    """A norm of half of a product, or one that a convolution over the channels reads."""

    def __init__(self, piece: bool) -> None:
        super().__init__()
        self.piece, self.norm = piece, nn.LayerNorm(8)
        self.write, self.linear, self.convolution = (
            nn.Linear(4, 16 if piece else 8),
            nn.Linear(8, 8),
            nn.Conv1d(8, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.piece:
            first, second = self.write(x).chunk(2, -1)
            return self.linear(self.norm(first)) * second
        return self.convolution(self.norm(self.write(x)).transpose(1, 2))


@pytest.mark.parametrize(("piece", "code"), [(True, "split_features"), (False, "reader_not_linear")])
@pytest.mark.parametrize("basis", ["drop", "orthonormal"])
def test_pieces_and_convolutions_keep_the_width(piece: bool, code: str, basis: str) -> None:
    report = assert_same_float64(Narrow(piece), (torch.randn(2, 7, 4),), {**CRMS, "crms_basis": basis})
    (site,) = report.sites
    assert site.to_rms_norm and [r.code for r in site.refusals if r.rule == "crms_norm"] == [code]


class Packed(nn.Module):
    """A norm without γ and β, read by a linear whose weight is stored in int8."""

    packed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8, elementwise_affine=False)
        self.places = nn.Parameter(torch.randn(3, 8))
        self.register_buffer("packed", torch.arange(24, dtype=torch.int8).reshape(3, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(self.table(ids) + self.places), self.packed.to(self.places.dtype) * 0.1)


def test_packed_readers_stay_packed() -> None:
    report = assert_same_float64(Packed(), (torch.arange(6).reshape(2, 3),), CRMS)
    (site,) = report.sites
    assert [r.code for r in site.refusals if r.rule == "crms_norm"] == ["packed_weight"]


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["auto", "frozen"])
def test_under_inductor(fold: str) -> None:
    """Kept and frozen folds, a changed parameter, and another number of rows."""
    model = Stack(d=16, layers=1)
    options = {"rules": "default,+crms_norm", "strict": True, "fold": fold}
    compiled = torch.compile(model, backend="normfx", fullgraph=True, dynamic=fold == "auto", options=options)
    with torch.no_grad():
        for rows in (2, 3):
            ids = torch.randint(0, 97, (rows, 16))
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)
            model.norm.weight.mul_(1.5)
            model.blocks[0].down.weight.add_(0.1)


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, d: int = 256, layers: int = 2, words: int = 97) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(words, d), nn.Parameter(0.1 * torch.randn(16, d))
        self.blocks = nn.ModuleList(Block(d) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, words)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def outlier(channel: int, scale: float, gamma: float, bias: bool = True, seed: int = 0) -> Stack:
    """A channel at `scale` standard deviations, from the first writer on, and γ of every norm on it."""
    torch.manual_seed(seed)
    model = Stack()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.add_(0.3 * torch.randn_like(norm.weight))
            norm.bias.add_(0.3 * torch.randn_like(norm.bias))
            norm.weight[channel] = gamma
            if not bias:
                norm.bias = None
        model.table.weight[:, channel] *= scale
    return model


OUTLIERS = [(3, 1, 1), (3, 100, 0.01), (255, 100, 1), (3, 1000, 1), (255, 1000, 5)]
AMPLIFIED = OUTLIERS[-1]
"""An outlier, and a γ that multiplies it: "drop" loses to eager either way, whether it goes or stays."""
HARD = [(b, found) for b in BASES for found in OUTLIERS if (b, found) != ("drop", AMPLIFIED)]


def _errors(basis: str, dtype: torch.dtype, found: tuple[int, float, float]) -> tuple[float, float]:
    """Of the compressed model and of eager against float64, in float32 or, without β (it is refused there), in bfloat16
    under autocast."""
    ids = torch.randint(0, 97, (16, 16), generator=torch.Generator().manual_seed(1))
    model, backend = outlier(*found, bias=dtype == torch.float32), EagerBackend({**CRMS, "crms_basis": basis})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            own, eager = ((call(ids).double() - want).norm().item() for call in (compiled, model))
    assert all("crms_norm" in site.rules for site in backend.report.sites)
    return own, eager


SLOW_FLOAT32 = [d if d == torch.bfloat16 else pytest.param(d, marks=pytest.mark.slow) for d in LOW_PRECISION]


@pytest.mark.parametrize("dtype", SLOW_FLOAT32)
@pytest.mark.parametrize(("basis", "found"), HARD)
def test_outliers(basis: str, dtype: torch.dtype, found: tuple[int, float, float]) -> None:
    """The error against float64 is compared with eager's own: anywhere, on every row."""
    own, eager = _errors(basis, dtype, found)
    assert own <= LOW_PRECISION[dtype] * eager, f"{own / eager:.2f}"


def test_what_drop_makes_of_an_amplified_outlier() -> None:
    """Why it is not the default basis: 2.1 times eager's error in float32 on a CPU with AVX2, 3.2 with AVX-512, whose
    eager error is smaller. In bfloat16 it is within the bound."""
    own, eager = _errors("drop", torch.float32, AMPLIFIED)
    assert LOW_PRECISION[torch.float32] < own / eager < 4
    own, eager = _errors("drop", torch.bfloat16, AMPLIFIED)
    assert own <= LOW_PRECISION[torch.bfloat16] * eager


def _chosen(model: nn.Module, basis: str) -> int:
    backend = EagerBackend({**CRMS, "crms_basis": basis})
    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(torch.zeros(1, 16, dtype=torch.int64))
    channels = {n.args[3] for n in backend.modules[0].graph.nodes if n.target in (ops.COMPRESS, ops.COMPRESS_INPUT)}
    (channel,) = channels
    assert isinstance(channel, int)
    return channel


def test_which_channel_goes() -> None:
    """ "drop": the outlier, unless the readers take much of it; "orthonormal": never the outlier."""
    assert _chosen(outlier(3, 1000, 1), "drop") == 3
    assert _chosen(outlier(3, 100, 100), "drop") != 3
    assert _chosen(outlier(255, 1000, 1), "orthonormal") != 255


@pytest.mark.parametrize(("training", "width"), [(True, 16), (False, 15)])
def test_width(training: bool, width: int) -> None:
    """By default padded to a multiple of 8 where gradients are recorded."""
    backend = EagerBackend({"rules": "default,+crms_norm", "fold": "live"})
    with torch.set_grad_enabled(training):
        torch.compile(Stack(d=16), backend=backend, fullgraph=True)(torch.zeros(1, 16, dtype=torch.int64))
    widths = {n.args[4] for n in backend.modules[0].graph.nodes if n.target in (ops.COMPRESS, ops.COMPRESS_INPUT)}
    assert widths == {width}


TEXT = "the stream is centred, so one entry of each row follows from all others. " * 20


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    codes = torch.tensor([ord(c) % 97 for c in TEXT])
    starts = torch.randint(0, len(TEXT) - 17, (steps, 8), generator=torch.Generator().manual_seed(3))
    rows = [torch.stack([codes[s : s + 17] for s in row]) for row in starts.tolist()]
    return [(row[:, :16], row[:, 1:]) for row in rows]


def train(model: nn.Module, call: Callable[[Tensor], Tensor], steps: int, autocast: bool = False) -> list[float]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for ids, wanted in batches(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(call(ids).flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("basis", BASES)
def test_training_in_float64(basis: str) -> None:
    """300 steps: the loss of eager in every one, and it falls."""
    torch.manual_seed(0)
    model = Stack(d=32).double()
    twin = copy.deepcopy(model)
    backend = EagerBackend({**CRMS, "crms_basis": basis})
    own = train(model, torch.compile(model, backend=backend, fullgraph=True), 300)
    want = train(twin, twin, 300)
    assert max(abs(a - b) for a, b in zip(own, want, strict=True)) <= 1e-9
    assert want[-1] < want[0] / 3
    assert backend.report.counts["crms_norm"] == 3


@pytest.mark.slow
def test_training_under_autocast() -> None:
    """bfloat16: the curve is as near to eager's as eager's is to itself with other rounding (weights moved by 1e-4)."""
    torch.manual_seed(0)
    start = Stack(d=32)
    moved = copy.deepcopy(start)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1 + 1e-4 * torch.randn_like(p))
    own = copy.deepcopy(start)
    compiled = torch.compile(own, backend=EagerBackend(CRMS), fullgraph=True)
    run = functools.partial(train, steps=300, autocast=True)
    curves = [torch.tensor(run(m, call)) for m, call in ((start, start), (moved, moved), (own, compiled))]
    eager, other, compressed = (curve.unfold(0, 20, 20).mean(1) for curve in curves)
    assert (compressed - eager).abs().max() <= 2 * (other - eager).abs().max() + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", STREAMS)
def test_low_precision_of_models(name: str, dtype: torch.dtype) -> None:
    """float32, and bfloat16 under autocast: the error over all outputs of all batches is compared with eager's own."""
    case = named(name)
    model = case.make()
    true, compiled = exact(copy.deepcopy(model).double()), torch.compile(model, backend=EagerBackend(CRMS))
    errors = [0.0, 0.0]
    for inputs in case.batches():
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        with torch.no_grad():
            want = true(*wide)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                for i, call in enumerate((compiled, model)):
                    errors[i] += (call(*inputs).double() - want).square().sum().item()
    own, eager = (e**0.5 for e in errors)
    assert own <= LOW_PRECISION[dtype] * eager, f"{own:.3g} against eager's {eager:.3g}"
