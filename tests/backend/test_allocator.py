"""Memory that the process keeps: page faults and glibc's own counts, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from normfx import allocator
from normfx.errors import OptionError
from normfx.options import Options

glibc = pytest.mark.skipif(bool(allocator.obstacle()), reason=f"glibc only: {allocator.obstacle()}")

FAULTS = """
import resource
import torch
from normfx import allocator

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.empty(10 * 2**20).fill_(1.0)  # 40 MiB: above the largest threshold from which glibc maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

PAGES = 40 * 2**20 // 4096
torch.set_num_threads(1)
faults(1)
fresh = faults(5)
allocator.keep_freed_memory()
faults(10)  # blocks are cut and joined until they fit
kept = faults(5)
free = allocator.free_bytes()
gone = allocator.release_memory()
again = faults(1)
print(fresh / PAGES, kept / PAGES, free >> 20, gone >> 20, again / PAGES)
"""


def run(code: str, **environ: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environ})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@glibc
def test_memory_stays_and_goes() -> None:
    """Without transparent huge pages a fault is 4 KiB; with them there are up to 512 times fewer."""
    fresh, kept, free, gone, again = map(float, run(FAULTS).split())
    assert fresh > 5 / 600, "each call has its memory filled again"
    assert kept < 0.01 * fresh
    assert free >= 40 and gone >= 39
    assert again > 1 / 600, "what was given back is filled again"


THRESHOLDS = """
import resource
import torch
from normfx import allocator

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.empty(5 * 2**20).fill_(1.0)  # 20 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

PAGES = 20 * 2**20 // 4096
torch.set_num_threads(1)
before = faults(1)
resident = allocator.resident_bytes()
allocator.raise_thresholds()
taken = allocator.resident_bytes() - resident
faults(20)
print(before / PAGES, faults(10) / PAGES, taken >> 20)
"""


@glibc
def test_smaller_results_stay() -> None:
    """Raising the thresholds touches no memory; a process that was started with its own ones keeps them."""
    before, later, taken = map(float, run(THRESHOLDS).split())
    assert before > 1 / 600 and later < 0.1 * before and taken == 0
    own = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    assert float(run(THRESHOLDS, **own).split()[1]) > 5 / 600


@glibc
@pytest.mark.parametrize("how", ["option", "variable"])
def test_it_is_set_where_a_model_is_compiled(how: str) -> None:
    code = f"""
import torch
from normfx import allocator
from normfx.lower import inductor
import normfx.lower.folded
import normfx.backend
normfx.backend.compile_graph = lambda gm, inputs, patches: gm.forward
options = {{"malloc": "keep"}} if {how == "option"} else {{}}
assert not allocator.keeps_freed_memory()
torch.compile(torch.sin, backend="normfx", options=options)(torch.ones(2))
print(allocator.keeps_freed_memory())
"""
    assert run(code, **({"NORMFX_MALLOC": "keep"} if how == "variable" else {})).split()[-1] == "True"


def test_off_by_default() -> None:
    assert Options.parse({}, environ={}).malloc == "default"
    assert Options.parse({}, environ={"NORMFX_MALLOC": "keep"}).malloc == "keep"
    with pytest.raises(OptionError, match="default, keep"):
        Options.parse({"malloc": "hold"}, environ={})
    assert not allocator.keeps_freed_memory()


@pytest.mark.parametrize("other", ["musl has no such setting", "malloc is that of jemalloc"])
def test_refused_elsewhere(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "obstacle", lambda: other)
    with pytest.raises(OptionError, match=other):
        allocator.keep_freed_memory()
    assert allocator.release_memory() == allocator.free_bytes() == 0


@glibc
def test_another_malloc_is_noticed(tmp_path: object) -> None:
    """One that is loaded before the C library's, as LD_PRELOAD does with jemalloc."""
    import shutil

    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "Inductor needs a compiler on a CPU, and so does this test"
    source, library = f"{tmp_path}/other.c", f"{tmp_path}/libother.so"
    with open(source, "w") as file:
        file.write(
            "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
        )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    code = "from normfx import allocator; print(allocator.obstacle()); print(allocator.allocator())"
    refused, name = run(code, LD_PRELOAD=library).splitlines()
    assert "libother.so" in refused and name == "libother.so"


@glibc
def test_the_report_says_where_it_pays() -> None:
    """The report names the largest result, for a model that is explained or compiled, until the memory is kept."""
    code = """
import torch
import normfx
from normfx.allocator import keep_freed_memory

def wide(x):
    return x.mean(), x.expand(16, 1024, 1024) * 2.0

def said(report):
    return "malloc" in report.note

compiled = torch.compile(wide, backend="normfx")
large, small = torch.ones(1024, 1024), torch.ones(8, 8)
compiled(large)
after = torch.compile(lambda x: x + 1, backend="normfx")
print("64 MiB" in normfx.compiled_report().note, said(normfx.explain(wide)(large)))
print(said(normfx.explain(torch.sin)(small)) or said(normfx.explain(lambda x: x.expand(64, 1024, 1024))(large)))
torch._dynamo.reset()
after(small)
print(said(normfx.compiled_report()))
compiled(large)
keep_freed_memory()
print("are free now" in normfx.compiled_report().note, said(normfx.explain(wide)(large)))
"""
    assert run(code).split() == ["True", "True", "False", "False", "True", "False"]
