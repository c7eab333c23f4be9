"""`normfx doctor`: what normfx finds on this machine, which way it will go, and what to fix."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console

from normfx.allocator import allocator, free_bytes, obstacle
from normfx.environment import version
from normfx.lower import choice
from normfx.lower.attention import DTYPES, usual_speed
from normfx.lower.gemm import MARGIN, convolution_speed, mkl_is_faster, mkl_speed, packed_speed
from normfx.lower.wide_speed import products_are_faster, products_speed
from normfx.options import Options
from normfx.weights.budget import Budget, budget, machine_memory
from normfx.weights.native import native_library, watches_pages

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, what was found, and how to fix it ("" where nothing is wrong).

    fatal: torch.compile cannot work so
    """

    what: str
    found: str
    fix: str = ""
    fatal: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=main, parser=parser)


def main(parsed: argparse.Namespace) -> int:
    """Print the findings. Exit status 1: something must be fixed before models can be compiled."""
    console, found = Console(soft_wrap=True), list(findings())
    width = max(len(each.what) for each in found)
    for each in found:
        colour = "red" if each.fatal else "yellow" if each.fix else "green"
        console.print(f"[{colour}]{each.what:{width}}[/]  ", end="")
        console.print(each.found, highlight=False, markup=False)
        if each.fix:
            console.print(f"{'':{width}}  {'must be fixed' if each.fatal else 'to improve'}: {each.fix}", markup=False)
    return int(any(each.fatal for each in found))


def findings() -> Iterator[Finding]:
    """Everything that the doctor looks at, in order."""
    yield Finding("python", platform.python_version())
    yield Finding("torch", torch.__version__)
    yield Finding("triton", version("triton") or "not installed")
    yield Finding("normfx", version("normfx") or "not installed")
    yield _device()
    yield _compiler()
    yield _folds()
    yield _memory(budget(Options.parse().fold_memory, CPU), *machine_memory(CPU))
    yield _allocator()
    for dtype in (torch.float32, torch.bfloat16):
        yield _products(dtype)
    yield _attention()


def _device() -> Finding:
    if not torch.cuda.is_available():
        return Finding("device", "CPU: Inductor runs the norms; LayerNorms that stay, in two passes where faster")
    name = f"{torch.cuda.get_device_name()} ({choice.architecture(torch.device('cuda'))})"
    if version("triton") is None:
        return Finding("device", f"{name}, without triton", "install the triton that belongs to this torch", fatal=True)
    if choice.architecture(torch.device("cuda")) in choice.TESTED:
        return Finding("device", f"{name}: generated kernels where predicted to be faster, else Inductor")
    return Finding("device", f"{name}: Inductor runs the norms, for the generated kernels were not tested on it")


def _compiler() -> Finding:
    wanted = shlex.split(os.environ.get("CXX", "")) or ["g++", "clang++", "c++"]
    given = "CXX" in os.environ
    compiler = next(filter(None, map(shutil.which, wanted[:1] if given else wanted)), None)
    works = native_library() is not None
    if works:
        return Finding("C++ compiler", compiler or "works")
    fix = "install g++ (Debian, Ubuntu: apt install g++), or let CXX name a C++ compiler"
    return Finding("C++ compiler", f"{compiler} compiles nothing" if compiler else "none", fix, fatal=True)


def _folds() -> Finding:
    if native_library() is None:
        return Finding("folded weights", "computed in every call: without a C++ compiler nothing is watched")
    if watches_pages():
        return Finding("folded weights", "kept; the kernel tells which pages of the parameters were written")
    return Finding(
        "folded weights",
        "computed in the graph, in every call: the kernel does not tell which pages were written, and "
        "options={'fold': 'cached'} would compare contents in every call",
        "use Linux 6.7 or newer, and allow the system call userfaultfd (in the container's seccomp profile)",
    )


def _allocator() -> Finding:
    if reason := obstacle():
        return Finding("allocator", f"{allocator()}; malloc='keep' has no effect: {reason}")
    held = f"{free_bytes() / 2**20:.0f} MiB of freed memory are held"
    return Finding("allocator", f"{allocator()}, glibc: malloc='keep' would keep outputs above 32 MiB; now {held}")


def _memory(given: Budget, total: int, available: int) -> Finding:
    gib = 2**30
    found = (
        f"{given.limit / gib:.1f} GiB for kept weights, {given.used / gib:.1f} in use "
        f"(the machine has {total / gib:.1f}, {available / gib:.1f} available)"
    )
    return Finding("fold memory", found)


def _products(dtype: torch.dtype) -> Finding:
    name, speed = str(dtype).removeprefix("torch."), packed_speed(dtype)
    if not speed:
        return Finding(f"{name} products", "weights are not packed: oneDNN cannot on this processor, or is not there")
    verdict = "kept weights are packed" if speed > MARGIN else "weights are not packed"
    found = f"with packed weights {speed:.2f} times as fast as addmm: {verdict}"
    if dtype == torch.float32 and mkl_is_faster():
        found += (
            f"; packed by MKL {mkl_speed():.2f} times: where the number of rows is fixed, kept weights are packed by it"
        )
    if (speed := convolution_speed(dtype)) > MARGIN:
        found += f"; convolutions by packed kernels {speed:.2f} times as fast as conv2d: kept kernels are packed"
    if dtype == torch.bfloat16:
        place = "float32" if products_are_faster() else "bfloat16"
        found += f"; in float32 {products_speed():.2f} times as fast as in bfloat16: computed in {place}"
    return Finding(f"{name} products", found)


def _attention() -> Finding:
    speeds = {str(dtype).removeprefix("torch."): usual_speed(dtype) for dtype in DTYPES}
    told = [f"{name} {speed:.2f}" for name, speed in speeds.items() if speed is not None]
    if not told:
        return Finding("attention", "torch's, on the CPU: normfx's kernel needs a C++ compiler")
    return Finding(
        "attention",
        f"normfx's kernel for the CPU at 8 heads, 128 tokens, width 64: {', '.join(told)} times as fast as torch's; "
        "measured for each class of shapes, and taken where it is faster",
    )
