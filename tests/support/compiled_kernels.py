"""Generated kernels compiled for GPUs that are not there, and what can be read off the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normfx.kernels.build import build
from normfx.kernels.source import Source
from normfx.kernels.spec import Spec

_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_SHARED = {80: 164, 90: 228, 100: 228}
"""KiB of shared memory of a multiprocessor; a program takes one more than it asks for."""
_BYTES = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}


@dataclass(frozen=True)
class Code:
    """stack: bytes of local memory a thread; spills: instructions that use it; registers: of a thread; loads, stores:
    bytes of global memory that one program's instructions access, each counted once, by width of the access; copies:
    those copied to shared memory without waiting; kept: of the loads, those that stay in caches longest; doubles:
    arithmetic instructions in float64; shared: bytes of shared memory; resident: programs at a time on a
    multiprocessor"""

    stack: int
    spills: int
    registers: int
    loads: dict[int, int]
    stores: dict[int, int]
    copies: dict[int, int]
    kept: dict[int, int]
    doubles: int
    shared: int
    resident: int


def compile_offline(source: Source, spec: Spec, backend: str, arch: int | str) -> Any:
    """Triton's compiled kernel, of a norm."""
    types = {}
    for parameter in source.parameters:
        name, _, kind = parameter.rpartition("_")
        types[parameter] = _type(name, kind, spec)
    wide = "stride" if spec.entries % 16 == 0 else None
    return compile_typed(source, types, backend, arch, aligned=wide)


def compile_typed(
    source: Source, types: Mapping[str, str], backend: str, arch: int | str, aligned: str | None = None
) -> Any:
    """Triton's compiled kernel. Pointers are aligned to 16 bytes, and so are numbers whose name ends in `aligned`:
    what the launcher tells Triton of such arguments.
    """
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(source.parameters)
        if parameter.rpartition("_")[2] in ("ptr", aligned)
    }
    signature = {parameter: types[parameter] for parameter in source.parameters}
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Triton 3.9, of its own default
        ast = ASTSource(fn=build(source), signature=signature, constexprs={}, attrs=attributes)
        return triton.compile(ast, target=target, options={"num_warps": source.warps})


def _type(name: str, kind: str, spec: Spec) -> str:
    if kind != "ptr":
        return "fp64" if kind == "eps" else "i32"  # as Inductor passes Python's numbers
    fields = {"out_grad": "out", "sum_grad": "sum", "x_grad": "x", "weight_grad": "weight", "bias_grad": "bias"}
    if name.startswith("inner_"):
        return _POINTER[getattr(spec.inner, name.removeprefix("inner_"), None) or "float32"]
    return _POINTER[getattr(spec, fields.get(name, name), None) or "float32"]


def nvidia_code(source: Source, spec: Spec, arch: int) -> Code:
    return code_of(compile_offline(source, spec, "cuda", arch), arch, source.warps)


def code_of(compiled: Any, arch: int, warps: int) -> Code:
    """From the disassembled cubin. Triton's own count of spills is None without a device."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _disassembled("-sass", file.name)
        usage = _disassembled("-res-usage", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    threads, shared = 32 * warps, int(compiled.metadata.shared)
    by_registers = 2**16 // (threads * -(-registers // 8) * 8)
    by_memory = _SHARED[arch] * 1024 // (shared + 1024)
    return Code(
        stack,
        len(re.findall(r"\b(?:LDL|STL)\b", text)),
        registers,
        _accesses(text, "LDG", threads),
        _accesses(text, "STG", threads),
        _accesses(text, "LDGSTS", threads),
        _accesses(text, "LDG", threads, ".EL"),
        len(re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP|MUFU\.\w*64H)\b", text)),
        shared,
        min(by_registers, by_memory, 64 // warps),
    )


def _disassembled(what: str, path: str) -> str:
    return subprocess.run([_DISASSEMBLER, what, path], capture_output=True, text=True, check=True).stdout


def _accesses(text: str, instruction: str, threads: int, kind: str = "") -> dict[int, int]:
    found: dict[int, int] = {}
    for suffixes in re.findall(rf"\b{instruction}\.E{re.escape(kind)}\b([\w.]*)", text):
        width = next((n for s, n in _BYTES.items() if s in f".{suffixes}"), 4)
        found[width] = found.get(width, 0) + width * threads
    return found


def amd_spills(source: Source, spec: Spec, arch: str) -> int:
    return amd_spills_of(compile_offline(source, spec, "hip", arch))


def amd_spills_of(compiled: Any) -> int:
    """Registers spilled, and bytes of private memory, of an AMD kernel."""
    text = compiled.asm["amdgcn"]
    counts = re.findall(r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)
    assert len(counts) == 3
    return sum(map(int, counts))
