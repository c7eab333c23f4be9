"""Products with packed weights, by whatever op: refused for that reason, or centred after the product."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from equivalence import EagerBackend, assert_same_float64
from torch import Tensor, library, nn
from torch.nn import functional as F

from normfx.report import Report

WIDTH = 16
IDS = torch.arange(8).reshape(2, 4)
aten = torch.ops.aten


class Coded(Tensor):
    """int8 codes and a scale for each row, multiplied out where they are used."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Coded:
        made: Coded = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=scale.dtype, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Coded({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Coded:
        return Coded(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.clone.default):
            return Coded(func(args[0].codes), func(args[0].scale))
        args, kwargs = pytree.tree_map_only(cls, lambda p: p.codes.to(p.scale.dtype) * p.scale, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


class Product(nn.Module):
    """A linear whose weight is int8 codes with a scale for each output feature; `form` computes it."""

    codes: Tensor
    scale: Tensor

    def __init__(self, form: Callable[[Product, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        draw = torch.Generator().manual_seed(2)
        codes, scale = (
            torch.randint(-90, 90, (WIDTH, WIDTH), generator=draw).to(torch.int8),
            torch.full((WIDTH,), 0.01) + 0.01 * torch.rand(WIDTH, generator=draw),
        )
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.linspace(-1.0, 1.0, WIDTH))
        self.weight = nn.Parameter(Coded(codes, scale.double()[:, None]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def _scaled_after(m: Product, x: Tensor) -> Tensor:
    """int8 weights alone: the codes are cast, and the scales multiply what comes out."""
    return (x.flatten(0, -2) @ m.codes.t().to(x.dtype) * m.scale).view_as(x) + m.bias


def _integers(m: Product, x: Tensor) -> Tensor:
    """Rows are quantised too, and the product is one of integers."""
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    rows = (x.detach() / step).round().to(torch.int8).flatten(0, -2)
    return (torch._int_mm(rows, m.codes.t()) * step.flatten()[:, None] * m.scale).view_as(x).to(x.dtype) + m.bias


def _of_a_library(m: Product, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.normfx_packed.product(x, m.codes, m.scale)
    return out


FORMS: dict[str, Callable[[Product, Tensor], Tensor]] = {
    "multiplied out": lambda m, x: F.linear(x, m.codes.to(x.dtype) * m.scale[:, None].to(x.dtype), m.bias),
    "scaled after": _scaled_after,
    "integers": _integers,
    "a library's": _of_a_library,
    "a tensor of its own": lambda m, x: F.linear(x, m.weight, m.bias),
}


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    with library._scoped_library("normfx_packed", "DEF") as defined:
        defined.define("product(Tensor x, Tensor codes, Tensor scale) -> Tensor")
        defined.impl(
            "product", lambda x, codes, scale: x @ (codes.t() * scale).to(x.dtype), "CompositeExplicitAutograd"
        )
        library.register_fake("normfx_packed::product", lambda x, codes, scale: torch.empty_like(x), lib=defined)
        yield


class Writes(nn.Module):
    """A plain linear and a product with a packed weight write what a norm reads."""

    def __init__(self, write: nn.Module) -> None:
        super().__init__()
        self.table, self.write, self.norm = nn.Embedding(10, WIDTH), write, nn.LayerNorm(WIDTH)
        self.plain = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.table(ids))
        return torch.tanh(self.norm(self.plain(x) + self.write(x)))


class Reads(nn.Module):
    def __init__(self, read: nn.Module) -> None:
        super().__init__()
        self.table, self.norm, self.read = nn.Embedding(10, WIDTH), nn.LayerNorm(WIDTH), read

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.read(self.norm(self.table(ids))))


def _codes(report: Report, rule: str) -> list[str]:
    return [r.code for site in report.sites for r in site.refusals if r.rule == rule]


def _report(model: nn.Module) -> Report:
    """The report of a model without gradients, whose outputs are eager's."""
    torch._dynamo.reset()
    backend, model = EagerBackend({"fold": "cached"}), model.double().eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(IDS), model(IDS))
    return backend.report


@pytest.mark.parametrize("form", FORMS)
def test_writers(form: str) -> None:
    report = _report(Writes(Product(FORMS[form])))
    assert _codes(report, "pre_rms_norm") == ["packed_weight"]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "integers"])
def test_readers(form: str) -> None:
    assert _codes(_report(Reads(Product(FORMS[form]))), "fold_affine") == ["packed_weight"]


def test_rows_that_are_quantised_are_no_weight() -> None:
    """γ may not pass the quantiser of the rows, whatever the weight is."""
    assert set(_codes(_report(Reads(Product(FORMS["integers"]))), "fold_affine")) == {"reader_not_linear"}


class Blocks(nn.Module):
    """A packed product begins a stream that three norms read; the other writers are plain."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(10, WIDTH), first
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(torch.tanh(self.table(ids)))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.tanh(layer(norm(x)))[..., :1] * layer(norm(x))
        return self.layers[0](self.norms[0](x))


@pytest.mark.parametrize("form", ["multiplied out", "scaled after", "a library's"])
def test_one_product_is_centred_where_several_norms_read_it(form: str) -> None:
    """Its output is, once for all of them; its weight is left as it is."""
    model = Blocks(Product(FORMS[form]))
    report = assert_same_float64(model, (IDS,)) if form != "a library's" else _report(model)
    assert report.counts["to_rms_norm"] == report.counts["layer_norm"], report
    after = report.graphs[0].after
    assert not re.search(r"center\(first\.(codes|weight|scale)", after), after
