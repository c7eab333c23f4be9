"""Handles: tensors of one entry that stand for a value a compiled graph cannot take as an input (an opaque layout).

The value is found by the handle's address, so that it may be exchanged while the handle stays where it is.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_VALUES: dict[int, Tensor] = {}

_SIZES: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()


def set_value(handle: Tensor, value: Tensor) -> None:
    """Let a handle stand for a value, for as long as the handle lives."""
    address = handle.data_ptr()
    if address not in _VALUES:
        weakref.finalize(handle, _VALUES.pop, address)
    _VALUES[address] = value


def value_of(handle: Tensor) -> Tensor:
    """The value that a handle stands for."""
    return _VALUES[handle.data_ptr()]


def set_size(value: Tensor, written: int) -> None:
    """Record how many bytes of a value's memory are written, where not all are: the system provides no others."""
    _SIZES[value] = written


def size_in_bytes(value: Tensor) -> int:
    """The bytes of a kept value, or of what its handle stands for."""
    kept = _VALUES.get(value.data_ptr(), value)
    return _SIZES.get(kept, kept.nbytes)
