"""merge_linears and defer_norm in exported programs: with live folds and frozen ones, and in runtimes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equivalence import assert_same_results, outputs_and_grads
from expecttest import TestCase
from rule_test import moved, rows
from torch import Tensor, nn
from torch.export import ExportedProgram

import normfx
from normfx.capture.trace import capture_exported
from normfx.graph.names import module_path
from normfx.printing.printer import print_graph

DEFERRED = {"rules": "default,+defer_norm"}


class Gated(nn.Module):
    """An RMSNorm that a gated product reads; rows of it are added to what comes in."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.read = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)
        self.write = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = x + self.write(F.silu(self.gate(y)) * self.read(y))
        return out


def two() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))


def centred() -> nn.Module:
    """A LayerNorm that becomes an RMSNorm, and is then deferred."""
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU())


def with_means() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2), nn.ReLU())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Mapping[str, str], str]] = {
    "two layers": (two, (40, 8), {}, "merge_linears"),
    "convolutions": (convolutions, (4, 3, 6, 6), {}, "merge_linears"),
    "gated": (Gated, (2, 5, 8), DEFERRED, "defer_norm"),
    "a centred norm": (centred, (2, 5, 8), DEFERRED, "defer_norm"),
    "a norm that keeps its mean": (with_means, (40, 8), {**DEFERRED, "defer_means": "small"}, "defer_norm"),
}
"""A model, the shape of its input, options, and the rule that is applied once."""


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def applied(report: normfx.Report, rule: str) -> int:
    return sum(rule in site.rules for site in (*report.sites, *report.composed))


def made(case: str) -> tuple[nn.Module, Tensor]:
    build, shape, _, _ = CASES[case]
    return moved(build()).double().eval(), rows(*shape).double()


@pytest.mark.parametrize("case", CASES)
def test_live(case: str) -> None:
    """Outputs and every gradient in float64; the state dict does not change."""
    model, x = made(case)
    _, _, options, rule = CASES[case]
    program = torch.export.export(model, (x,))
    rewritten, report = normfx.rewrite(program, {**options, "fold": "live"}, report=True)
    assert applied(report, rule) == 1 and rewritten.state_dict.keys() == program.state_dict.keys()
    assert not any("normfx" in str(node.target) for node in rewritten.graph.nodes)
    module = saved_and_loaded(rewritten).module()
    want, got = outputs_and_grads(model, model, (x,)), outputs_and_grads(module, module, (x,))
    assert_same_results(*want, *got)
    with torch.no_grad():
        lowered = rewritten.run_decompositions().module()
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_frozen(case: str) -> None:
    """What is computed from parameters alone is not in the graph, and two layers have one weight."""
    model, x = made(case)
    _, _, options, rule = CASES[case]
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        rewritten, report = normfx.rewrite(program, {**options, "fold": "frozen"}, report=True)
        got, want = saved_and_loaded(rewritten).module()(x), model(x)
    assert applied(report, rule) == 1
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())
    counts = [sum(p.numel() for p in each.state_dict.values()) for each in (program, rewritten)]
    assert counts[1] < counts[0] or rule == "defer_norm"
    products = [sum(str(n.target).startswith(("aten.linear", "aten.conv", "aten.matmul")) for n in each.graph.nodes)
                for each in (program, rewritten)]  # fmt: skip
    assert products[1] == products[0] - applied(report, "merge_linears")


@pytest.mark.parametrize("case", ["two layers", "gated"])
@pytest.mark.parametrize("fold", ["live", "frozen"])
def test_any_number_of_rows(case: str, fold: str) -> None:
    model, x = made(case)
    _, _, options, rule = CASES[case]
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    rewritten, report = normfx.rewrite(program, {**options, "fold": fold}, report=True)
    assert applied(report, rule) == 1
    module = saved_and_loaded(rewritten).module()
    for count in (2, 40, 64):
        given = rows(count, *x.shape[1:]).double()
        torch.testing.assert_close(module(given), model(given), rtol=1e-11, atol=1e-11)


def test_rows_decide_of_live_products() -> None:
    """For few rows two products cost less than that of the weights, in each call; a constant costs nothing."""
    model, x = moved(two()).eval(), rows(2, 8)
    program = torch.export.export(model, (x,))
    _, report = normfx.rewrite(program, report=True)
    (pair,) = report.composed
    assert not pair.rules and [(r.rule, r.code) for r in pair.refusals] == [("merge_linears", "live_weights")]
    assert "in an exported program, with 'frozen'" in pair.refusals[0].hint
    assert applied(normfx.rewrite(program, {"fold": "frozen"}, report=True)[1], "merge_linears") == 1


def test_other_readers_keep_a_layer() -> None:
    """A weight that something else reads stays next to the product of it."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) + torch.relu(self.one(x)) @ self.one.weight

    model, x = moved(Read()).double(), rows(40, 8).double()
    rewritten, report = normfx.rewrite(torch.export.export(model, (x,)), {"fold": "frozen"}, report=True)
    assert applied(report, "merge_linears") == 1
    assert "one.weight" in rewritten.state_dict and "two.weight" not in rewritten.state_dict
    torch.testing.assert_close(rewritten.module()(x), model(x), rtol=1e-12, atol=1e-12)


def test_what_no_program_takes() -> None:
    """An op of normfx's own would be written out again: the report says so, and no setting is said to change it."""
    model = nn.Sequential(nn.Linear(8, 8), Gated(), nn.RMSNorm(8))
    program = torch.export.export(model, (rows(2, 5, 8),))
    _, report = normfx.rewrite(program, {"rules": "all"}, report=True)
    refusals = [r for site in report.sites for r in site.refusals if r.rule == "fuse_residual_norm"]
    assert {r.code for r in refusals} == {"not_exported"} and all(r.hint.startswith("none needed") for r in refusals)
    reasons = str(report).partition("Most frequent reasons")[2].partition("\n\n")[0]
    assert "written out again" not in reasons


class Programs(TestCase):
    maxDiff = None

    def check(self, case: str, fold: str, expected: str) -> None:
        """What a rewritten program computes. EXPECTTEST_ACCEPT=1 writes it; test_live and test_frozen prove it."""
        model, x = made(case)
        with torch.set_grad_enabled(fold == "live"):
            program = torch.export.export(model.float(), (x.float(),))
            captured = capture_exported(normfx.rewrite(program, {**CASES[case][2], "fold": fold}))
        names = {node: source.name for node, source in captured.sources.items()}
        text = print_graph(captured.graph_module.graph, names, captured.weights, module_path)
        self.assertExpectedInline(text, expected, skip=1)

    def test_two_layers_frozen(self) -> None:
        self.check(
            "two layers",
            "frozen",
            """\
input: f32[40, 8]
%0 = layer_norm(input, [8], None, None, 1e-05): f32[40, 8]  # 0
%1 = linear(%0, 1.weight_folded, 2.bias_folded): f32[40, 8]
%2 = relu(%1): f32[40, 8]
%3 = linear(%2, 4.weight, 4.bias): f32[40, 3]
return [%3]
""",
        )

    def test_two_layers_live(self) -> None:
        self.check(
            "two layers",
            "live",
            """\
input: f32[40, 8]
%0 = layer_norm(input, [8], None, None, 1e-05): f32[40, 8]  # 0
%1 = reshape(0.bias, [-1]): f32[8]
%2 = reshape(%1, [-1]): f32[8]
%3 = mul(1.weight, %2): f32[24, 8]
%4 = sum(%3, [1]): f32[24]
%5 = add(1.bias, %4): f32[24]
%6 = reshape(0.weight, [-1]): f32[8]
%7 = reshape(%6, [-1]): f32[8]
%8 = mul(1.weight, %7): f32[24, 8]
%9 = to(2.weight, f64): f64[8, 24]
%10 = to(%5, f64): f64[24]
%11 = reshape(%10, [1, 1, 24]): f64[1, 1, 24]
%12 = expand(%11, [1, 8, 24]): f64[1, 8, 24]
%13 = reshape(%12, [8, 24]): f64[8, 24]
%14 = mul(%9, %13): f64[8, 24]
%15 = flatten(%14, 1): f64[8, 24]
%16 = sum(%15, [1]): f64[8]
%17 = to(2.bias, f64): f64[8]
%18 = add(%17, %16): f64[8]
%19 = to(%18, f32): f32[8]
%20 = flatten(%8, 1): f32[24, 8]
%21 = flatten(2.weight, 1): f32[8, 24]
%22 = matmul(%21, %20): f32[8, 8]
%23 = reshape(%22, [8, 8]): f32[8, 8]
%24 = linear(%0, %23, %19): f32[40, 8]
%25 = relu(%24): f32[40, 8]
%26 = linear(%25, 4.weight, 4.bias): f32[40, 3]
return [%26]
""",
        )

    def test_gated_frozen(self) -> None:
        self.check(
            "gated",
            "frozen",
            """\
x: f32[2, 5, 8]
%0 = mul(x, x): f32[2, 5, 8]
%1 = mean(%0, [2], True): f32[2, 5, 1]
%2 = add(%1, 1.19209e-07): f32[2, 5, 1]
%3 = rsqrt(%2): f32[2, 5, 1]
%4 = linear(x, gate.weight_folded, None): f32[2, 5, 16]
%5 = mul(%4, %3): f32[2, 5, 16]
%6 = add(%5, gate.bias): f32[2, 5, 16]
%7 = silu(%6): f32[2, 5, 16]
%8 = linear(x, read.weight_folded): f32[2, 5, 16]
%9 = mul(%8, %3): f32[2, 5, 16]
%10 = mul(%7, %9): f32[2, 5, 16]
%11 = linear(%10, write.weight, write.bias): f32[2, 5, 8]
%12 = add(x, %11): f32[2, 5, 8]
return [%12]
""",
        )

    def test_gated_live(self) -> None:
        self.check(
            "gated",
            "live",
            """\
x: f32[2, 5, 8]
%0 = reshape(norm.weight, [-1]): f32[8]
%1 = reshape(%0, [-1]): f32[8]
%2 = mul(gate.weight, %1): f32[16, 8]
%3 = mul(x, x): f32[2, 5, 8]
%4 = mean(%3, [2], True): f32[2, 5, 1]
%5 = add(%4, 1.19209e-07): f32[2, 5, 1]
%6 = rsqrt(%5): f32[2, 5, 1]
%7 = linear(x, %2, None): f32[2, 5, 16]
%8 = mul(%7, %6): f32[2, 5, 16]
%9 = add(%8, gate.bias): f32[2, 5, 16]
%10 = silu(%9): f32[2, 5, 16]
%11 = reshape(norm.weight, [-1]): f32[8]
%12 = reshape(%11, [-1]): f32[8]
%13 = mul(read.weight, %12): f32[16, 8]
%14 = linear(x, %13): f32[2, 5, 16]
%15 = mul(%14, %6): f32[2, 5, 16]
%16 = mul(%10, %15): f32[2, 5, 16]
%17 = linear(%16, write.weight, write.bias): f32[2, 5, 8]
%18 = add(x, %17): f32[2, 5, 8]
return [%18]
""",
        )


def _aotinductor(program: ExportedProgram, x: Tensor, folder: Path) -> Tensor:
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    out: Tensor = torch._inductor.aoti_load_package(path)(x)
    return out


def _onnxruntime(program: ExportedProgram, x: Tensor, folder: Path) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = folder / "model.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False, opset_version=23).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _openvino(program: ExportedProgram, x: Tensor, folder: Path) -> Tensor:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled = core.compile_model(openvino.convert_model(program), "CPU")
    return torch.from_numpy(compiled([x.numpy()])[0])


RUNTIMES: dict[str, Callable[[ExportedProgram, Tensor, Path], Tensor]] = {
    "aotinductor": _aotinductor, "onnxruntime": _onnxruntime, "openvino": _openvino,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the runtimes' converters
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("fold", ["live", "frozen"])
@pytest.mark.parametrize("case", ["two layers", "convolutions", "gated"])
def test_runtimes(case: str, fold: str, runtime: str, tmp_path: Path) -> None:
    """The error against float64 is that of a float32 program."""
    model, x = made(case)
    with torch.no_grad():
        want = model(x)
        program = torch.export.export(model.float(), (x.float(),))
        rewritten, report = normfx.rewrite(program, {**CASES[case][2], "fold": fold}, report=True)
        got = RUNTIMES[runtime](rewritten, x.float(), tmp_path)
    assert applied(report, CASES[case][3]) == 1
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * want.abs().max().item())
