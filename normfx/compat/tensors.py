"""Tensors that are not plain memory, and the identity of memory."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensorConverter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["FakeTensor", "FakeTensorConverter", "FakeTensorMode", "is_traceable_wrapper_subclass"]


def is_functorch_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func has wrapped a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def parts(tensor: torch.Tensor | None) -> list[torch.Tensor]:
    """The plain tensors that a tensor consists of: itself, or those that a subclass of tensors wraps. What else it
    wraps, as a DTensor its mesh, is left out."""
    if tensor is None or not is_traceable_wrapper_subclass(tensor):
        return [] if tensor is None else [tensor]
    wrapper: Any = tensor
    held = (getattr(wrapper, name) for name in wrapper.__tensor_flatten__()[0])
    return [part for each in held if isinstance(each, torch.Tensor) for part in parts(each)]


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that no other living storage has; views and aliases of one storage have the same."""
    key: int = storage._cdata
    return key


version_of = attrgetter("_version")
"""The number of writes to a tensor that autograd has counted."""
