"""Modes of autograd, autocast and dispatch, as a trace enters and leaves them."""

from __future__ import annotations

from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

__all__ = ["TracingContext", "detect_fake_mode", "disable_current_modes", "enable_python_dispatcher", "tracing"]

set_grad_enabled: Any = torch._C._set_grad_enabled
"""Sets the gradient mode for good, as the nodes of a graph do."""

enter_autocast: Any = torch.amp.autocast_mode._enter_autocast
exit_autocast: Any = torch.amp.autocast_mode._exit_autocast

GET_DATA: Any = getattr(torch._C._autograd, "_get_data_attr", None)
"""What Dynamo writes for `x.data`: a detached alias, whose writes do not count as writes to x. A trace leaves none.
None where torch has no such function: its Dynamo breaks the graph there."""

SWITCH_HOOKS: Any = getattr(torch._C._autograd, "_saved_tensors_hooks_set_tracing", None)
"""Puts off the hooks of saved tensors, and returns whether they were put off (torch 2.13 and newer, else None)."""

without_torch_function: Any = torch._C.DisableTorchFunction


def functorch_is_active() -> bool:
    """Whether a transform of torch.func is going on."""
    return torch._C._are_functorch_transforms_active()


def pre_dispatch_tracer() -> Any:
    """The tracer of the make_fx(pre_dispatch=True) that is going on."""
    find: Any = torch._ops._get_dispatch_mode_pre_dispatch
    return find(torch._C._TorchDispatchModeKey.PROXY).tracer
