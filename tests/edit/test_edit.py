"""What an edit does not allow, whatever a rule overlooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_records import Parameters, trace
from torch import Tensor

from normfx.edit import Edit
from normfx.errors import NormfxError


def _returned(p: Parameters, x: Tensor) -> Any:
    y, mean, _ = torch.native_layer_norm(x, [6], None, None, 1e-5)
    return y, mean


FIXED: dict[str, Callable[[Parameters, Tensor], Any]] = {
    "two dimensions": lambda p, x: F.layer_norm(x, (6, 6)),
    "two dimensions, without a mean": lambda p, x: F.rms_norm(x, (6, 6)),
    "one group": lambda p, x: F.group_norm(x, 1),
    "statistics returned": _returned,
    "a lower bound whose square is 0": lambda p, x: F.normalize(x, dim=-1, eps=1e-30),
}


@pytest.mark.parametrize("case", FIXED)
def test_a_norm_that_no_canonical_op_computes_is_never_written(case: str) -> None:
    gm, norms = trace(FIXED[case], {}, torch.randn(2, 6, 6))
    for norm in norms:
        assert norm.fixed
        with pytest.raises(NormfxError, match="a rule was applied"):
            Edit(gm.graph, {}, {}).norm(norm)
        with pytest.raises(NormfxError, match="no canonical op computes"):
            _ = norm.form
    assert norms


def test_other_norms_are() -> None:
    gm, (norm,) = trace(lambda p, x: F.layer_norm(x, (6,)), {}, torch.randn(2, 6, 6))
    assert not norm.fixed and Edit(gm.graph, {}, {}).norm(norm).output is norm.output
