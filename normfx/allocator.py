"""The C library's allocator: keep the memory that calls free for the next call, or give it back to the system.

glibc maps every block above a threshold (at most 32 MiB) newly and unmaps it when it is freed, so that each call of a
model with large outputs has all their pages filled with zeros again. `keep_freed_memory` changes that for the process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

from normfx.errors import OptionError

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of <malloc.h>

MAPPED = 2**25
"""glibc maps every block of more than so many bytes by itself, and unmaps it when it is freed."""

RIVALS = ("jemalloc", "tcmalloc", "mimalloc")
"""Allocators that programs are started with instead of the C library's own (LD_PRELOAD)."""


class _Usage(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(8)] + [
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


class _Symbol(ctypes.Structure):
    """Dl_info."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("at", ctypes.c_void_p),
    ]


@functools.cache
def obstacle() -> str:
    """Why glibc's malloc cannot be told anything in this process ("" where it can)."""
    if sys.platform == "darwin":
        return "macOS has an allocator of its own, which has no such setting"
    if os.name != "posix":
        return "the system is not Linux with glibc"
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")):
        return "the C library is not glibc (musl has no such setting)"
    if not hasattr(library, "mallinfo2"):
        return "glibc is older than 2.33"
    if _file_of(library, "malloc") != _file_of(library, "gnu_get_libc_version"):
        return f"malloc is that of {allocator()}, loaded instead of glibc's: it has settings of its own"
    return ""


def _file_of(library: ctypes.CDLL, name: str) -> str:
    """The file that a function of the process comes from."""
    found = _Symbol()
    library.dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Symbol)]
    library.dladdr(ctypes.cast(getattr(library, name), ctypes.c_void_p), ctypes.byref(found))
    return os.path.realpath((found.file or b"").decode())


def allocator() -> str:
    """The allocator of the process, by name: one that was loaded instead of the system's, or "the system's"."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    known = next((name for name in RIVALS if name in loaded), "")
    if known or os.name != "posix" or sys.platform == "darwin":
        return known or "the system's"
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return "the system's"
    file = _file_of(library, "malloc")
    return "the system's" if file == _file_of(library, "gnu_get_libc_version") else Path(file).name


_kept: list[None] = []

_raised: list[None] = []

_MARGIN = 2**16
"""Bytes by which a block stays below `MAPPED`, malloc's own ones included."""


def raise_thresholds() -> None:
    """Let glibc's malloc raise its thresholds as far as it does by itself, once for the process: blocks of up to 32 MiB
    come from the heap, which is shortened only where 64 MiB are free at its end.

    It raises them when it frees a block that it had mapped, to the size of that block. A process that has freed one of
    32 MiB, as when it loaded a model, has them so; one that has not gets the pages of smaller results filled with zeros
    in each call. A process that was started with thresholds of its own keeps these. No page of the block is touched.
    """
    if _raised or obstacle():
        return
    _raised.append(None)
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.free(library.malloc(MAPPED - _MARGIN))


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` was called in this process."""
    return bool(_kept)


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, for the next call. Once for the whole process; any thread may.

    No block is mapped on its own any more, and the heap is never shortened. What this costs is what is free in the heap
    (`free_bytes`): of a 40 MiB output 80 MiB when one thread calls, several times as much when many do, since a block
    whose edge was given to something else no longer fits. `release_memory` gives it back. Seen for the main thread;
    other threads have heaps of their own, of 64 MiB at most, in which large blocks may or may not stay.
    Raises OptionError where the allocator is not glibc's.
    """
    if _kept:
        return
    reason = obstacle()
    if reason:
        raise OptionError(f"normfx: malloc='keep' is for glibc's allocator: {reason}. Leave the option out.")
    library = ctypes.CDLL(None)
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        if not library.mallopt(parameter, value):
            raise OptionError(f"normfx: malloc='keep': glibc refuses mallopt({parameter}, {value})")
    _kept.append(None)


def release_memory() -> int:
    """Give memory that was freed, but kept by the C library, back to the system. Returns the bytes that went.

    The process goes on as before: the next call that needs memory gets it from the system again. Returns 0 where the
    allocator is not glibc's.
    """
    if obstacle():
        return 0
    before = resident_bytes()
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    return max(0, before - resident_bytes())


def free_bytes() -> int:
    """Bytes of the heaps that are free and not given back; some of their pages may be. 0 where it is not glibc's."""
    if obstacle():
        return 0
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _Usage
    return int(function().fordblks)


def memory_line() -> str:
    """What the allocator holds, in a sentence; "" where it was not told to."""
    if not keeps_freed_memory():
        return ""
    return (
        f"The process keeps the memory that it frees (malloc='keep'): {free_bytes() / 2**20:.0f} MiB are free now; "
        "normfx.release_memory() gives them back."
    )


def advice(largest: int) -> str:
    """That it would pay to keep freed memory, where it would. largest: bytes of the largest result of a graph"""
    if largest <= MAPPED or keeps_freed_memory() or obstacle():
        return ""
    return (
        f"The largest result has {largest / 2**20:.0f} MiB: in each call the system maps new memory for it, filled "
        "with zeros. options={'malloc': 'keep'} saves that time: the process keeps the memory that it frees."
    )


def resident_bytes() -> int:
    """Bytes of the process in physical memory, as Linux tells; 0 elsewhere."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
