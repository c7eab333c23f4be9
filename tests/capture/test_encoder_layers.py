"""The fused encoder layer of nn.TransformerEncoder is captured as the ops it stands for."""

from __future__ import annotations

import pytest
import torch
from capturing import same, x64
from torch import Tensor, nn

from normfx.capture.expand import encoder_layer
from normfx.graph.names import module_path

aten = torch.ops.aten


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_transformer_encoder(norm_first: bool, mode: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        backend = same(model, x64(2, 5, 8))
    assert backend.count(aten.layer_norm.default) == 4
    assert backend.count(aten._transformer_encoder_layer_fwd.default) == 0


def _mask(kind: int | None, dtype: torch.dtype = torch.bool) -> Tensor | None:
    shape = {None: None, 0: (5, 5), 1: (2, 5), 2: (2, 2, 5, 5)}[kind]
    if shape is None:
        return None
    mask = torch.rand(shape) > 0.5
    mask[..., 0] = False
    if kind == 2:
        mask[0, 1, 3] = True  # a row with every key masked
    return mask.to(dtype)


@pytest.mark.parametrize("kind", [None, 0, 1, 2])
@pytest.mark.parametrize(("norm_first", "gelu"), [(True, True), (False, False)])
def test_encoder_layer_means_the_op(kind: int | None, norm_first: bool, gelu: bool) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    attention = [random(24, 8), random(24), random(8, 8), random(8)]
    rest = [*(random(8) for _ in range(4)), random(16, 8), random(16), random(8, 16), random(8)]
    args = (random(2, 5, 8), 8, 2, *attention, gelu, norm_first, 1e-5, *rest)
    for dtype in (torch.bool, torch.float64):
        mask = _mask(kind, dtype)
        want = torch._transformer_encoder_layer_fwd(*args, mask, kind)
        torch.testing.assert_close(encoder_layer(*args, mask, kind), want, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_masks(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    with torch.no_grad():
        backend = same(model, x64(2, 5, 8), src_key_padding_mask=padding)
        same(model, x64(2, 5, 8), backend=backend, mask=causal, is_causal=True)
    assert len(backend.seen) >= 2
    for captured in backend.seen:
        graph = captured.graph_module.graph
        assert not graph.find_nodes(op="call_function", target=aten._transformer_encoder_layer_fwd.default)
        norms = graph.find_nodes(op="call_function", target=aten.layer_norm.default)
        assert len(norms) == 2 and all(module_path(n) == "layers.0" for n in norms)
