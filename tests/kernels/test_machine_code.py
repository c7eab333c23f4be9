"""The quality of generated kernels that shows without a GPU: no local memory, 16-byte accesses, no byte read twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch

pytest.importorskip("triton")

from compiled_kernels import Code, amd_spills, nvidia_code

from normfx.kernels import run
from normfx.kernels.cost import STATISTIC, backward_cost, forward_cost
from normfx.kernels.launch import backward_launch, forward_launch, programs
from normfx.kernels.source import Source, backward_source, column_source, finalise_source, forward_source
from normfx.kernels.spec import DTYPES, Inner, Spec

NVIDIA = (80, 90, 100)
WIDTHS = (127, 128, 768, 1023, 4096, 5120, 8192, 12288, 16384, 32768, 65536)


def sources(spec: Spec) -> Iterator[Source]:
    """All kernels of a spec."""
    forward, backward = forward_launch(spec), backward_launch(spec)
    yield forward_source(spec, forward, True)
    if spec.inner is not None:  # whose backward is two of the kernels below
        return
    yield backward_source(spec, backward, spec.sum is not None)
    if spec.sums and not backward.persistent:
        yield column_source(spec, backward)
    if spec.sums:
        yield finalise_source(spec)


def specs(width: int, dtype: str) -> list[Spec]:
    norm = dict(width=width, x=dtype, out=dtype)
    found = [
        Spec(**norm, centre=True, weight="float32", bias="float32"),
        Spec(**norm, centre=False, weight=dtype),
        Spec(**norm, centre=False),
        Spec(**norm, centre=True, weight=dtype, bias=dtype, residual=dtype, sum=dtype),
        Spec(**norm, centre=False, residual=dtype, sum=dtype, alpha=0.5),
        Spec(**norm, centre=False, compressed=True, residual=dtype, sum=dtype),
        Spec(**norm, centre=True, weight=dtype, bias=dtype, residual=dtype, sum=dtype, x_bias=dtype),
        Spec(**norm, centre=False, residual=dtype, sum=dtype, x_bias=dtype),
    ]
    if width <= 8192:
        found.append(Spec(**norm, centre=True, weight=dtype, bias=dtype, centre_output=True))
        inner = Inner(centre=True, weight=dtype, bias=dtype, centre_output=True)
        found.append(Spec(**norm, centre=True, weight=dtype, bias=dtype, residual=dtype, sum=dtype, inner=inner))
    return found


def assert_no_local_memory(code: Code, what: str) -> None:
    """Nor arithmetic in float64, whatever ε is passed as."""
    assert (code.stack, code.spills, code.doubles) == (0, 0, 0), f"{what}: {code}"


@pytest.mark.parametrize("width", [8192, 12288])
def test_no_local_memory(width: int) -> None:
    """The widest rows of each launch, on one GPU; the marker `slow` has the others."""
    for spec in (specs(width, "bfloat16")[0], specs(width, "float32")[3], *specs(width, "float32")[8:]):
        for source in sources(spec):
            assert_no_local_memory(nvidia_code(source, spec, 90), f"{spec} {source.name}")


@pytest.mark.parametrize("arch", NVIDIA)
def test_every_gpu(arch: int) -> None:
    spec = specs(8192, "bfloat16")[3]
    for source in sources(spec):
        assert_no_local_memory(nvidia_code(source, spec, arch), f"{spec} {source.name}")


def test_amd() -> None:
    spec = specs(8192, "bfloat16")[3]
    for source in sources(spec):
        assert amd_spills(source, spec, "gfx942") == 0, source.name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_local_memory_anywhere(width: int, dtype: str) -> None:
    for spec, arch in itertools.product(specs(width, dtype), NVIDIA):
        for source in sources(spec):
            assert_no_local_memory(nvidia_code(source, spec, arch), f"{spec} {source.name} sm_{arch}")


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_no_spills_on_amd(width: int) -> None:
    for spec in specs(width, "bfloat16"):
        for source in sources(spec):
            assert amd_spills(source, spec, "gfx942") == 0, f"{spec} {source.name}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_of_forward(dtype: str) -> None:
    """2Nds, or 4Nds with a residual, and the vectors; all in accesses of 16 bytes but the statistics. A program of one
    row moves what the cost model says of one row."""
    for spec in (*specs(4096, dtype)[:5], *specs(4096, dtype)[6:8]):
        code = nvidia_code(forward_source(spec, forward_launch(spec), True), spec, 90)
        floor = forward_cost(spec, sympy.Integer(1), statistics=False)
        assert code.loads == {16: floor.read}, str(spec)
        assert code.stores[16] == floor.written, str(spec)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_of_backward(dtype: str) -> None:
    """3Nds, or 4Nds with a residual, for each row, and the vectors; dγ, dβ and Σds leave once for each program. Where
    rows are copied ahead, each stage has its copy, and γ is read once for all rows."""
    for spec in (*specs(4096, dtype)[:5], *specs(4096, dtype)[6:8]):
        with_sum, launch = spec.sum is not None, backward_launch(spec)
        code = nvidia_code(backward_source(spec, launch, with_sum), spec, 90)
        # of the whole cost: without the kernel that adds up, and without the rows' statistics (4-byte accesses)
        floor = backward_cost(spec, sympy.Integer(1), with_sum, sympy.Integer(1))
        gamma = 4096 * (DTYPES.get(spec.weight, 0))
        vectors = 4096 * sum(DTYPES[getattr(spec, name)] for name in spec.sums)
        rows = floor.read - 4096 * STATISTIC * len(spec.sums) - STATISTIC * (1 + spec.centre) - gamma
        if launch.stages > 1:
            assert (code.copies[16], code.loads.get(16, 0)) == (launch.stages * rows, gamma), str(spec)
        else:
            assert (code.copies, code.loads[16]) == ({}, rows + gamma), str(spec)
        assert code.stores[16] == floor.written - vectors, str(spec)


def assert_resident(spec: Spec, arch: int) -> None:
    """All programs of backward's grid are on the device at once."""
    launch = backward_launch(spec)
    code = nvidia_code(backward_source(spec, launch, spec.sum is not None), spec, arch)
    assert_no_local_memory(code, f"{spec} sm_{arch}")
    assert code.resident >= programs(launch, 2**20, 1), f"{spec} sm_{arch}: {code}"


def test_resident_programs() -> None:
    """Backward with sums: four programs of narrow rows on a multiprocessor, two of rows of 4,096, one of wider ones,
    two rows ahead of each in shared memory. Together they hold 16 warps, whose threads have 128 registers each."""
    for width, count, stages in ((768, 4, 1), (2048, 4, 3), (4096, 2, 3), (8192, 1, 3)):
        spec = specs(width, "bfloat16")[0]
        launch = backward_launch(spec)
        assert (programs(launch, 2**20, 132), launch.stages) == (132 * count, stages)
        assert_resident(spec, 90)
    for spec, stages in (
        (specs(4096, "bfloat16")[3], 3),
        (specs(4096, "float32")[3], 2),
        (specs(1024, "bfloat16")[3], 1),
    ):
        assert backward_launch(spec).stages == stages
        assert_resident(spec, 80)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [w for w in WIDTHS if w <= 8192])
def test_resident_programs_everywhere(width: int, dtype: str) -> None:
    for spec, arch in itertools.product(specs(width, dtype)[:8], NVIDIA):
        if spec.sums and backward_launch(spec).persistent:
            assert_resident(spec, arch)


def test_vectors_stay_in_caches() -> None:
    """γ and β, which every program reads."""
    spec = specs(4096, "bfloat16")[0]
    code = nvidia_code(forward_source(spec, forward_launch(spec), False), spec, 90)
    assert code.kept == {16: 4096 * (4 + 4)} and code.loads == {16: 4096 * (4 + 4 + 2)}


def test_the_kernel_that_adds_up() -> None:
    """dγ and dβ of a row of 768 are added up by 48 programs of one launch; a program has 128 rows of partial sums on
    their way at a time, in accesses of 16 bytes."""
    spec = specs(768, "bfloat16")[3]
    code = nvidia_code(finalise_source(spec), spec, 90)
    assert code.loads == {16: 2 * 128 * 32 * STATISTIC}, "either of the two sums"
    assert_no_local_memory(code, "sum")
    launched: list[tuple[str, tuple[int, ...]]] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.name = kernel.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launched.append((self.name, tuple(grid)))
            return lambda *args, **options: None

    rows, vector = torch.zeros(4096, 768, dtype=torch.bfloat16), torch.zeros(768, dtype=torch.bfloat16)
    row = torch.zeros(4096)
    run.backward(spec, rows, rows, row, row, vector, rows, wrap=Recorded)
    assert launched == [("add_layer_norm_768_backward", (4 * run.INTERPRETED, 1)), ("sum_768", (24, 2))]


def test_bytes_of_two_norms() -> None:
    """4Nds: neither the first norm's rows nor the sum are read again."""
    spec = specs(4096, "bfloat16")[9]
    code = nvidia_code(forward_source(spec, forward_launch(spec), True), spec, 90)
    floor = forward_cost(spec, sympy.Integer(1), statistics=False)
    assert code.loads == {16: floor.read} and floor.read == 4096 * (2 * 2 + 4 * 2)
    assert code.stores[16] == floor.written == 4096 * 2 * 2


def test_wide_backward_reads_a_row_twice_and_writes_once() -> None:
    """The second time from a cache: the row was read just before, by the same program."""
    spec = specs(12288, "bfloat16")[1]  # RMSNorm with γ
    launch = backward_launch(spec)
    assert (launch.form, launch.parts) == ("chunks", 1)
    code = nvidia_code(backward_source(spec, launch, False), spec, 90)
    assert code.loads[16] == 2 * 12288 * (2 + 2 + 2), "dy, x and γ"
    assert code.stores == {16: 12288 * (2 + STATISTIC)}, "dx and the sums of dγ"


def test_odd_widths_are_read_entry_by_entry() -> None:
    """No row but the first is aligned."""
    spec = Spec(1023, False, "bfloat16", "bfloat16")
    code = nvidia_code(forward_source(spec, forward_launch(spec), False), spec, 90)
    assert set(code.loads) == {2}
