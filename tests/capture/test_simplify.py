"""Equal forms in which less is read of more values: parts of concatenations, casts to the dtype at hand; and cuts
between whole rows of features, which a stream passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import EagerBackend, assert_same_float64, transformed
from torch import Tensor, nn

from normfx.backend import listening
from normfx.graph.nodes import op_name
from normfx.report import GraphReport

D = 8


class ClassToken(nn.Module):
    """A token that is normalised, joined to the others, and taken out again by `cut` for a branch of its own."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.table = cut, nn.Embedding(20, D)
        self.norms, self.final = nn.ModuleList(nn.LayerNorm(D) for _ in range(3)), nn.LayerNorm(D)
        self.writes, self.branch, self.head = (
            nn.ModuleList(nn.Linear(D, D) for _ in range(3)),
            nn.Linear(D, D),
            nn.Linear(D, 2),
        )
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.table(ids)
        for norm, write in zip(self.norms, self.writes, strict=True):
            x = x + write(torch.tanh(norm(x)))
        first = F.layer_norm(x[:, :1], (D,))
        joined = torch.cat([first, x[:, 1:]], 1)
        token = {
            "slice": lambda: joined[:, 0:1],
            "select": lambda: joined[:, 0].unsqueeze(1),
            "from the end": lambda: joined[:, -5:-4],
            "across": lambda: joined[:, 0:2].mean(1, keepdim=True),
            "written": lambda: joined[:, 0:1].mul_(2.0),
            "returned": lambda: joined[:, 0:1],
            "strided": lambda: joined[:, 0:2:2],
        }[self.cut]()
        joined = joined + torch.cat([self.branch(token), joined[:, 1:]], 1)
        out = self.head(self.final(joined))
        return (out, token) if self.cut == "returned" else (out,)


def ids() -> tuple[Tensor, ...]:
    return (torch.arange(10).reshape(2, 5),)


@pytest.mark.parametrize(
    ("cut", "passes"),
    [
        ("slice", True), ("select", True), ("from the end", True), ("across", False), ("written", False),
        ("returned", False), ("strided", False),
    ],
)  # fmt: skip
def test_parts_of_concatenations(cut: str, passes: bool) -> None:
    """Who takes the class token out of the join does not read the other tokens."""
    report = assert_same_float64(ClassToken(cut), ids(), {"fold": "live"})
    named = [site for site in report.sites if site.name.startswith("norms")]
    assert all(("pre_rms_norm" in site.rules) is passes for site in named[1:])


def test_what_is_cut_away_keeps_its_gradient_of_zeros() -> None:
    """A prompt that is joined and cut off again: eager gives it zeros, not None (weight decay tells them apart)."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.norm, self.read = nn.Parameter(torch.ones(2, 1, D)), nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.read(self.norm(torch.cat([x, self.prompt], 1)[:, :3]))
            return out

    assert_same_float64(Model(), (torch.randn(2, 3, D),), {"fold": "live"})


@pytest.mark.parametrize("dead", ["comparison", "index", "detached", "without gradients"])
def test_a_part_keeps_its_gradient_of_zeros(dead: str) -> None:
    """What else reads the join hands no gradient on: the prompt's zeros come through the slice."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.norm, self.read = nn.Parameter(torch.ones(2, 1, D)), nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([x, self.prompt], 1)
            twice = joined * 2
            with torch.no_grad():
                quiet = joined.exp()
            other = {
                "comparison": lambda: (twice > 0)[:, :3],
                "index": lambda: twice.argmax(-1)[:, :3, None],
                "detached": lambda: twice.detach()[:, :3],
                "without gradients": lambda: quiet[:, :3],
            }[dead]()
            out: Tensor = self.read(self.norm(joined[:, :3])) * other
            return out

    assert_same_float64(Model(), (torch.randn(2, 3, D),), {"fold": "live"})


def test_a_join_without_gradients_gives_its_parts_none() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.norm, self.read = nn.Parameter(torch.ones(2, 3, D)), nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            part = self.part * 2
            with torch.no_grad():
                joined = torch.cat([part, x], 1)
                other = joined.exp()
            return self.read(self.norm(x) + joined[:, :3]), other

    assert_same_float64(Model(), (torch.randn(2, 3, D),), {"fold": "live"})


@pytest.mark.parametrize(
    "hand_on",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout(x, 0.0),
        lambda x: F.alpha_dropout(x, 0.5, training=False),
        lambda x: +x,
        lambda x: x.double(),
        lambda x: x.resolve_conj(),
        torch.atleast_3d,
        lambda x: torch.broadcast_tensors(x, torch.ones(D))[0],
        lambda x: x.view(2, 5, D),
        lambda x: x.expand(2, 5, D),
        lambda x: x.clone(),
    ],
)
def test_inputs_handed_on_where_no_gradients_are_recorded(hand_on: Callable[[Tensor], Tensor]) -> None:
    """An op that returns its operand itself keeps its gradient; a copy or view has none."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.writes, self.norms = (
                nn.ModuleList(nn.Linear(D, D) for _ in range(3)),
                nn.ModuleList(nn.LayerNorm(D) for _ in range(4)),
            )
            self.read = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = hand_on(x)
            for norm, write in zip(self.norms, self.writes, strict=False):
                x = x + write(torch.tanh(norm(x)))
            out: Tensor = self.read(self.norms[3](x))
            return out

    report = assert_same_float64(Model(), (torch.randn(2, 5, D),), {"fold": "live"})
    assert report.counts["to_rms_norm"] == 4


class Joined(nn.Module):
    """What `use` makes of the first tokens of a concatenation, next to a norm on all of them."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.read, self.use = nn.LayerNorm(D), nn.Linear(D, D), use

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([x, y], 1)
        return self.use(joined[:, :3]), self.read(self.norm(joined))


@pytest.mark.parametrize(
    "use",
    [
        lambda part: part,
        lambda part: F.dropout(part, 0.5, training=False),
        torch.atleast_3d,
        lambda part: part.contiguous(),
        lambda part: part.unbind(1)[0],
    ],
)
def test_a_returned_part_is_memory_of_its_own(use: Callable[[Tensor], Tensor]) -> None:
    """The graph returns a slice of what it joined, not of its input."""
    x, y = torch.randn(1, 3, D), torch.randn(1, 2, D)
    graphs: list[GraphReport] = []
    torch._dynamo.reset()
    with listening(graphs.append), torch.no_grad():
        part, _ = torch.compile(Joined(use), backend="normfx", options={"strict": True})(x, y)
    assert graphs and "fold_affine" in graphs[0].sites[0].rules
    before = x.clone()
    part.mul_(2.0)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("use", "part"),
    [
        (lambda part: part.view(2, 3 * D) * 2.0, torch.randn(2, D, 3, dtype=torch.float64).mT),
        (lambda part: part.exp().view(2, 3 * D), torch.randn(2, D, 3, dtype=torch.float64).mT),
        (lambda part: part.view(2, 3 * D) * 2.0, torch.randn(2, 6, D, dtype=torch.float64)[:, ::2]),
        (lambda part: part.as_strided((2, 4, D), (5 * D, D, 1)) * 2.0, torch.randn(2, 3, D, dtype=torch.float64)),
        (lambda part: part * 2, torch.randn(2, 3, D, dtype=torch.float16)),
        (lambda part: part.view(2, 3 * D) * 2.0, torch.randn(2, 6, D, dtype=torch.float64)[:, 2:5]),
    ],
    ids=["transposed", "transposed, a copy", "strided", "read around", "promoted", "a slice"],
)
def test_parts_laid_out_otherwise(use: Callable[[Tensor], Tensor], part: Tensor) -> None:
    """A part is not what the concatenation makes of it: other strides, another dtype."""
    model, rest = Joined(use).double(), torch.randn(2, 2, D, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=EagerBackend(), fullgraph=True)
    for want, got in zip(model(part, rest), compiled(part, rest), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert got.stride() == want.stride()


def test_nothing_is_left_of_dropout_in_eval() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.LayerNorm(D), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.drop(self.norm(self.drop(x))) * 2.0
            return out

    for training in (False, True):
        backend = EagerBackend()
        torch._dynamo.reset()
        torch.compile(Model().train(training), backend=backend)(torch.randn(2, 3, D))
        left = [node for node in backend.modules[0].graph.nodes if op_name(node) == "aten::dropout"]
        assert len(left) == (2 if training else 0)


@pytest.mark.parametrize("asked", [torch.float32, torch.float64])
def test_casts_to_the_dtype_at_hand(asked: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.read = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            s = x + y
            out: Tensor = self.read(self.norm(s.to(asked)).to(x.dtype)) + s
            return out

    backend = EagerBackend()
    model = Model() if asked == torch.float32 else Model().double()
    given = [torch.randn(2, 3, D, dtype=next(model.parameters()).dtype) for _ in range(2)]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=backend)(*given), model(*given))
    assert not any(op_name(node).startswith("aten::to") for node in backend.modules[0].graph.nodes)
    assert backend.report.sites[0].rules == ("fold_affine", "fuse_residual_norm")


class Cut(nn.Module):
    """One product, cut into q, k and v; norms of heads of `size` over the first pieces."""

    def __init__(self, size: int, normed: int, by: str = "chunk") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.normed, self.by = size, normed, by
        self.project, self.norms = nn.Linear(D, 3 * D), nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        pieces = {
            "chunk": lambda: y.chunk(3, -1),
            "split": lambda: y.split([D, 2 * D], -1),
            "slice": lambda: (y[..., :D], y[..., D : 2 * D], y[..., 2 * D :]),
            "crosswise": lambda: y.split([D - 2, 2 * D + 2], -1),
        }[self.by]()
        outs = [
            norm(p[..., : p.shape[-1] // self.size * self.size].unflatten(-1, (-1, self.size))).flatten(-2)
            if i < self.normed
            else p
            for i, (p, norm) in enumerate(zip(pieces, self.norms, strict=False))
        ]
        return torch.cat([torch.sin(o) for o in outs], -1)


@pytest.mark.parametrize("by", ["chunk", "split", "slice", "crosswise"])
@pytest.mark.parametrize(("size", "normed"), [(4, 3), (D, 3), (4, 2)])
def test_pieces_of_one_product(size: int, normed: int, by: str) -> None:
    report = assert_same_float64(Cut(size, normed, by), (torch.randn(2, 5, D),), {"fold": "live"})
    whole = by != "crosswise" and (normed == 3 or by == "split")
    assert all(("linear_norm" in site.rules) is whole for site in report.sites)


@pytest.mark.parametrize("place", ["g outside", "g inside", "summed squares", "floor"])
def test_scale_norm(place: str) -> None:
    """g·x/‖x‖ is an RMSNorm whose divisor is 1, also with a floor under the norm."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.read = nn.Parameter(torch.tensor(3.0)), nn.Linear(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            y = {
                "g outside": lambda: x / length * self.g,
                "g inside": lambda: x * (self.g / length),
                "summed squares": lambda: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-3) * self.g,
                "floor": lambda: self.g * F.normalize(x, dim=-1),
            }[place]()
            out: Tensor = self.read(y)
            return out

    report = assert_same_float64(Model(), (torch.randn(3, D),))
    (site,) = report.sites
    assert site.kind == "RMSNorm" and site.rules == ("fold_affine",)


def test_an_activation_enters_behind_what_makes_it_smaller() -> None:
    """Tokens mixed from twice as many: two norms pay for one centring of the mixed ones, not of the others."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.up, self.down = nn.LayerNorm(D), nn.Linear(6, 12), nn.Linear(12, 6)
            self.norm, self.write, self.final = nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D)
            self.table = nn.Embedding(20, D)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            x = x + self.down(F.dropout(F.gelu(self.up(self.start(x).transpose(1, 2))), 0.0)).transpose(1, 2)
            x = x + self.write(torch.tanh(self.norm(x)))
            out: Tensor = self.final(x)
            return out

    given = (torch.arange(12).reshape(2, 6),)
    _, report = transformed(Mixer(), given)
    assert report.counts["to_rms_norm"] == 3 and "center(%" in report.graphs[0].after
    assert_same_float64(Mixer(), given)
