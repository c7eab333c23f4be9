"""Who competes in `normfx bench kernels`: normfx's generated kernels, torch, and norms of other packages.

Each is a function of (x, residual, weight, bias), the last three None where a norm has none, that returns the norm, and
with a residual the sum too; gradients come from autograd. Only normfx's kernels are launched by themselves as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from normfx.bench.measure import failure_text
from normfx.bench.norms import EPS, Cell, Inputs, definition
from normfx.compat.dynamo import aot_config
from normfx.ir.form import Form, Kind
from normfx.kernels import run
from normfx.kernels.spec import Spec
from normfx.lower.norm_ops import NORM

Function = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, ...]]  # of Arguments
Call = Callable[[], tuple[Tensor, ...]]

OURS = ("normfx", "normfx-op")
"""The kernels launched as in a compiled graph, and the op around them, with autograd."""


@dataclass(frozen=True)
class Rival:
    """make:    spec → its function, or None if it has no such norm
    module:  that must be importable, of `package`; None: torch's own"""

    make: Callable[[Spec], Function | None]
    module: str | None = None
    package: str | None = None

    def absent(self) -> str:
        """Why it cannot take part; "" if it can."""
        if self.module is None:
            return ""
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            return f"{failure_text(error)} (pip install {self.package})"
        except Exception as error:  # a package whose binaries are of another torch fails in ways of its own
            return failure_text(error)
        return ""


def _eager(spec: Spec) -> Function:
    def function(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        s = x if residual is None else x + residual
        if spec.compressed:
            y = definition(spec, s.float())[0].to(s.dtype)
        elif spec.centre:
            y = functional.layer_norm(s, (spec.width,), weight, bias, EPS)
        else:
            y = functional.rms_norm(s, (spec.width,), weight, EPS)
        return (y,) if residual is None else (y, s)

    return function


def _inductor(mode: str | None = None) -> Callable[[Spec], Function]:
    return lambda spec: torch.compile(_eager(spec), fullgraph=True, dynamic=False, mode=mode)


def _op(spec: Spec) -> Function:
    kind: Kind = "crms_norm" if spec.compressed else "layer_norm" if spec.centre else "rms_norm"

    def function(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        form = Form(kind, -1, EPS, "inside", -spec.compressed, 1.0, torch.float32, x.dtype)
        found = NORM(x, residual, weight, bias, None, *form, 1.0, True, True)
        return (found[0],) if residual is None else (found[0], found[-1])

    return function


def _liger(spec: Spec) -> Function | None:
    from liger_kernel.transformers import functional as liger

    if spec.compressed or (spec.residual and (spec.centre or not spec.weight)):
        return None

    def function(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        if residual is not None:
            y, s = liger.liger_fused_add_rms_norm(x, residual, weight, EPS)
            return y, s
        if spec.centre:
            return (liger.liger_layer_norm(x, weight, bias, EPS),)
        return (liger.liger_rms_norm(x, weight, EPS),)

    return function


def _quack(spec: Spec) -> Function | None:
    from quack import rmsnorm

    if spec.compressed or spec.centre:  # its LayerNorm takes float32 weights only, and has no autograd
        return None

    def function(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        found = rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=residual is not None)
        return (found,) if residual is None else found

    return function


def _flash_attn(spec: Spec) -> Function | None:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    if spec.compressed or not spec.weight:
        return None

    def function(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        found = layer_norm_fn(
            x, weight, bias, residual, eps=EPS, prenorm=residual is not None, is_rms_norm=not spec.centre
        )
        return (found,) if residual is None else found

    return function


def _cudnn(spec: Spec) -> Function | None:
    from cudnn.ops import norm

    if spec.compressed or spec.residual or not spec.weight:
        return None

    def function(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        if spec.centre:
            return (norm.layer_norm(x, (spec.width,), weight, bias, EPS),)
        return (norm.rms_norm(x, weight, bias, EPS),)

    return function


RIVALS = {
    "eager": Rival(_eager),
    "inductor": Rival(_inductor()),
    "inductor-max-autotune": Rival(_inductor("max-autotune-no-cudagraphs")),
    "liger": Rival(_liger, "liger_kernel.transformers.functional", "liger-kernel"),
    "quack": Rival(_quack, "quack", "quack-kernels"),
    "flash_attn": Rival(_flash_attn, "flash_attn.ops.triton.layer_norm", "flash-attn"),
    "cudnn": Rival(_cudnn, "cudnn.ops.norm.rmsnorm", "nvidia-cudnn-frontend"),
}
"""The rivals, by name. Liger's (0.8.5) were run on an H200, flash-attn's (main of August 2026) under Triton's
interpreter; quack's (0.6.5) and cuDNN's (frontend 1.32) follow their sources and have not been run."""


def present(names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The rivals of these names that can take part, and why the others cannot."""
    reasons = {name: RIVALS[name].absent() for name in names}
    return [name for name, why in reasons.items() if not why], {name: why for name, why in reasons.items() if why}


@contextmanager
def repeatable() -> Iterator[None]:
    """Around everything, so that Inductor's backward may run again on the same graph. Compiled for running once, and
    it is where its cache knows the graph from such a program, it overwrites what forward kept, and refuses to (torch
    2.13, 2.15). Threads do not see each other's settings, so backward has to stay on this one.
    """
    with aot_config.patch(donated_buffer=False), torch.autograd.grad_mode.set_multithreading_enabled(False):
        yield


def call(name: str, cell: Cell, inputs: Inputs) -> Call | None:
    """The call to be checked and timed, its results in the order of `cell.results`; None: there is no such norm.

    A backward call is only the backward pass, of a forward pass that has been.
    """
    if name == "normfx":
        return _launches(cell, inputs)
    function = _op(cell.spec) if name == "normfx-op" else RIVALS[name].make(cell.spec)
    if function is None:
        return None
    if not cell.backward:
        return lambda: function(*inputs.arguments)
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.tensors.items()}
    with torch.enable_grad():
        outputs = function(*Inputs(leaves, inputs.grads).arguments)
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), inputs.grads, retain_graph=True)


def _launches(cell: Cell, inputs: Inputs) -> Call:
    spec = cell.spec
    x, residual, weight, bias = inputs.arguments

    def forward() -> tuple[Tensor, ...]:
        found = run.forward(spec, x, EPS, residual, weight, bias, statistics=False)
        return (found.out,) if found.sum is None else (found.out, found.sum)

    if not cell.backward:
        return forward
    kept = run.forward(spec, x, EPS, residual, weight, bias)
    saved, rstd = x if kept.sum is None else kept.sum, kept.rstd
    assert rstd is not None
    grad, *sum_grad = inputs.grads

    def backward() -> tuple[Tensor, ...]:
        found = run.backward(spec, grad, saved, rstd, kept.mean, weight, *sum_grad)
        of_x = [found.x] if residual is None else [found.x, found.x]  # alpha is 1: x and the residual share it
        return (*of_x, *(g for g in (found.weight, found.bias) if g is not None))

    return backward
