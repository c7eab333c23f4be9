"""Forms that real models take around norms, each in float64 with the decisions it must get."""

from __future__ import annotations

import pytest
import torch
from equivalence import EagerBackend, assert_same_float64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).reshape(2, 6)
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class SharedModules(nn.Module):
    """One norm and one linear used twice in a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.write = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.write(self.norm(x))
        x = x + self.write(self.norm(x))
        return self.write(self.norm(x))


class TiedWriterAndReader(nn.Module):
    """One weight reads norms, writes the stream and, transposed, writes it again."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        hidden = torch.tanh(F.linear(self.norm(x), self.weight))
        x = x + F.linear(hidden, self.weight.t())
        x = x + F.linear(self.norm(x), self.weight)
        return F.linear(self.norm(x), self.weight)


class Attention(nn.Module):
    """nn.MultiheadAttention, whose projections are pieces of one weight, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.final = nn.Linear(16, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.final(x))


class Composed(nn.Module):
    """Weights that are expressions of parameters: weight norm, spectral norm, a low-rank product."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.final = nn.Embedding(12, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.spectral = parametrizations.spectral_norm(nn.Linear(16, 16))
        self.left, self.right = nn.Parameter(torch.randn(16, 3)), nn.Parameter(torch.randn(3, 16))
        self.head = parametrizations.weight_norm(nn.Linear(16, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.normed(self.norm(x))
        x = x + F.linear(torch.relu(self.spectral(self.norm(x))), self.left @ self.right)
        return self.head(self.final(x))


class Heads(nn.Module):
    """Per-head norms of a projection, heads one after the other and interleaved, merged again before a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.strided = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.read1, self.read2 = nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.norm1(self.blocks(x).view(2, 6, 2, 8)).flatten(-2)
        two = self.norm2(self.strided(x).view(2, 6, 8, 2).transpose(-1, -2)).transpose(-1, -2).reshape(2, 6, 16)
        return self.read1(one), self.read2(two)


class Images(nn.Module):
    """Convolutions as writers: dilated with string padding, 1x1, transposed; pooling and interpolation between."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 3, padding="same", dilation=2)
        self.point, self.grow = nn.Conv2d(16, 16, 1), nn.ConvTranspose2d(3, 16, 2, stride=2)
        self.norm, self.final = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, image: Tensor) -> Tensor:
        x = F.avg_pool2d(self.patch(image), 2)
        x = x + self.point(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear") + self.grow(F.avg_pool2d(image, 2))
        return self.final(x.flatten(2).transpose(1, 2))


class Rows(nn.Module):
    """A final norm read through indexing, splitting, moving and averaging of whole rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.write = nn.Embedding(12, 16), nn.Linear(16, 16)
        self.norm, self.final, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.table(ids)
        y = self.final(x + self.write(self.norm(x)))
        picked = y[torch.arange(2), torch.tensor([1, 3])]
        return (
            self.head(picked),
            self.head(y.tensor_split(2, 1)[1]),
            self.head(y.movedim(0, 1)),
            self.head(y.mean((0, 1))),
        )


class SwitchedBranch(nn.Module):
    """A frozen writer and a branch without gradients inside a graph with them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.write = nn.Embedding(12, 16), nn.Linear(16, 16).requires_grad_(False)
        self.norm, self.final, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        with torch.no_grad():
            y = self.write(self.norm(x))
        return self.head(self.final(x + y + self.write(self.norm(x))))


FORMS = [
    (SharedModules, (X,), 3, 3, 3),
    (TiedWriterAndReader, (X,), 3, 3, 3),
    (Attention, (X,), 2, 2, 2),
    (Composed, (IDS,), 3, 3, 3),
    (Heads, (X,), 2, 2, 2),
    (Images, (IMAGE,), 2, 2, 1),
    (Rows, (IDS,), 2, 2, 2),
    (SwitchedBranch, (IDS,), 3, 3, 3),
]


@pytest.mark.parametrize(
    ("build", "inputs", "norms", "to_rms", "folded"), FORMS, ids=lambda v: getattr(v, "__name__", "")
)
def test_form(build: type[nn.Module], inputs: tuple[Tensor, ...], norms: int, to_rms: int, folded: int) -> None:
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim <= 1:
                p.add_(0.3 * torch.randn_like(p))
    report = assert_same_float64(model, inputs, floor=1e-2)
    counts = report.counts
    assert (counts["layer_norm"], counts["to_rms_norm"], counts.get("fold_affine", 0)) == (norms, to_rms, folded), (
        report
    )
    assert all(site.rules or site.refusals for site in report.sites)


class Patches(nn.Module):
    """A norm of rows that lie apart in memory (a convolution's channels), and a view of what it returns."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.stored = stored
        self.patch, self.norm, self.head = nn.Conv1d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.norm(self.patch(x).transpose(1, 2)).view(-1, 8)
        return self.head(y) if self.stored else (self.head(y), y)


@pytest.mark.parametrize("stored", [False, True])
def test_norm_output_is_contiguous(stored: bool) -> None:
    """`layer_norm` returns rows in order, however its input lies: what replaces it does too."""
    options = {"rules": "default,+crms_norm", "crms_width": "exact", "fold": "live"} if stored else None
    report = assert_same_float64(Patches(stored), (torch.randn(2, 3, 8),), options)
    assert report.counts["to_rms_norm"] == 1 and ("crms_norm" in report.sites[0].rules) == stored


@pytest.mark.parametrize("where", [False, True])
def test_numbers_of_the_graph_are_dropped(where: bool) -> None:
    """The length, which is one number for all features, leaves a centred stream like any other constant."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.write, self.read = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            x = torch.where(ids[..., None] > 4, x, ids.shape[1]) if where else x + ids.shape[1]
            x = x + self.write(torch.tanh(self.norms[0](x)))
            out: Tensor = self.read(self.norms[1](x))
            return out

    model, backend = Model().double(), EagerBackend()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length in (3, 7, 5):
        ids = torch.arange(2 * length).reshape(2, length)
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-12, atol=1e-12)
    assert len(backend.graphs) == 1 and backend.report.counts["to_rms_norm"] == 2


def test_norm_output_is_contiguous_at_any_size() -> None:
    model, backend = Patches(True).double(), EagerBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 8), (3, 3, 12), (5, 3, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)
    assert len(backend.graphs) == 1
