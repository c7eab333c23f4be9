"""Every way to write the parameters of a model that the folds must notice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from folding import dtype_of, net
from torch import nn


def give_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def step(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        give_gradients(model)
        make(model.parameters(), lr=0.1, **settings).step()

    return write


FUSED = [
    kind
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and "fused" in inspect.signature(kind.__init__).parameters
]


OPTIMISERS = {
    "sgd": step(torch.optim.SGD, foreach=False),
    "adam foreach": step(torch.optim.Adam, foreach=True),
    **{f"{kind.__name__} fused": step(kind, fused=True) for kind in FUSED},
}


def load(model: nn.Module, seed: int, **settings: Any) -> None:
    model.load_state_dict(net(seed, dtype_of(model)).state_dict(), **settings)


def load_twice(model: nn.Module) -> None:
    load(model, 1, assign=True)
    load(model, 2, assign=True)


def in_mode(mode: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        with mode():
            for p in model.parameters():
                p.mul_(1.5)

    return write


def each(write: Callable[[nn.Parameter], Any]) -> Callable[[nn.Module], None]:
    def all_of(model: nn.Module) -> None:
        for p in model.parameters():
            write(p)

    return all_of


def assign_data(p: nn.Parameter) -> None:
    p.data = torch.randn_like(p)


def add_data(p: nn.Parameter) -> None:
    p.data += 0.5


def through_vector(model: nn.Module) -> None:
    size = sum(p.numel() for p in model.parameters())
    nn.utils.vector_to_parameters(torch.randn(size, dtype=dtype_of(model)), model.parameters())


def through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[...] = np.sin(np.arange(p.numel())).reshape(p.shape)


def through_dlpack(p: nn.Parameter) -> None:
    torch.from_dlpack(p.detach()).copy_(torch.randn_like(p))


def replace_parameter(model: nn.Module) -> None:
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))
    model.norm1.bias = nn.Parameter(torch.randn_like(model.norm1.bias))


def fused_function(model: nn.Module) -> None:
    """A fused optimiser's kernel without its optimiser."""
    weights = [p.detach() for p in model.parameters()]
    torch._fused_sgd_(
        weights, [torch.randn_like(w) for w in weights], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=True,
    )  # fmt: skip


def there_and_back(model: nn.Module) -> None:
    dtype = dtype_of(model)
    model.to(torch.bfloat16)
    model.to(dtype)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    **OPTIMISERS,
    "load_state_dict": lambda m: load(m, 1),
    "load_state_dict(assign=True)": lambda m: load(m, 1, assign=True),
    "load_state_dict(assign=True) twice": load_twice,
    "copy_ under no_grad": lambda m: [p.copy_(torch.randn_like(p)) for p in m.parameters()],
    "in place under no_grad": in_mode(torch.no_grad),
    "in place under inference_mode": in_mode(torch.inference_mode),
    "p.data = t": each(assign_data),
    "p.data += x": each(add_data),
    "p.data.add_": each(lambda p: p.data.add_(0.5)),
    "p.detach().add_": each(lambda p: p.detach().add_(0.5)),
    "vector_to_parameters": through_vector,
    "numpy": each(through_numpy),
    "dlpack": each(through_dlpack),
    "parameter replaced": replace_parameter,
    "fused function": fused_function,
    "to(dtype) and back": there_and_back,
    "one bias": lambda m: m.norm2.bias.data.add_(1.0),
}
