"""find_norms: where a norm begins and ends, obstacles, whole ops, names, and the classes people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_records import EPS, D, Parameters, assert_recomputes, centre, mean, norms_of, parameters, rms, trace
from torch import Tensor, nn
from torch.func import functional_call

from normfx.graph.nodes import op_name
from normfx.recognize.norms import find_norms
from normfx.recognize.rows import CASTS

BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_default_eps_of_rms_norm_is_what_torch_does(dtype: torch.dtype) -> None:
    """x/y at a tiny x tells the epsilon: (x/y)² = x² + eps."""
    x = torch.full((1, 4), 2.0**-11 if dtype != torch.float64 else 2.0**-26, dtype=dtype)
    _, (norm,) = trace(lambda p, x: F.rms_norm(x, (4,)), {}, x)
    exact = x.double() / F.rms_norm(x, (4,)).double()
    assert norm.eps == pytest.approx(float((exact.square() - x.double().square())[0, 0]), rel=2e-3)
    assert norm.compute_dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ---------------------------------------------------------------- where a norm begins and ends


def test_data_dependent_scale_is_outside() -> None:
    (norm,) = norms_of(lambda p, x, s: rms(x) * (1 + s) + p["b"], torch.randn(2, 3, D), torch.randn(2, 1, D))
    assert (norm.weight, norm.bias, norm.obstacle) == (None, None, "")
    assert op_name(norm.output) == "aten::mul.Tensor"


def test_per_token_parameter_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: rms(x) + p["w"].view(1, D, 1), torch.randn(2, D, D))
    assert norm.bias is None


def test_a_norm_read_before_its_affine_ends_there() -> None:
    (norm,) = norms_of(lambda p, x: [(z := rms(x)) * p["w"], z * p["b"]], torch.randn(2, 3, D))
    assert (norm.weight, norm.obstacle) == (None, "")


def test_second_scale_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: rms(x) * p["w"] * p["g"] * 2.0, torch.randn(2, 3, D))
    assert norm.weight is not None and norm.weight.name.startswith("p")


def test_subtracted_bias_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: rms(x) * p["w"] - p["b"], torch.randn(2, 3, D))
    assert norm.weight is not None and norm.bias is None


def test_scaled_addcmul_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: torch.addcmul(p["b"], rms(x), p["w"], value=2), torch.randn(2, 3, D))
    assert (norm.weight, norm.bias) == (None, None)


def test_number_factor_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: rms(x) * 2.0 * 0.5, torch.randn(2, 3, D))
    assert norm.output.name == "mul"


@pytest.mark.parametrize(
    ("fn", "role"),
    [
        (lambda p, x: [(c := x - (u := mean(x))) / (mean(c**2) + EPS).sqrt(), u], "the mean"),
        (lambda p, x: [(c := centre(x)) / (mean(c**2) + EPS).sqrt(), c], "the centred value"),
        (lambda p, x: [x / ((v := mean(x**2)) + EPS).sqrt(), v], "the variance"),
        (lambda p, x: [x * (r := (mean(x**2) + EPS).rsqrt()) * p["w"], r], "the reciprocal deviation"),
        (lambda p, x: [x * (mean(q := x * x) + EPS).rsqrt(), q], "a row-sized intermediate"),
    ],
)
def test_what_is_inside_and_read_elsewhere_is_an_obstacle(fn: Callable[..., Any], role: str) -> None:
    (norm,) = norms_of(fn, torch.randn(2, 3, D))
    assert norm.obstacle.startswith(role) and norm.obstacle.endswith("read by output")


def test_upcast_read_elsewhere_is_the_input() -> None:
    (norm,) = norms_of(lambda p, x: [rms(h := x.float()), h], torch.randn(2, 3, D).bfloat16())
    assert op_name(norm.input) in CASTS and norm.input not in norm.nodes and norm.obstacle == ""


def test_upcast_of_the_statistics_read_elsewhere_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: [rms(x, of=(h := x.float())), h], torch.randn(2, 3, D).bfloat16())
    assert norm.input.op == "placeholder" and norm.obstacle == ""
    assert not any(op_name(n) in CASTS for n in norm.nodes)


def test_a_widening_cast_after_the_norm_is_outside() -> None:
    (norm,) = norms_of(lambda p, x: (rms(x) * p["w"]).float(), torch.randn(2, 3, D).bfloat16(), dtype=BF16)
    assert norm.out_dtype == BF16


def test_two_norms_of_one_value() -> None:
    def fn(p: Parameters, x: Tensor) -> list[Tensor]:
        return [rms(x) * p["w"], rms(x) * p["b"]]

    first, second = norms_of(fn, torch.randn(2, 3, D))
    assert (first.name, second.name) == ("rms_norm", "rms_norm_1")
    assert first.input is second.input and not first.nodes & second.nodes


def test_chain_of_norms_in_graph_order() -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        h = rms(x) * p["w"]
        h = h + F.layer_norm(h, (D,))
        return centre(h) / (h.var(-1, keepdim=True) + EPS).sqrt()

    norms = norms_of(fn, torch.randn(2, 3, D))
    assert [(n.kind, n.name) for n in norms] == [
        ("RMSNorm", "rms_norm"), ("LayerNorm", "layer_norm"), ("LayerNorm", "layer_norm_1"),
    ]  # fmt: skip


def test_names() -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        return rms(F.layer_norm(rms(x), (D,)))

    gm, _ = trace(fn, {}, torch.randn(2, 3, D))
    norms = find_norms(gm.graph, frozenset(), lambda n: "block.ln", lambda n: f"model.py:{n.name}")
    assert [n.name for n in norms] == ["block.ln", "block.ln#2", "block.ln#3"]
    assert norms[1].source == "model.py:layer_norm"


@pytest.mark.parametrize("switch", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_whole_norm_inside_a_region(switch: Callable[[], Any]) -> None:
    def fn(p: Parameters, x: Tensor) -> Tensor:
        with switch():
            y = rms(x + 1)
        return y * p["w"]

    (norm,) = norms_of(fn, torch.randn(2, 3, D, requires_grad=True))
    assert norm.weight is None


def test_symbolic_batch() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D, EPS), _Spelled())
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(4, 3, D),), dynamic_shapes=[{0: batch}], strict=False)
    norms = find_norms(program.graph_module.graph, frozenset(), lambda n: "", lambda n: "")
    assert [(n.kind, n.dims, n.size) for n in norms] == [("RMSNorm", (2,), D), ("LayerNorm", (2,), D)]


def test_symbolic_width() -> None:
    width = torch.export.Dim("width", min=2)
    program = torch.export.export(_Spelled(), (torch.randn(4, 3, D),), dynamic_shapes=[{2: width}], strict=False)
    (norm,) = find_norms(program.graph_module.graph, frozenset(), lambda n: "", lambda n: "")
    assert (norm.kind, norm.size, norm.correction) == ("LayerNorm", 0, 0)


class _Spelled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        var, u = torch.var_mean(x, -1, correction=0)
        return (x - u[..., None]) * torch.rsqrt(var + EPS)[..., None]


# ---------------------------------------------------------------- whole ops with obstacles


@pytest.mark.parametrize(
    ("fn", "kind", "obstacle"),
    [
        (
            lambda p, x: F.layer_norm(x, (D,), x[0, 0]),
            "LayerNorm",
            "its weight (select_1) is computed from data",
        ),
        (lambda p, x: torch.native_layer_norm(x, [D], None, None, EPS)[:2], "LayerNorm", "its statistics"),
        (
            lambda p, x: F.layer_norm(x + 1, (D,)).add_(x),
            "LayerNorm",
            "its output (layer_norm) is written in place",
        ),
        (
            lambda p, x: F.batch_norm(x.mT, None, None, training=True),
            "BatchNorm",
            "it takes its statistics over the batch",
        ),
        (
            lambda p, x: F.batch_norm(x.mT, p["w"], p["w"], p["b"], p["b"]),
            "BatchNorm",
            "with running statistics it is an affine map of each channel",
        ),
        (
            lambda p, x: F.group_norm(x.mT, 2, p["w"], p["b"]),
            "GroupNorm",
            "it normalises 2 groups of channels",
        ),
        (
            lambda p, x: F.instance_norm(x.mT, eps=EPS),
            "InstanceNorm",
            "it normalises each channel over positions",
        ),
    ],
)
def test_whole_op_with_obstacle(fn: Callable[..., Any], kind: str, obstacle: str) -> None:
    _, (norm,) = trace(fn, parameters(), torch.randn(2, 3, D))
    assert norm.kind == kind and norm.obstacle.startswith(obstacle)


# ---------------------------------------------------------------- real classes


def _hf(module: str, name: str) -> Callable[[int], nn.Module]:
    def make(d: int) -> nn.Module:
        found = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
        return getattr(found, name)(d)

    return make


def _channels_first_convnext(d: int) -> nn.Module:
    found = pytest.importorskip("transformers.models.convnext.modeling_convnext")
    return found.ConvNextLayerNorm(d, data_format="channels_first")


def _timm(name: str) -> Callable[[int], nn.Module]:
    return lambda d: getattr(pytest.importorskip("timm.layers"), name)(d)


def _torchvision(d: int) -> nn.Module:
    return pytest.importorskip("torchvision.models.convnext").LayerNorm2d(d)


TOKENS, IMAGES = (2, 3, D), (2, D, 3, 3)
CLASSES: dict[str, tuple[Callable[[int], nn.Module], str, float, tuple[int, ...]]] = {
    "nn.LayerNorm": (nn.LayerNorm, "LayerNorm", 1e-5, TOKENS),
    "nn.RMSNorm": (nn.RMSNorm, "RMSNorm", torch.finfo(torch.float32).eps, TOKENS),
    "T5LayerNorm": (_hf("t5", "T5LayerNorm"), "RMSNorm", 1e-6, TOKENS),
    "LlamaRMSNorm": (_hf("llama", "LlamaRMSNorm"), "RMSNorm", 1e-6, TOKENS),
    "Gemma2RMSNorm": (_hf("gemma2", "Gemma2RMSNorm"), "RMSNorm", 1e-6, TOKENS),
    "Olmo2RMSNorm": (_hf("olmo2", "Olmo2RMSNorm"), "RMSNorm", 1e-6, TOKENS),
    "ConvNextLayerNorm": (_channels_first_convnext, "LayerNorm", 1e-6, IMAGES),
    "timm LayerNorm2d": (_timm("LayerNorm2d"), "LayerNorm", 1e-6, IMAGES),
    "timm RmsNorm": (_timm("RmsNorm"), "RMSNorm", 1e-6, TOKENS),
    "timm RmsNorm2d": (_timm("RmsNorm2d"), "RMSNorm", 1e-6, IMAGES),
    "torchvision LayerNorm2d": (_torchvision, "LayerNorm", 1e-5, IMAGES),
}


IN_ITS_OWN_DTYPE = {"timm RmsNorm2d"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_real_class(name: str, dtype: torch.dtype) -> None:
    make, kind, eps, shape = CLASSES[name]
    model = make(D).to(dtype)
    p = {k: torch.randn_like(v) for k, v in model.named_parameters()}
    x = torch.randn(shape).to(dtype)
    gm, (norm,) = trace(lambda p, x: functional_call(model, p, (x,)), p, x)
    assert (norm.kind, norm.eps_place, norm.correction, norm.obstacle) == (kind, "inside", 0, "")
    assert norm.eps == pytest.approx(eps) and norm.size == D and (norm.weight is not None) == ("weight" in p)
    assert norm.compute_dtype == (dtype if name in IN_ITS_OWN_DTYPE else torch.float32) and norm.out_dtype == dtype
    assert_recomputes(gm, (norm,), *p.values(), x)


def test_timm_simple_norm_is_not_centred_and_no_norm() -> None:
    model = _timm("SimpleNorm")(D)
    _, norms = trace(lambda p, x: functional_call(model, p, (x,)), dict(model.named_parameters()), torch.randn(TOKENS))
    assert norms == ()
