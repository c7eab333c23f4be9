"""Inductor: its entry, options, settings, passes and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor import config as _config
from torch._inductor import ir
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import fallback_handler as _fallback_handler
from torch._inductor.lowering import register_lowering as _register_lowering
from torch._inductor.runtime.cache_dir_utils import cache_dir

__all__ = ["CustomGraphPass", "PyCodeCache", "cache_dir", "compile_fx"]

config: Any = _config

register_lowering: Callable[..., Any] = _register_lowering  # torch leaves both untyped
fallback_handler: Callable[..., Any] = _fallback_handler


def lower_channels_last(op: Any, last: Any) -> None:
    """Let Inductor call `last` for `op`, on a first argument that it stores channels last."""
    call = fallback_handler(last, add_to_fallback_set=False)

    def lowered(x: Any, *rest: Any) -> Any:
        return call(ir.ExternKernel.require_channels_last(x), *rest)

    register_lowering(op, type_promotion_kind=None)(lowered)


def modes() -> Mapping[str, Mapping[str, Any]]:
    """The settings that each `mode` of torch.compile stands for."""
    return torch._inductor.list_mode_options()


def option_names() -> frozenset[str]:
    return frozenset(torch._inductor.list_options())
