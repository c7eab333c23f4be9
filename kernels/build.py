"""Source → kernel."""

from __future__ import annotations

import functools
import hashlib
import linecache
from typing import Any

from .source import Source


@functools.cache
def build(source: Source) -> Any:
    """The kernel of a source: a `triton.JITFunction`, or under TRITON_INTERPRET=1 what runs on the CPU.

    The text is kept where `inspect` and tracebacks look for it. Triton's own cache knows a kernel by its text.
    """
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    filename = f"<normfx {source.name} {digest}>"
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": f"normfx.kernels.generated_{digest}"}
    exec(compile(source.text, filename, "exec"), namespace)
    return namespace[source.name]
