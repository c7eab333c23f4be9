"""A process without a GPU in which torch believes in an H100, as far as Inductor's code generation: nothing is run.

Fake CUDA tensors pass through Dynamo, a backend, AOTAutograd and Inductor; what comes out is the generated source and
Inductor's own count of the bytes that its kernels move. The process is started by `traffic.environment()`, which loads
runtime.c and driver.c before torch. Names of torch used here were tried on torch 2.11 and 2.14.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.compile_fx
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph
import torch._inductor.fx_passes.post_grad
import torch._inductor.graph
import torch._subclasses.fake_tensor as fake_tensor
import torch.amp.autocast_mode as autocast_mode
import torch.cuda.amp.common as amp_common
from torch._dynamo.device_interface import CudaInterface
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=2**16,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    gcnArchName="",
    is_integrated=0,
    uuid="none",
)
STREAM = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)


class Driver:
    """Triton's view of the device."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": PROPERTIES.shared_memory_per_block_optin,
            "multiprocessor_count": PROPERTIES.multi_processor_count,
            "warpSize": 32,
            "max_num_regs": PROPERTIES.regs_per_multiprocessor,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


@dataclass(frozen=True)
class Generated:
    """One compiled graph. bytes: that kernels read and write, as Inductor counts; launches: of Triton kernels."""

    backward: bool
    bytes: int
    launches: int
    source: str


def begin() -> None:
    """There is a device, whenever torch asks while it builds a model of fakes; without it no fake could be made."""
    driver.set_active(Driver())
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    fake_tensor.init_gpu_context = lambda *args: None
    for module in (autocast_mode, amp_common):  # else autocast switches itself off
        if hasattr(module, "amp_definitely_not_available"):
            module.amp_definitely_not_available = lambda: False
    inductor_config.compile_threads = 1
    inductor_config.force_disable_caches = True
    inductor_config.joint_graph_constant_folding = False  # it would run on the device
    functorch_config.enable_autograd_cache = False
    functorch_config.force_non_lazy_backward_lowering = True


@contextlib.contextmanager
def device() -> Iterator[list[Generated]]:
    """The device is there; graphs that Inductor generates meanwhile are put on the list, and not loaded."""
    found: list[Generated] = []

    def generate(graph: Any) -> Any:
        code = (graph.codegen_with_cpp_wrapper() if graph.cpp_wrapper else graph.codegen())[0]
        source = getattr(code, "value", code)
        launches = len(re.findall(r"^\s+\w+\.run\(", source[source.index("def call(") :], re.MULTILINE))
        found.append(Generated(bool(graph.is_backward), int(graph.count_bytes()[0]), launches, source))
        graph.cache_key, graph.cache_path, graph.cache_linemap = "none", "/dev/null", []
        return types.SimpleNamespace(
            __file__="none", call=_run, recursively_apply_fns=lambda fn: None, partitions=[], runner=None
        )

    known = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: STREAM,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda *args: None,
    }
    interface = {
        "is_available": lambda: True,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "get_compute_capability": lambda device=None: 90,
        "get_device_properties": lambda device=None: PROPERTIES,
    }
    with contextlib.ExitStack() as stack:

        def put(place: Any, name: str, value: Any) -> None:
            if hasattr(place, name):
                stack.enter_context(mock.patch.object(place, name, value))

        for name, value in known.items():
            put(torch.cuda, name, value)
        for name, value in interface.items():
            put(CudaInterface, name, staticmethod(value))
            put(CudaInterface.Worker, name, staticmethod(value))
        put(torch._inductor.graph.GraphLowering, "compile_to_module", generate)
        for module in (torch._inductor.fx_passes.joint_graph, torch._inductor.fx_passes.post_grad):
            put(module, "lazy_init", lambda *args, **kwargs: None)  # they would be traced on the device
        for module in [m for name, m in sys.modules.items() if name.startswith("torch") and m is not None]:
            for name in ("has_triton", "has_triton_package", "is_triton_available"):
                if name in vars(module):
                    put(module, name, lambda *args, **kwargs: True)
        yield found


def _run(arguments: Any) -> Any:
    """The code of a generated graph; torch 2.11 asserts that there is one."""
    raise RuntimeError("generated code is not run")


class _Done(Exception):
    """Everything is known, and nothing can be run."""


def generated(call: Callable[..., Any], inputs: Mapping[str, Any], backend: Callable[..., Any]) -> list[Generated]:
    """What a backend makes Inductor generate for a call on fake CUDA tensors: forward, and backward if there is one."""
    found: list[Generated] = []

    def compile_only(gm: Any, example_inputs: Any) -> Any:
        with device() as graphs:
            backend(gm, example_inputs)
        found.extend(graphs)
        raise _Done

    torch._dynamo.reset()
    try:
        torch.compile(call, backend=compile_only, fullgraph=True)(**inputs)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _Done):
            cause = getattr(cause, "inner_exception", None) or cause.__cause__
        if cause is None:
            raise
    return sorted(found, key=lambda graph: graph.backward)
