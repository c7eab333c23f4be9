"""Mixtures of experts on a LayerNorm stream: every expert's output weight is centred, or the stream is refused as
a whole; γ and β go into the router and every expert, or stay. Outputs and gradients in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import EagerBackend, assert_same_float64, assert_same_results, outputs_and_grads
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from normfx.report import Report

WIDTH, HIDDEN, EXPERTS = 8, 4, 3
IDS = torch.arange(8).reshape(2, 4)


class Block(nn.Module):
    """A stream with one block of experts between two norms; `form` is how the experts are written."""

    packed: Tensor

    def __init__(self, form: str, bias: bool = True) -> None:
        super().__init__()
        self.form = form
        self.table, self.head = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.final = nn.LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.ups = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(EXPERTS))
        self.downs = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(EXPERTS))
        self.up, self.down = (nn.Parameter(torch.empty(EXPERTS, a, b)) for a, b in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)))
        self.up_bias, self.down_bias = (nn.Parameter(torch.empty(EXPERTS, 1, n)) for n in (HIDDEN, WIDTH))
        self.register_buffer("packed", torch.arange(WIDTH * HIDDEN, dtype=torch.int8).reshape(WIDTH, HIDDEN) - 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.norm(x).flatten(0, 1)
        gates = self.router(y).softmax(-1)
        return self.head(self.final(x + getattr(self, self.form)(y, gates).view(2, 4, WIDTH)))

    def dense(self, y: Tensor, gates: Tensor) -> Tensor:
        """Every expert sees every token."""
        out = torch.zeros_like(y)
        for e, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            out = out + gates[:, e : e + 1] * down(F.gelu(up(y)))
        return out

    def chosen(self, y: Tensor, gates: Tensor) -> Tensor:
        """Each expert takes the three tokens that want it most; rows are added into zeros (Mixtral's loop)."""
        out = torch.zeros((y.shape[0], WIDTH), dtype=y.dtype)
        for e, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            gate, rows = gates[:, e].topk(3)
            out.index_add_(0, rows, down(F.silu(up(y[rows]))) * gate[:, None])
        return out

    def masked(self, y: Tensor, gates: Tensor) -> Tensor:
        """Each token goes to one expert; whole rows are chosen by a mask (Switch)."""
        best = gates.argmax(-1, keepdim=True)
        out = y.new_zeros(y.shape)
        for e, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            out = torch.where((best == e).expand(-1, WIDTH), down(F.relu(up(y))), out)
        return out * gates.gather(1, best)

    def placed(self, y: Tensor, gates: Tensor) -> Tensor:
        """Rows of a fixed capacity for each expert, put back by index_put and by scatter."""
        out = torch.zeros_like(y)
        rows = gates.topk(2, 0).indices
        out[rows[:, 0]] = self.downs[0](F.relu(self.ups[0](y[rows[:, 0]])))
        wide = rows[:, 1, None].expand(-1, WIDTH)
        return out.scatter(0, wide, self.downs[1](F.relu(self.ups[1](y.gather(0, wide)))))

    def batched(self, y: Tensor, gates: Tensor) -> Tensor:
        hidden = torch.relu(torch.baddbmm(self.up_bias, y.expand(EXPERTS, -1, -1), self.up))
        return (torch.baddbmm(self.down_bias, hidden, self.down) * gates.t()[..., None]).sum(0)

    def multiplied(self, y: Tensor, gates: Tensor) -> Tensor:
        """Without biases, by broadcasting: (tokens, 1, 1, d) @ (experts, d, h)."""
        hidden = torch.relu(torch.matmul(y[:, None, None], self.up))
        return (torch.matmul(hidden, self.down).squeeze(2) * gates[..., None]).sum(1)

    def einsum(self, y: Tensor, gates: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("td,edh->teh", y, self.up))
        return torch.einsum("teh,ehd,te->td", hidden, self.down, gates)

    def dispatched(self, y: Tensor, gates: Tensor) -> Tensor:
        """Mesh-TensorFlow's form: one-hot products send rows to the experts' places, and back."""
        send = F.one_hot(gates.topk(2, 0).indices.t(), y.shape[0]).to(y.dtype)
        places = torch.einsum("ect,td->ecd", send, y)
        written = torch.bmm(torch.relu(torch.bmm(places, self.up)), self.down)
        return torch.einsum("ect,ecd,te->td", send, written, gates)

    def looked_up(self, y: Tensor, gates: Tensor) -> Tensor:
        """Each token multiplies its own expert's weights."""
        best = gates.argmax(-1)
        return torch.bmm(torch.relu(torch.bmm(y[:, None], self.up[best])), self.down[best]).squeeze(1)

    def grouped(self, y: Tensor, gates: Tensor) -> Tensor:
        """Rows sorted by expert, one grouped product each way."""
        order = gates.argmax(-1).argsort(stable=True)
        ends = torch.tensor([2, 5, 8], dtype=torch.int32)
        hidden = torch.relu(torch._grouped_mm(y[order], self.up, offs=ends))
        return torch.zeros_like(y).index_copy(0, order, torch._grouped_mm(hidden, self.down, offs=ends))

    def packed_expert(self, y: Tensor, gates: Tensor) -> Tensor:
        """The last expert's output weight is stored as int8."""
        out = gates[:, :1] * self.downs[0](F.relu(self.ups[0](y)))
        return out + gates[:, 1:2] * F.linear(F.relu(self.ups[1](y)), self.packed.to(y.dtype) * 0.02)

    def gated_reader(self, y: Tensor, gates: Tensor) -> Tensor:
        """The gate multiplies what the expert reads: that row is no row of the norm any more."""
        return self.downs[0](torch.relu(self.ups[0](y * gates[:, :1])))


def _model(form: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Block(form, bias)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model.eval()


def _check(form: str, **options: str) -> Report:
    return assert_same_float64(_model(form), (IDS,), options or None)


def _codes(report: Report, site: int, rule: str) -> list[str]:
    return [r.code for r in report.sites[site].refusals if r.rule == rule]


FOLDS = ["dense", "chosen", "masked", "placed", "batched", "multiplied", "einsum"]


@pytest.mark.parametrize("form", FOLDS)
def test_experts_are_centred_and_folded(form: str) -> None:
    """All experts are writers of one stream, and with the router all the readers of the norm."""
    report = _check(form)
    assert report.counts["to_rms_norm"] == 2 and report.counts["fold_affine"] == 2, report


def test_gamma_goes_into_weights_that_are_looked_up() -> None:
    """Into all of them, before the lookup. A β has no place: each row would need its own weight's Wβ."""
    report = assert_same_float64(_model("looked_up", bias=False), (IDS,))
    assert report.counts["fold_affine"] == 2


@pytest.mark.parametrize("basis", ["drop", "orthonormal"])
def test_looked_up_weights_keep_their_width(basis: str) -> None:
    options = {"rules": "default,+crms_norm", "crms_basis": basis, "crms_width": "exact", "fold": "live"}
    report = assert_same_float64(_model("looked_up", bias=False), (IDS,), options)
    refused = [r for r in report.sites[0].refusals if r.rule == "crms_norm"]
    assert [r.code for r in refused] == ["fixed_width", "fixed_width"], report.sites[0]
    assert "index" in refused[0].detail  # the weights that are looked up; then what else reads the stream


@pytest.mark.parametrize("form", ["dispatched", "looked_up", "gated_reader"])
def test_experts_are_centred_and_read_as_they_are(form: str) -> None:
    """γ and β stay: weights picked by token with a β, rows that are no longer the norm's."""
    report = _check(form)
    assert report.counts["to_rms_norm"] == 2
    assert _codes(report, 0, "fold_affine") == ["reader_not_linear"]


def _traces_grouped_float32() -> bool:
    """Whether this torch's own compile can trace grouped products in float32; 2.13 traces those in bfloat16 only."""
    with FakeTensorMode():
        rows, weights = torch.empty(8, WIDTH), torch.empty(EXPERTS, WIDTH, HIDDEN)
        ends = torch.empty(EXPERTS, dtype=torch.int32)
        try:
            torch._grouped_mm(rows, weights, offs=ends)
        except RuntimeError:
            return False
    return True


@pytest.mark.skipif(not _traces_grouped_float32(), reason="this torch traces grouped products in bfloat16 only")
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_products(bias: bool) -> None:
    """γ goes into all groups' weights; a β would need each row's own group. The op has no float64 form: here float32
    is compared, to a few units of its round-off."""
    model = _model("grouped", bias)
    want, want_grads = outputs_and_grads(model, model, (IDS,))
    backend = EagerBackend()
    got, got_grads = outputs_and_grads(torch.compile(model, backend=backend, fullgraph=True), model, (IDS,))
    assert_same_results(want, want_grads, got, got_grads, tolerance=2e-5, floor=1.0)
    report = backend.report
    assert report.counts["to_rms_norm"] == 2
    assert _codes(report, 0, "fold_affine") == (["reader_not_linear"] if bias else [])


@pytest.mark.skipif(not _traces_grouped_float32(), reason="this torch traces grouped products in bfloat16 only")
def test_grouped_columns() -> None:
    """A matrix for each group of columns: a mean over all columns is no mean of one group's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.read = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 4)
            self.weight = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            ends = torch.tensor([3, 8], dtype=torch.int32)
            out: Tensor = self.read(self.norm(torch._grouped_mm(x, self.weight, offs=ends) + self.table(ids)))
            return out

    model, given, backend = Model(), (torch.randn(2, 5, 16), torch.arange(5)), EagerBackend()
    torch._dynamo.reset()
    want, want_grads = outputs_and_grads(model, model, given)
    got, got_grads = outputs_and_grads(torch.compile(model, backend=backend, fullgraph=True), model, given)
    assert_same_results(want, want_grads, got, got_grads, tolerance=2e-5, floor=1.0)
    assert _codes(backend.report, 0, "pre_rms_norm") == ["uncentred_input"]


def test_one_packed_expert_refuses_the_stream() -> None:
    """All or none: the other expert is left alone too."""
    report = _check("packed_expert")
    assert report.counts["to_rms_norm"] == 1  # the norm before, on looked-up rows
    (refusal,) = [r for r in report.sites[1].refusals if r.rule == "pre_rms_norm"]
    assert refusal.code == "packed_weight" and "linear" in refusal.detail
    assert report.graphs[0].after.count("center(s.downs") == 0


@pytest.mark.parametrize("basis", ["drop", "orthonormal"])
@pytest.mark.parametrize(("form", "stored"), [("dense", False), ("chosen", True), ("masked", False), ("batched", True)])
def test_compressed_experts(form: str, stored: bool, basis: str) -> None:
    """Stored in d − 1 entries, unless a sum starts as zeros of the norm's own width, or a mask has d entries."""
    report = _check(form, rules="default,+crms_norm", crms_basis=basis, crms_width="exact", fold="live")
    assert [("crms_norm" in site.rules) for site in report.sites] == [stored] * 2, report


class Choice(nn.Module):
    """Rows of a norm that a linear reads through `pick`."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.norm, self.read, self.pick = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), pick

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.pick(self.norm(x)))


ROWS = torch.tensor([[0, 2, 2, 1], [3, 3, 0, 1]])


@pytest.mark.parametrize(
    ("pick", "folds"),
    [
        (lambda y: y.gather(1, ROWS[..., None].expand(-1, -1, WIDTH)), True),
        (lambda y: torch.take_along_dim(y, ROWS[..., None], 1), True),
        (lambda y: y[torch.arange(2)[:, None], ROWS], True),
        (lambda y: y.unfold(1, 2, 1).transpose(2, 3), True),
        (lambda y: F.pad(y, (0, 0, 0, 0)), True),
        (lambda y: y.gather(2, ROWS[..., None].expand(-1, -1, WIDTH)), False),
        (lambda y: torch.zeros_like(y).index_copy(1, torch.tensor([2]), y[:, :1]), False),
        (lambda y: torch.zeros_like(y).scatter_add(1, ROWS[..., None].expand(-1, -1, WIDTH), y), False),
        (lambda y: y.masked_fill(ROWS[..., None] > 1, 0.0), False),
        (lambda y: F.pad(y, (0, 0, 0, 1)), False),
    ],
)
def test_affine_passes_picked_rows(pick: Any, folds: bool) -> None:
    """β passes where every row that is read is a row of this norm: not where zeros or sums stand among them (M7)."""
    torch.manual_seed(0)
    model = Choice(pick)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    report = assert_same_float64(model, (torch.randn(2, 4, WIDTH),))
    assert report.counts.get("fold_affine", 0) == folds
