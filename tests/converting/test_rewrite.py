"""normfx.rewrite: a program with cheaper norms that computes the same, with live folds and with frozen ones."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from blocks import Blocks, ids
from equivalence import LOW_PRECISION
from models import named
from torch import Tensor, nn
from torch.export import ExportedProgram

import normfx

FAMILIES = ("gpt2", "timm vit layer scale", "bert post-norm", "gpt_neox parallel", "encoder", "llama", "mixer")
QUICK = {"gpt2", "encoder"}
FROZEN = {"fold": "frozen"}
LIVE = {"fold": "live"}


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def targets(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_rewrite_exported_program(dynamic: bool) -> None:
    model = Blocks().double()
    shapes = {"ids": {1: torch.export.Dim("tokens", min=2, max=64)}} if dynamic else None
    program = torch.export.export(model, (ids(),), dynamic_shapes=shapes)
    text = str(program.graph)
    rewritten = normfx.rewrite(program, LIVE)
    assert str(program.graph) == text
    targets = [str(n.target) for n in rewritten.graph.nodes if n.op == "call_function"]
    assert not any("layer_norm" in t or "normfx" in t for t in targets)
    assert all("val" in n.meta for n in rewritten.graph.nodes if n.op == "call_function")
    assert rewritten.state_dict.keys() == program.state_dict.keys()
    buffer = io.BytesIO()
    torch.export.save(rewritten, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for tokens in (6, 9) if dynamic else (6,):
        torch.testing.assert_close(loaded(ids(tokens)), model(ids(tokens)), rtol=1e-12, atol=1e-12)


def test_rewritten_program_trains_and_decomposes() -> None:
    model = Blocks().double()
    rewritten = normfx.rewrite(torch.export.export(model, (ids(),)), LIVE)
    module = rewritten.module()
    module(ids()).sum().backward()
    model(ids()).sum().backward()
    grads = dict(module.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name].grad, p.grad, rtol=1e-10, atol=1e-11)
    lowered = rewritten.run_decompositions()
    torch.testing.assert_close(lowered.module()(ids()), model(ids()), rtol=1e-12, atol=1e-12)


def test_rewrite_refuses_other_things() -> None:
    model: Any = Blocks()
    with pytest.raises(normfx.ExportError, match=r"takes a torch\.export\.ExportedProgram, not Blocks"):
        normfx.rewrite(model)


def test_program_without_norms_comes_back_as_it_is() -> None:
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.randn(2, 3),))
    assert normfx.rewrite(program) is program


# ---------------------------------------------------------------- norms and reports


def test_norms_are_ops_of_aten() -> None:
    """ONNX has an op for each; those that subtract a mean and were not touched stay whole, too."""
    program = torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.GELU(), Unconverted().double()), (x64(3, 8),))
    rewritten = normfx.rewrite(program, FROZEN)
    norms = [t for t in targets(rewritten) if "norm" in t]
    assert norms == ["aten.layer_norm.default", "aten.rms_norm.default"]
    assert not {"aten.rsqrt.default", "aten.mean.dim", "aten.to.dtype"} & set(targets(rewritten))


class Unconverted(nn.Module):
    """A norm of a value that is not centred, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.up(self.first(x))))


def x64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_report_comes_back() -> None:
    program = torch.export.export(Blocks(), (ids(),))
    rewritten, report = normfx.rewrite(program, LIVE, report=True)
    assert isinstance(report, normfx.Report) and report.counts["to_rms_norm"] == 3
    assert rewritten is not program and [site.name for site in report.sites] == ["norms.0", "norms.1", "final"]
    same, report = normfx.rewrite(program, {"rules": "none"}, report=True)
    assert same is program and {r.code for site in report.sites for r in site.refusals} == {"disabled"}


# ---------------------------------------------------------------- what pays


def test_folds_that_are_computed_in_each_run_must_pay() -> None:
    """A program with few rows stays as it is, and the reason names the way out; with many rows folds pay."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()
    program = torch.export.export(model, (x64(5, 8),))
    same, report = normfx.rewrite(program, report=True)
    assert same is program
    refusals = [refusal for refusal in report.sites[0].refusals if refusal.rule in ("linear_norm", "fold_affine")]
    assert {refusal.code for refusal in refusals} == {"live_weights"}
    assert all("options={'fold': 'frozen'}" in refusal.hint for refusal in refusals)
    many = x64(500, 8)
    rewritten, report = normfx.rewrite(torch.export.export(model, (many,)), report=True)
    assert report.counts["to_rms_norm"] == 1
    assert rewritten.state_dict.keys() == program.state_dict.keys()
    torch.testing.assert_close(rewritten.module()(many), model(many), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_without_a_bias_gets_none(bias: bool) -> None:
    """Its bias would be added in a pass over all of its output, which is wider than the rows of the norm."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 64, bias=bias)).double()
    moved(model)
    x = x64(5, 8)
    with torch.no_grad():
        rewritten, report = normfx.rewrite(torch.export.export(model, (x,)), FROZEN, report=True)
        torch.testing.assert_close(rewritten.module()(x), model(x), rtol=1e-12, atol=1e-12)
    codes = [{refusal.code for refusal in site.refusals if refusal.rule == "fold_affine"} for site in report.sites]
    assert codes == [set(), set() if bias else {"new_bias"}]
    assert ("3.weight_folded" in rewritten.state_dict) == bias


def moved(model: nn.Module) -> None:
    """Move γ and β off ones and zeros."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))


# ---------------------------------------------------------------- frozen folds


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_frozen_families(name: str) -> None:
    """Saved and loaded, in float64; what is computed from parameters alone is not in the graph."""
    case = named(name)
    pytest.importorskip(case.package)
    model = case.make().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs())
    with torch.no_grad():
        program, expected = torch.export.export(model, inputs), model(*inputs)
        rewritten, report = normfx.rewrite(program, FROZEN, report=True)
        actual = saved_and_loaded(rewritten).module()(*inputs)
    bound = 1e-6 if case.promoted else 1e-11
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound * expected.abs().max().item())
    assert report.counts["to_rms_norm"] == case.to_rms
    assert any(key.endswith("_folded") for key in rewritten.state_dict)
    live = normfx.rewrite(program, LIVE)
    assert len(rewritten.graph.nodes) < len(live.graph.nodes)
    assert program.state_dict.keys() == live.state_dict.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_low_precision(dtype: torch.dtype) -> None:
    """The error against float64 next to eager's, on weights with means and outliers."""
    model = Blocks(width=64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2).add_(0.3)
            p.view(-1)[::37] *= 5
    low, inputs = copy.deepcopy(model).to(dtype), ids(64)
    true = copy.deepcopy(low).double()
    with torch.no_grad():
        frozen = normfx.rewrite(torch.export.export(low, (inputs,)), FROZEN).module()
        own, eager = ((f(inputs).double() - true(inputs)).norm().item() for f in (frozen, low))
    assert own <= LOW_PRECISION[dtype] * eager, f"{own:.3g} against eager's {eager:.3g}"


def test_names_of_frozen_folds() -> None:
    """A buffer stands where its parameter stood, and only what nothing reads is dropped."""
    model = Blocks().double()
    model.head.weight = nn.Parameter(torch.randn(20, 16).double())
    model.table.weight = model.head.weight  # tied: the table is centred, the head reads it as it is
    program = torch.export.export(model, (ids(),))
    rewritten = normfx.rewrite(program, {"fold": "frozen", "rules": "pre_rms_norm"})
    assert {"up.0.weight", "norms.0.weight", "down.0.weight_folded", "down.0.bias_folded"} <= set(rewritten.state_dict)
    assert not {"down.0.weight", "down.1.bias"} & set(rewritten.state_dict)
    assert {"table.weight", "head.weight"} & set(rewritten.state_dict)
    specs = {spec.target: spec.kind.name for spec in rewritten.graph_signature.input_specs if spec.target}
    assert specs["down.0.weight_folded"] == "BUFFER" and specs["up.0.weight"] == "PARAMETER"
    torch.testing.assert_close(rewritten.module()(ids()), model(ids()), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rewritten.run_decompositions().module()(ids()), model(ids()), rtol=1e-11, atol=1e-11)


def test_tied_names_of_a_dropped_parameter_go_together() -> None:
    model = Blocks().double()
    model.down[1].weight = model.down[0].weight
    rewritten = normfx.rewrite(torch.export.export(model, (ids(),)), FROZEN)
    assert not {"down.0.weight", "down.1.weight"} & set(rewritten.state_dict)
    assert sum("down" in name and "weight" in name for name in rewritten.state_dict) == 1
    torch.testing.assert_close(rewritten.module()(ids()), model(ids()), rtol=1e-11, atol=1e-11)


def test_an_untied_table_is_centred() -> None:
    """The rows that are looked up need no centring then."""
    rewritten = normfx.rewrite(torch.export.export(Blocks().double(), (ids(),)), FROZEN)
    assert {"table.weight_folded"} <= set(rewritten.state_dict) and "aten.sub.Tensor" not in targets(rewritten)


def test_frozen_with_any_length() -> None:
    model = Blocks().double()
    shapes = {"ids": {1: torch.export.Dim("tokens", min=2, max=64)}}
    rewritten = saved_and_loaded(normfx.rewrite(torch.export.export(model, (ids(),), dynamic_shapes=shapes), FROZEN))
    for tokens in (6, 9):
        torch.testing.assert_close(rewritten.module()(ids(tokens)), model(ids(tokens)), rtol=1e-12, atol=1e-12)


class Prompted(nn.Module):
    """A row before those of each sample, as a class token is."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.norm, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.LayerNorm(8), nn.Linear(8, 2)
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([self.row.expand(x.shape[0], -1, -1), self.up(x)], 1)))


@pytest.mark.parametrize("samples", [1, 3])
def test_the_row_is_frozen_and_not_its_repetitions(samples: int) -> None:
    model, x = Prompted().double(), x64(samples, 4, 8)
    rewritten = saved_and_loaded(normfx.rewrite(torch.export.export(model, (x,)), FROZEN))
    assert rewritten.state_dict["row_folded"].shape == (1, 1, 8) and "aten.expand.default" in targets(rewritten)
    torch.testing.assert_close(rewritten.module()(x), model(x), rtol=1e-12, atol=1e-12)


class Drifting(nn.Module):
    """The scale of a norm is a buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("drift", torch.ones(8))
        self.first, self.last = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        self.drift.mul_(1.5)
        x = self.first(x)
        return self.read(self.norm(x) * self.drift) + self.last(x)


@pytest.mark.parametrize("functional", [False, True])
def test_what_the_program_writes_is_not_frozen(functional: bool) -> None:
    model, x = Drifting().double(), x64(3, 8)
    program = torch.export.export(copy.deepcopy(model), (x,))
    program = program.run_decompositions() if functional else program
    rewritten, report = normfx.rewrite(program, FROZEN, report=True)
    assert any(site.rules for site in report.sites)
    module = rewritten.module()
    for _ in range(3):
        torch.testing.assert_close(module(x), model(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dict(module.named_buffers())["drift"], model.drift)


def test_a_weight_made_of_parameters_is_frozen() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.LayerNorm(64), nn.Linear(64, 8))
    model = model.double().eval()
    rewritten = normfx.rewrite(torch.export.export(model, (x64(3, 64),)), FROZEN)
    assert not any("weight_norm" in t or "norm_except" in t for t in targets(rewritten))
    assert not any("original" in name and "folded" not in name for name in rewritten.state_dict)
    torch.testing.assert_close(rewritten.module()(x64(3, 64)), model(x64(3, 64)), rtol=1e-11, atol=1e-11)


class Neighbours(nn.Module):
    """A norm between two linear layers, and next to it what is not folded."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.write, self.norm, self.read = what, nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.batch_norm, self.extra = nn.BatchNorm1d(8), nn.Linear(2, 2)
        self.register_buffer("sparse", torch.eye(8).to_sparse())
        self.register_buffer("codes", torch.arange(64).to(torch.int8).reshape(8, 8))
        self.register_buffer("scale", torch.rand(8) + 0.5, persistent=False)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        if self.what == "a sparse buffer":
            return self.read(self.norm(x)) + torch.sparse.mm(self.sparse, x.T).T
        if self.what == "codes":
            return nn.functional.linear(self.norm(x), self.codes.to(x.dtype) * 0.1)
        if self.what == "a buffer that is not saved":
            return nn.functional.linear(self.norm(x) * self.scale, self.read.weight)
        if self.what == "transposed":
            return nn.functional.linear(self.norm(x), self.read.weight.t()) + self.read.weight.sum()
        return self.read(self.norm(self.batch_norm(x)))


@pytest.mark.parametrize(
    ("what", "training"),
    [
        ("a sparse buffer", False), ("codes", False), ("a buffer that is not saved", False), ("transposed", False),
        ("batch norm", False), ("batch norm", True),
    ],
)  # fmt: skip
def test_what_stands_next_to_frozen_folds(what: str, training: bool) -> None:
    """Several calls: statistics of a batch move. Values have the layout that the graph says."""
    torch.manual_seed(0)
    model = Neighbours(what).double().train(training)
    program = torch.export.export(copy.deepcopy(model), (x64(4, 8),))
    rewritten = normfx.rewrite(program, FROZEN)
    assert any(name.endswith("_folded") for name in rewritten.state_dict) and "extra.weight" in rewritten.state_dict
    module = rewritten.module()
    for _ in range(3):
        torch.testing.assert_close(module(x64(4, 8)), model(x64(4, 8)), rtol=1e-11, atol=1e-11)
    fakes = {node.name: node.meta["val"] for node in rewritten.graph.find_nodes(op="placeholder")}
    for spec in rewritten.graph_signature.input_specs:
        if str(spec.target).endswith("_folded"):
            assert rewritten.state_dict[spec.target].stride() == fakes[spec.arg.name].stride()


def test_programs_cannot_cache() -> None:
    program = torch.export.export(Blocks(), (ids(),))
    with pytest.raises(normfx.OptionError, match=r"a program cannot do; give .* fold='frozen'"):
        normfx.rewrite(program, {"fold": "cached"})


def test_weights_without_values_cannot_be_frozen() -> None:
    with torch.device("meta"):
        model: Any = Blocks()
    program = torch.export.export(model, (ids().to("meta"),))
    assert normfx.rewrite(program, LIVE) is not program
    with pytest.raises(normfx.ExportError, match="have no values"):
        normfx.rewrite(program, FROZEN)
