"""The default options move no more bytes on a GPU, and start no more kernels, than Inductor: in generated code."""

from __future__ import annotations

import shutil

import pytest
import torch
import traffic

pytest.importorskip("triton")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

SOME = [
    "gpt2 8x1024 bfloat16 inference",
    "gpt2 8x1024 autocast training",
    "vit_large 64 autocast inference",
    "gpt_neox 8x2048 autocast training",
    "llama_7b 4x2048 bfloat16 inference",
]
"""The whole table is `python tests/cuda/traffic.py`."""


def test_residual_sums_are_stored_once() -> None:
    """A block of two sums moves 1.5 passes over 8,192 rows of 768 less than with sums that are added up again."""
    (found,) = traffic.measure(["gpt2 8x1024 bfloat16 inference"])
    assert found.inductor_mb - found.normfx_mb == pytest.approx(1.5 * 8192 * 768 * 2 / 1e6, rel=1e-6)
    assert found.normfx_launches == found.inductor_launches


@pytest.mark.parametrize("case", SOME)
def test_no_loss_by_default(case: str) -> None:
    (found,) = traffic.measure([case])
    assert found.inductor_mb > 0 and found.inductor_launches > 0
    assert found.normfx_mb <= found.inductor_mb and found.normfx_launches <= found.inductor_launches, found
