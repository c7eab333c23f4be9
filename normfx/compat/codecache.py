"""C++ code that Inductor compiles and keeps."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

Library = TypeVar("Library", bound=ctypes.CDLL)

Signature = tuple[Any, Sequence[Any]]
"""The type of a result, None for nothing, and those of the arguments, as ctypes knows them."""


class CppLibrary(Generic[Library]):
    """C++ functions, compiled once per machine and loaded once per process. The same for all threads.

    source:     returns the code; it is read when the library is first asked for
    signatures: of the functions, by name
    loader:     ctypes.PyDLL for calls that keep the interpreter's lock, ctypes.CDLL for calls that let go of it
    on_failure: is called with what the compiler raised
    """

    def __init__(
        self,
        name: str,
        source: Callable[[], str],
        signatures: Mapping[str, Signature],
        loader: type[Library],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.name, self._source, self._signatures = name, source, signatures
        self._loader, self._on_failure = loader, on_failure
        self._loaded: list[Library | None] = []
        self._loading = threading.Lock()
        _LIBRARIES.add(self)

    def get(self) -> Library | None:
        """The library; None where it cannot be compiled."""
        with self._loading:
            if not self._loaded:
                self._loaded.append(self._load())
            return self._loaded[0]

    def start(self) -> None:
        """Begins to compile or load it in a thread, while Inductor compiles a graph."""
        if not self._loaded:
            threading.Thread(target=self.get, name=self.name, daemon=True).start()

    def new_lock(self) -> None:
        """For a forked child: a thread of the parent may have held the old one."""
        self._loading = threading.Lock()

    def _load(self) -> Library | None:
        from torch._inductor.codecache import CppCodeCache  # Inductor takes seconds to import

        try:
            library = self._loader(CppCodeCache.load(self._source())._name)
        except Exception as error:  # any compiler trouble
            self._on_failure(error)
            return None
        for name, (result, arguments) in self._signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library


_LIBRARIES: weakref.WeakSet[CppLibrary[Any]] = weakref.WeakSet()


def _new_locks() -> None:
    for library in list(_LIBRARIES):
        library.new_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_locks)
