"""Other inference engines as variants of `normfx bench`: the same module, converted; the same threads and precision.

OpenVINO reads what `torch.export` makes of a module; ONNX Runtime what `torch.onnx.export` makes of it. They are
skipped, with a reason, where they are not installed or cannot convert a module. Their results are checked like those of
every variant.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfx.errors import NormfxError

Run = Callable[[Sequence[Tensor]], Tensor]

LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The error relative to float64 from which on an engine does not compute the same function."""


class Skipped(NormfxError):
    """An engine that cannot take part, and why."""


class Engine:
    """A module run by an engine; converted in the first call, which may raise Skipped."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self._name, self._model = name, model
        self._run: Run | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._run is None:
            self._run = convert(self._name, self._model, inputs)
        return self._run(inputs)


def convert(name: str, model: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """A function that runs the module. Raises Skipped where the engine is not there, or does not know the module."""
    package = {"openvino": "openvino", "onnxruntime": "onnxruntime"}[name]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise Skipped(f"{name} is not installed ({error}): pip install 'normfx[rivals]'") from error
    if any(x.device.type != "cpu" for x in inputs):
        raise Skipped(f"{name} is compared on the CPU only")
    dtype = next(p.dtype for p in model.parameters())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of converters, about themselves
        try:
            return (_openvino if name == "openvino" else _onnxruntime)(module, model, tuple(inputs), dtype)
        except Skipped:
            raise
        except Exception as error:  # of whatever kind the converter raises
            raise Skipped(f"{name} cannot convert the model: {type(error).__name__}: {str(error)[:300]}") from error


def _openvino(openvino: Any, model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Run:
    """The engine gets float32 weights, and is told in which precision to compute."""
    program = torch.export.export(copy.deepcopy(model).float(), _float(inputs))
    settings = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(openvino.convert_model(program), "CPU", settings).create_infer_request()

    def run(given: Sequence[Tensor]) -> Tensor:
        arrays = [x.numpy() for x in _float(given)]
        return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return run


def _onnxruntime(onnxruntime: Any, model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Run:
    if dtype != torch.float32:
        raise Skipped("onnxruntime computes in float32 on the CPU")
    try:
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise Skipped(f"torch.onnx.export needs onnxscript ({error}): pip install 'normfx[rivals]'") from error
    program: Any = torch.onnx.export(copy.deepcopy(model), inputs, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(given: Sequence[Tensor]) -> Tensor:
        arrays = dict(zip(names, (x.numpy() for x in given), strict=True))
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


def _float(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.float() if x.is_floating_point() else x for x in tensors)
