"""The compiled part of the package: three C++ files, built once per machine and loaded once per process."""

from __future__ import annotations

import ctypes
import functools
import logging
from importlib import resources

from normfx.compat.codecache import CppLibrary, Signature

log = logging.getLogger("normfx")

_VOID, _COUNT = ctypes.c_void_p, ctypes.c_int64

_SOURCES = "pages.cpp", "files.cpp", "memory.cpp"
"""Compiled as one, in this order."""

_SIGNATURES: dict[str, Signature] = {
    "normfx_watches_pages": (_COUNT, []),
    "normfx_allow_pages": (None, [_COUNT]),
    "normfx_watch": (_VOID, [_VOID, _VOID, _VOID, _COUNT]),
    "normfx_unwatch": (None, [_VOID]),
    "normfx_read": (None, [_VOID, _VOID, _VOID]),
    "normfx_changed": (_COUNT, [_VOID, _VOID, _COUNT, _VOID]),
    "normfx_blocks": (_COUNT, [_COUNT]),
}


def _source() -> str:
    folder = resources.files("normfx.weights")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SOURCES)


def _without(error: Exception) -> None:
    log.warning("normfx: folded weights are computed at every call, because no C++ code can be compiled: %s", error)


# calls keep the interpreter's lock: they are short, and no other thread may free what they read
_LIBRARY = CppLibrary("normfx-memory", _source, _SIGNATURES, ctypes.PyDLL, _without)


def start_native_library() -> None:
    """Begins to compile or load the C++ functions while Inductor compiles the graph."""
    _LIBRARY.start()


def native_library() -> ctypes.PyDLL | None:
    """The C++ functions; compiling them takes 3 s on a new machine. None where no C++ compiler works: values are then
    computed at every call."""
    return _LIBRARY.get()


@functools.cache
def watches_pages() -> bool:
    """Whether the kernel tells which pages of memory were written (Linux 6.7 or newer, userfaultfd allowed)."""
    library = native_library()
    watches = library is not None and bool(library.normfx_watches_pages())
    if not watches:
        log.info("normfx: the kernel does not tell which pages were written; fold='auto' computes folds in the graph")
    return watches
