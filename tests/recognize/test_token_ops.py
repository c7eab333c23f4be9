"""Rows picked, put and added by index, gates and masks expanded to the features: what a centred stream passes in real
graphs, with the decision, and outputs and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_float64, transformed
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph
from torch.nn import functional as F

from normfx.ir.sites import Axis
from normfx.recognize.flow import Constants
from normfx.report import Report

WIDTH = 8
IDS = torch.arange(8).reshape(2, 4)


class Around(nn.Module):
    """A pre-LN branch, a step on the stream, a norm read by a linear."""

    def __init__(self, step: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.table, self.norm, self.final = nn.Embedding(10, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.read, self.write, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.gate, self.row = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(WIDTH))
        self.step = step

    def branch(self, x: Tensor) -> Tensor:
        return self.write(torch.relu(self.read(self.norm(x))))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.branch(x)
        return self.head(self.final(self.step(self, x, ids)))


def _check(step: Callable[[Any, Tensor, Tensor], Any], train: bool = False, **options: str) -> Report:
    torch.manual_seed(0)
    model = Around(step)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return assert_same_float64(model.train(train), (IDS,), options or None)


def _codes(report: Report, rule: str = "pre_rms_norm") -> list[str]:
    return [r.code for r in report.sites[-1].refusals if r.rule == rule]


def _drop_path(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """As timm writes it."""
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)
    mask.div_(0.5)
    return x + m.branch(x) * mask


def _stochastic_depth(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """As torchvision writes it, by row."""
    noise = torch.empty([x.shape[0], 1, 1], dtype=x.dtype, device=x.device)
    return x + m.branch(x) * noise.bernoulli_(0.5).div_(0.5)


def _drop_path_rounded(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """As transformers writes it."""
    mask = 0.5 + torch.rand((x.shape[0], 1, 1), dtype=x.dtype)
    return x + m.branch(x).div(0.5) * mask.floor_()


@pytest.mark.parametrize("step", [_drop_path, _stochastic_depth, _drop_path_rounded])
def test_drop_path_in_training(step: Callable[..., Tensor]) -> None:
    """One factor a sample: the stream stays centred, and the same numbers are drawn."""
    assert _check(step, train=True).counts["to_rms_norm"] == 3


def test_drop_path_by_batch() -> None:
    def step(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return x + m.branch(x) * x.new_empty(()).bernoulli_(0.5)

    assert _check(step, train=True).counts["to_rms_norm"] == 3


def test_elementwise_drop_breaks_the_stream() -> None:
    def step(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return x * torch.rand(x.shape, dtype=x.dtype).round_()

    assert _codes(_check(step, train=True)) == ["uncentred_input"]


def _image_rows(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Image features take the places of their tokens, as vision-language models do."""
    mask = (ids > 5).unsqueeze(-1).expand_as(x).to(x.device)
    return x.masked_scatter(mask, m.write(torch.ones(2, 6, dtype=x.dtype)))


def _assigned(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, torch.tensor([2, 0])] = m.branch(x[:, :2])
    y[ids > 5] = 0.0
    y.index_add_(1, torch.tensor([1, 1]), x[:, 2:])
    y.scatter_add_(1, (ids % 4)[..., None].expand(-1, -1, WIDTH), x)
    return torch.sub(y, x, alpha=0.5)


def _pruned(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The tokens with the largest score are kept."""
    kept = ids.sin().topk(2, 1).indices
    return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _merged(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Every second token joins its most alike other one: bipartite merging with a mean (ToMe)."""
    with torch.no_grad():
        metric = ids.sin()[..., None] * torch.ones(3)
        best = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).argmax(-1)
    into = best.unsqueeze(-1).expand(-1, -1, WIDTH)
    return x[:, 1::2].scatter_reduce(1, into, x[:, ::2], reduce="mean")


def _pooled_by_group(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return torch.einsum("bgt,btd->bgd", (ids % 3).eq(torch.arange(3)[:, None, None]).movedim(0, 1).to(x.dtype), x)


def _dense_average(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """A learned weight for every depth (DenseFormer)."""
    past = [x, x + m.branch(x)]
    return sum((m.row[i] * value for i, value in enumerate(past)), start=x * m.row[2]) * m.gate[0]


def _exit_early(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Tokens that are sure keep their value (LayerSkip); a gate expanded to the features."""
    y = x + m.branch(x)
    done = (m.gate > 0).expand(-1, WIDTH)
    return torch.where(done | (done & ~done), x, y) * m.gate.sigmoid().repeat(1, WIDTH)


def _windows(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Shifted windows, padded with zeros (Swin)."""
    padded = F.pad(x.roll(-1, 1), (0, 0, 0, 2)).view(2, 3, 2, WIDTH).flatten(0, 1)
    return (padded + m.branch(padded)).view(2, 6, WIDTH)[:, :4].roll(1, 1) + x


def _patches(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Patches of an image and back again: a channel's entries lie side by side in between."""
    image = x.transpose(1, 2).unflatten(-1, (2, 2))
    columns = F.unfold(image, (2, 1), padding=(1, 0)) * 2.0
    return F.fold(columns, (2, 2), (2, 1), padding=(1, 0)).flatten(2).transpose(1, 2) + x


@pytest.mark.parametrize(
    "step",
    [
        _image_rows, _assigned, _pruned, _merged, _pooled_by_group, _dense_average, _exit_early, _windows, _patches,
    ],
)  # fmt: skip
def test_streams_pass(step: Callable[..., Tensor]) -> None:
    report = _check(step)
    assert report.counts["to_rms_norm"] == report.counts["layer_norm"], report


def _copied_columns(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The image's patches as tokens, channels and positions in one row."""
    image = x.transpose(1, 2).unflatten(-1, (2, 2))
    rows = F.unfold(image, (2, 1)).transpose(1, 2)
    return F.layer_norm(rows, (2 * WIDTH,))[..., :WIDTH]


def _shuffled(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    image = x.transpose(1, 2).unflatten(-1, (2, 2)).repeat(1, 4, 1, 1)
    return F.pixel_shuffle(image, 2).flatten(2).transpose(1, 2)


def _channel_mask(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x.masked_fill((m.row > 0).expand_as(x), 0.0)


def _channel_gate(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x * (m.row.expand(4, WIDTH) * m.gate)


def _written_gate(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """A gate that was constant before something was written into a part of it."""
    gate = m.gate.detach().repeat(1, WIDTH)
    gate[:, 2:] *= 3.0
    return x * gate


def _index_of_features(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ((ids % 4)[..., None] + torch.arange(WIDTH)) % 4)


def _part_of_features(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """An index may be smaller than what it writes to: here it reaches the first features alone."""
    return x.scatter(1, (ids % 4)[:, :1, None].expand(-1, -1, 3), 0.0)


def _one_feature(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x.scatter_add(1, (ids % 4)[..., None], x[..., :1])


@pytest.mark.parametrize(
    "step",
    [
        _copied_columns, _shuffled, _channel_mask, _channel_gate, _written_gate, _index_of_features, _part_of_features,
        _one_feature,
    ],
)  # fmt: skip
def test_streams_stop(step: Callable[..., Tensor]) -> None:
    report = _check(step)
    assert _codes(report) or _codes(report, "linear_norm"), report


def test_shape_reads_do_not_observe() -> None:
    """zeros_like, new_empty, expand_as and type_as of a stream value read nothing of it."""

    def step(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        flag = (ids > 3).unsqueeze(-1).expand_as(x).type_as(x)
        return x * flag + torch.zeros_like(x) + x.new_zeros(x.shape) + torch.full_like(x, 2.0)

    assert _check(step).counts["to_rms_norm"] == 2


def test_no_infinity_is_dropped() -> None:
    """x + inf is NaN after a norm, and stays so."""

    def step(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return torch.where(ids[..., None] > 6, float("inf"), x)

    model = Around(step).eval()
    outputs, report = transformed(model, (IDS,))
    assert _codes(report) == ["uncentred_input"]
    assert torch.equal(outputs.isnan(), model(IDS).isnan()) and outputs.isnan().any()


@pytest.mark.parametrize("basis", ["drop", "orthonormal"])
def test_wide_coefficients_keep_the_width(basis: str) -> None:
    """An index or a gate with an entry for each feature has d of them: such a stream is not stored in d − 1."""
    options = {"rules": "default,+crms_norm", "crms_basis": basis, "crms_width": "exact", "fold": "live"}
    assert _codes(_check(_pruned, **options), "crms_norm") == ["fixed_width"]
    assert _codes(_check(_exit_early, **options), "crms_norm") == ["fixed_width"]
    narrow = _check(lambda m, x, ids: torch.take_along_dim(x, (ids % 4)[..., None], 1) * m.gate, **options)
    assert narrow.counts["crms_norm"] == 2
    assert _check(_drop_path, train=True, **options).counts["crms_norm"] == 3


class Scaled(nn.Module):
    """λ ⊙ of a product whose weight is no plain matrix on the right."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.norm = form, nn.LayerNorm(WIDTH)
        self.matrix, self.stack = nn.Parameter(torch.empty(WIDTH, WIDTH)), nn.Parameter(torch.empty(2, WIDTH, WIDTH))
        self.scale, self.bias = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH, 1))

    def forward(self, a: Tensor) -> Tensor:
        column = self.scale[:, None]
        if self.form == "left":
            y = (column * torch.mm(self.matrix, a)).t()
        elif self.form == "left_sum":
            y = (column * torch.addmm(self.bias, self.matrix, a)).t()
        elif self.form == "right":
            y = self.scale * torch.mm(a, self.matrix)
        elif self.form == "stack":
            y = self.scale * torch.matmul(a.expand(2, -1, -1), self.stack)
        else:
            y = self.scale * torch.bmm(a.expand(2, -1, -1), self.stack)
        return self.norm(y)


@pytest.mark.parametrize("form", ["left", "left_sum", "right", "stack", "batch"])
def test_layer_scale_of_products(form: str) -> None:
    """λ is folded into a matrix on the right alone (M11): elsewhere another dimension runs over the features."""
    torch.manual_seed(0)
    model = Scaled(form)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    report = assert_same_float64(model, (torch.randn(WIDTH, WIDTH),))
    assert report.counts["to_rms_norm"] == (form == "right")


def test_constants_are_proved() -> None:
    """Of a small graph: what was broadcast, or computed from such, and nothing that is written in place."""
    graph, mode, aten = Graph(), FakeTensorMode(), torch.ops.aten
    a = graph.placeholder("a")
    with mode:
        a.meta["val"] = torch.empty(4, 1)

    def call(op: Any, *args: Any) -> Any:
        node = graph.call_function(op, args)
        with mode:
            node.meta["val"] = op(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        return node

    wide = call(aten.expand.default, a, [4, 8])
    moved = call(aten.permute.default, call(aten.sigmoid.default, wide), [1, 0])
    heads = call(aten.view.default, wide, [4, 2, 4])
    drawn = call(aten.bernoulli.default, wide)
    shifted = call(aten.add.Tensor, wide, call(aten.arange.default, 8))
    facts = Constants(frozenset())
    assert facts.along(wide, Axis(1, 8)) and not facts.along(wide, Axis(0, 4))
    assert facts.along(moved, Axis(0, 8)) and not facts.along(moved, Axis(1, 4))
    assert facts.along(heads, Axis(2, 4)) and facts.along(call(aten.gt.Scalar, heads, 0), Axis(2, 4))
    assert not facts.along(drawn, Axis(1, 8)) and not facts.along(shifted, Axis(1, 8))
    assert not Constants(frozenset({wide})).along(moved, Axis(0, 8))
