"""The fingerprint: native, in Python, on a device."""

from __future__ import annotations

import pytest
import torch
from folding import check, compiled, net

from normfx.weights import probe


@pytest.mark.parametrize("reader", ["native", "python", "device"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128])
def test_probe_sees_whole_writes(reader: str, dtype: torch.dtype) -> None:
    """The three probes agree, on strided tensors too."""
    tensors = [torch.randn(8, 10).to(dtype).t(), torch.randn(3).to(dtype), torch.randn(0).to(dtype)]
    library = probe.native_library()
    assert library is not None
    make = {
        "native": lambda ts: probe.NativeProbe(library, ts),
        "python": probe.PythonProbe,
        "device": probe.DeviceProbe,
    }[reader]
    looked = make(tensors)

    def look() -> list[tuple[int, ...]]:
        seen = looked.read(tensors)
        looked.accept(tensors, [t._version for t in tensors], seen)
        assert not looked.changed(tensors)
        return seen

    seen = look()
    assert [len(group) > 0 for group in seen] == [True, True, False]
    kept = tensors[1].clone()
    tensors[1].data.fill_(7)
    assert looked.changed(tensors)
    tensors[1].data.copy_(kept)
    assert not looked.changed(tensors)
    tensors[0].data.fill_(7)
    assert looked.changed(tensors)
    assert look()[0] != seen[0]
    tensors[1].copy_(tensors[1].clone())  # the same entries, another version
    assert looked.changed(tensors)
    look()
    other = [tensors[0].clone(), *tensors[1:]]
    assert looked.changed(other)
    tensors[0].data = tensors[0].clone()
    assert looked.changed(tensors)


def test_without_a_compiler_python_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "native_library", lambda: None)
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    model.up.weight.data.mul_(2.0)
    check(call, model, before)
