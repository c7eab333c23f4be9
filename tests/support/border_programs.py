"""More steps of random programs, which only Dynamo's trace brings: opaque functions, `.data`."""

from __future__ import annotations

from typing import Any

import torch
from token_programs import WIDTH, At, Form
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Rounded(torch.autograd.Function):
    """A straight-through estimator whose gradient is not that of its formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@torch.compiler.allow_in_graph
def rounded(x: Tensor) -> Tensor:
    return Rounded.apply(x) + x


@torch.compiler.allow_in_graph
def hooked(x: Tensor) -> Tensor:
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 3)
    return y


@torch.compiler.allow_in_graph
def doubled_(x: Tensor) -> Tensor:
    return x.mul_(2)


def _block() -> nn.Module:
    return nn.ModuleList([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)])


def _square() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def _branch(at: At, middle: Any) -> Tensor:
    norm, up, down = at.part
    return at.x + down(middle(up(norm(at.x))))


def _checkpointed(at: At) -> Tensor:
    norm, up, down = at.part
    return at.x + checkpoint(lambda x: down(rounded(up(norm(x)))), at.x, use_reentrant=False)


def _written_data(at: At) -> Tensor:
    """A write that autograd does not see, to a value whose gradient is that of before."""
    y = at.x * at.vector
    y.data.mul_(0.5)
    return y + at.x


def _detached_alias(at: At) -> Tensor:
    y = at.x * 1.5
    alias = y.data
    y = y + 1.0
    alias.add_(1.0)
    return at.x + y + alias


BORDER_OPS: dict[str, Form] = {
    "opaque_middle": Form(lambda at: _branch(at, rounded), _block),
    "hooked_middle": Form(lambda at: _branch(at, hooked), _block),
    "opaque_write": Form(lambda at: at.x + rounded(at.part(torch.sin(at.first))), _square),
    "opaque_input": Form(lambda at: at.x + at.part(hooked(at.first)), _square),
    "opaque_written": Form(lambda at: _branch(at, lambda h: torch.relu(doubled_(h + 1))), _block),
    "opaque_checkpoint": Form(_checkpointed, _block),
    "weight_data": Form(lambda at: at.x + F.linear(torch.sin(at.first), at.part.weight.data, at.part.bias), _square),
    "stream_data": Form(lambda at: at.x + at.x.data, None),
    "written_data": Form(_written_data, None, (WIDTH,)),
    "detached_alias": Form(_detached_alias, None),
}


def _norm_of_data(at: At) -> Tensor:
    return F.layer_norm(at.x, (WIDTH,), at.part.weight.data, at.part.bias)


def _opaque_norm(at: At) -> Tensor:
    return hooked(at.part(at.x))


BORDER_OBSERVERS: dict[str, Form] = {
    "norm_of_data": Form(_norm_of_data, lambda: nn.LayerNorm(WIDTH)),
    "opaque_norm": Form(_opaque_norm, lambda: nn.LayerNorm(WIDTH)),
    "opaque_mean": Form(lambda at: rounded(at.x)),
}

FORMS = BORDER_OPS | BORDER_OBSERVERS
