"""q, k and v of one product, of which q and k are normalised: the rows of the weight that compute these are centred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import EagerBackend, assert_low_precision, assert_same_float64
from torch import Tensor, nn

import normfx
from normfx.report import GraphReport

WIDTH, HEADS, HEAD = 16, 2, 8


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def _five(y: Tensor) -> Tensor:
    return y.reshape(*y.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)


def _selected(pieces: Tensor, dim: int) -> list[Tensor]:
    return [pieces.select(dim, i) for i in range(3)]


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda y: map(_heads, y.chunk(3, -1)),
    "split": lambda y: map(_heads, y.split([WIDTH, WIDTH, WIDTH], -1)),
    "slices": lambda y: map(_heads, (y[..., :WIDTH], y[..., WIDTH:-WIDTH], y[..., -WIDTH:])),
    "unbind": lambda y: _five(y).unbind(0),
    "select": lambda y: _selected(_five(y), 0),
    "chunks of a head": lambda y: y.view(*y.shape[:2], HEADS, 3 * HEAD).transpose(1, 2).chunk(3, -1),
    "parts of a head": lambda y: _selected(y.view(*y.shape[:2], HEADS, 3, HEAD).transpose(1, 2), 3),
    "k and q": lambda y: reversed([*map(_heads, y.chunk(3, -1))]),  # the last two are normalised
}


class Attention(nn.Module):
    """cut: one product → q, k, v; around: what else is done with the product and with v."""

    def __init__(
        self, cut: Callable[[Tensor], Any], bias: bool = True, around: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.cut, self.around = cut, around
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD), nn.LayerNorm(HEAD)
        for norm in (self.q_norm, self.k_norm):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)

    def product(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def forward(self, x: Tensor) -> Any:
        y = self.product(x)
        q, k, v = self.cut(y)
        more = () if self.around is None else self.around(y, q, k, v)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(out.transpose(1, 2).flatten(2)), *more


def _rows() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)),)


def _reported(model: nn.Module) -> GraphReport:
    """Outputs and all gradients equal eager's in float64, in training and evaluation; the report of the latter."""
    torch.manual_seed(0)
    assert_same_float64(model.train(), _rows())
    report: GraphReport = assert_same_float64(model.eval(), _rows())
    return report


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_of_normalised_pieces_are_centred(layout: str, bias: bool) -> None:
    report = _reported(Attention(LAYOUTS[layout], bias))
    assert report.counts["to_rms_norm"] == 2 and report.counts["centrings"] == 0


def test_every_rule() -> None:
    """Streams of pieces keep their width."""
    report = assert_same_float64(Attention(LAYOUTS["unbind"]).eval(), _rows(), {"rules": "all"})
    assert report.counts["to_rms_norm"] == 2


def test_fewer_keys_than_queries() -> None:
    class Grouped(Attention):
        def __init__(self) -> None:
            super().__init__(lambda y: map(_heads, y.split([2 * HEAD, HEAD, HEAD], -1)))
            self.qkv = nn.Linear(WIDTH, 4 * HEAD)

        def forward(self, x: Tensor) -> Any:
            q, k, v = self.cut(self.qkv(x))
            k = self.k_norm(k)
            out = F.scaled_dot_product_attention(self.q_norm(q), k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
            return self.out(out.transpose(1, 2).flatten(2))

    assert _reported(Grouped()).counts["to_rms_norm"] == 2


def test_the_other_rows_stay_as_they_are() -> None:
    """Also the bits of v: its rows of the weight are copied."""
    model = Attention(LAYOUTS["unbind"], around=lambda y, q, k, v: (v,)).eval()
    backend = EagerBackend({"fold": "cached"})
    (x,) = _rows()
    with torch.no_grad():
        got, want = torch.compile(model, backend=backend, fullgraph=True)(x)[1], model(x)[1]
    assert backend.report.counts["to_rms_norm"] == 2
    assert torch.equal(got, want)


# what else sees q or k, so that their mean stays
READ: dict[str, Any] = {
    "a piece is returned": lambda y, q, k, v: (q, k),
    "the product is returned": lambda y, q, k, v: (y,),
    "the product is read": lambda y, q, k, v: (y.sum(),),
    "a piece is read": lambda y, q, k, v: (q * v, k * v),
    "a slice laps over": lambda y, q, k, v: (y[..., HEAD : 2 * WIDTH + HEAD].sum(),),
    "a write": lambda y, q, k, v: (v.mul_(2.0),),
}


CASES = [(name, layout) for name in READ for layout in ("chunk", "slices", "select")]
CASES.remove(("a write", "chunk"))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_sees_the_mean(name: str, layout: str) -> None:
    """Eager writes to no piece of a chunk."""
    report = _reported(Attention(LAYOUTS[layout], around=READ[name]))
    assert report.counts["to_rms_norm"] == 0
    assert {refusal.code for site in report.sites for refusal in site.refusals} & {"observed", "opaque_norm"}


def test_the_same_piece_twice() -> None:
    """One of two nodes for one piece feeds the norm, the other a product."""

    def cut(y: Tensor) -> Any:
        pieces = y.chunk(3, -1)
        return _heads(pieces[0]), _heads(pieces[1]), _heads(pieces[0])

    assert _reported(Attention(cut)).counts["to_rms_norm"] == 1  # k alone


@pytest.mark.parametrize("first", [HEAD, WIDTH])
def test_pieces_with_rows_of_different_widths(first: int) -> None:
    """Each is centred over its own features, whichever is found first."""

    class Uneven(Attention):
        def __init__(self) -> None:
            super().__init__(lambda y: y.chunk(3, -1))
            self.q_norm, self.k_norm = nn.LayerNorm(first), nn.LayerNorm(HEAD + WIDTH - first)

        def forward(self, x: Tensor) -> Any:
            q, k, v = self.cut(self.qkv(x))
            q, k = (
                norm(y.unflatten(-1, (-1, norm.normalized_shape[0])))
                for norm, y in ((self.q_norm, q), (self.k_norm, k))
            )
            return self.out(q.flatten(-2) * torch.tanh(k.flatten(-2)) + v)

    assert _reported(Uneven()).counts["to_rms_norm"] == 2


class Scaled(Attention):
    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight * torch.sigmoid(x.mean()), self.qkv.bias)


class Detached(Attention):
    def product(self, x: Tensor) -> Tensor:
        return self.qkv(x).detach() + 0.0 * x.sum()


class Unrecorded(Attention):
    def product(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.qkv(x)


@pytest.mark.parametrize("kind", [Scaled, Detached, Unrecorded])
def test_other_products(kind: type[Attention]) -> None:
    """A weight made of data, a gradient that is cut off: right, whatever is decided."""
    assert _reported(kind(LAYOUTS["unbind"])).counts["to_rms_norm"] in (0, 2)


def test_a_weight_that_is_read_elsewhere() -> None:
    """The weight is centred for the one product, and the parameter stays as it is."""

    class Tied(Attention):
        def product(self, x: Tensor) -> Tensor:
            return self.qkv(x + self.qkv(x)[..., :WIDTH])

    assert _reported(Tied(LAYOUTS["unbind"])).counts["to_rms_norm"] == 2


def test_kept_weights_follow_writes_to_any_rows() -> None:
    """A product whose weight is (in, out), written between calls in the rows of q, of v, and of both at once."""
    from transformers.pytorch_utils import Conv1D

    class Fused(Attention):
        def __init__(self) -> None:
            super().__init__(LAYOUTS["split"])
            self.qkv = Conv1D(3 * WIDTH, WIDTH)

    torch.manual_seed(0)
    model = Fused().double().eval()
    backend = EagerBackend({"fold": "cached"})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    (x,) = _rows()
    with torch.no_grad():
        for columns in (slice(0, WIDTH), slice(2 * WIDTH, None), slice(HEAD, 2 * WIDTH + HEAD)):
            before = model(x.double())
            torch.testing.assert_close(compiled(x.double()), before, rtol=1e-12, atol=1e-12)
            model.qkv.weight.data[3:7, columns].mul_(-2.0)
            model.qkv.bias.data[columns].add_(1.0)
            assert not torch.allclose(model(x.double())[0], before[0], rtol=1e-3)
        torch.testing.assert_close(compiled(x.double()), model(x.double()), rtol=1e-12, atol=1e-12)
    assert backend.report.counts["to_rms_norm"] == 2 and backend.kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Weights stored in half precision would be rounded again (`rounded_weight`); under autocast they are not."""
    torch.manual_seed(0)
    model = Attention(LAYOUTS["unbind"]).eval()
    assert_low_precision(model, [_rows()], EagerBackend(), dtype)


def test_converted() -> None:
    torch.manual_seed(0)
    model = Attention(LAYOUTS["chunk"])
    model.q_norm, model.k_norm = nn.LayerNorm(HEAD, bias=False), nn.LayerNorm(HEAD, bias=False)  # nn.RMSNorm has none
    model, (x,) = model.double().eval(), _rows()
    converted = normfx.convert(model, (x.double(),))
    assert isinstance(converted.q_norm, nn.RMSNorm) and isinstance(converted.k_norm, nn.RMSNorm)
    torch.testing.assert_close(converted(x.double()), model(x.double()), rtol=1e-12, atol=1e-12)


def test_vision_transformer_with_normalised_queries_and_keys() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4, qk_norm=True
    )
    report = assert_same_float64(model.eval(), (torch.randn(2, 3, 8, 8),))
    assert report.counts["layer_norm"] == report.counts["to_rms_norm"] == 9


def test_persimmon() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.PersimmonConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, qk_layernorm=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.PersimmonForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=ids).logits
            return logits

    report = assert_same_float64(Logits().eval(), (torch.randint(32, (2, 5)),))
    assert report.counts["layer_norm"] == report.counts["to_rms_norm"] == 9
