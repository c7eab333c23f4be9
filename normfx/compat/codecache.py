"""C++ code that Inductor compiles and keeps."""

from __future__ import annotations

import ctypes


def load_cpp(source: str) -> ctypes.PyDLL:
    """Compile a source, or find it compiled, and load it; calls keep the interpreter's lock. Raises what the compiler
    raises. Inductor is imported only now: it takes seconds."""
    from torch._inductor.codecache import CppCodeCache

    return ctypes.PyDLL(CppCodeCache.load(source)._name)
