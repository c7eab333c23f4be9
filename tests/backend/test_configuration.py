"""The configuration of the tests themselves: which warnings are errors."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._inductor.compile_fx as inductor


def test_hints_of_inductor_are_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor may warn on a GPU that it could multiply float32 less exactly (torch 2.11, 2.13): 12 of the compiled
    tests would fail at once."""
    warnings.warn_explicit("TensorFloat32", UserWarning, "compile_fx.py", 1, module=inductor.__name__)
    hint = inductor._warn_tf32_disabled
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    hint.cache_clear()
    hint()
    hint.cache_clear()


def test_warnings_elsewhere_are_errors() -> None:
    with pytest.raises(UserWarning, match="a warning of a test"):
        warnings.warn("a warning of a test", stacklevel=1)
