"""Generated kernels, on a CUDA device or under Triton's interpreter, in a process of their own: triton reads
TRITON_INTERPRET when imported.

`python kernel_answers.py` reads cases from stdin, one JSON object a line, and answers each with a line: the largest
error of every result, as a part of what its dtype allows, or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfx.kernels import run
from normfx.kernels.launch import backward_launch
from normfx.kernels.spec import Inner, Spec

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if DEVICE == "cpu" else 2.0**-8}
"""Rounding unit. The interpreter cuts bfloat16 off instead of rounding it: twice the unit."""

INNER_EPS = 2e-4
"""ε of the norm before an add: another than that of the norm after it."""

OPERATIONS = 32
"""Roundings in float32 that one entry may have met, of a sum over a row in a tree and of the formula."""


def exact(
    spec: Spec,
    eps: float,
    tensors: dict[str, Tensor],
    out_grad: Tensor,
    sum_grad: Tensor | None,
    stored: Tensor | None,
) -> dict[str, Tensor]:
    """Outputs and gradients in float64, by autograd from the definition; "between": the gradient of s."""
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    s = wide["x"]
    if spec.inner is not None:
        s = normalised(spec.first, s, INNER_EPS, wide.get("inner_weight"), wide.get("inner_bias"))
    if "x_bias" in wide:
        s = s + wide["x_bias"]
    if "residual" in wide:
        s = s + spec.alpha * wide["residual"]
    unrounded = s.detach()
    if stored is not None:  # the norm is of the sum as it was stored
        s = s + (stored.double() - unrounded)
    y = normalised(spec, s, eps, wide.get("weight"), wide.get("bias"))
    loss = (y * out_grad.double()).sum() + ((s * sum_grad.double()).sum() if sum_grad is not None else 0)
    wanted = [name for name in ("x", "weight", "bias", "x_bias", "inner_weight", "inner_bias") if name in wide]
    *grads, between = torch.autograd.grad(loss, [*(wide[name] for name in wanted), s])
    results = {"out": y.detach(), **{f"{name}_grad": g for name, g in zip(wanted, grads, strict=True)}}
    results["between"] = between
    return {**results, "sum": unrounded} if stored is not None else results


def normalised(spec: Spec, s: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = s - s.mean(-1, keepdim=True) if spec.centre else s
    squares = z.square().sum(-1, keepdim=True)
    if spec.compressed:
        squares = squares + z.sum(-1, keepdim=True).square()
    y = z * torch.rsqrt(squares / (spec.width - spec.correction) + eps)
    if weight is not None:
        y = y * (1 + weight if spec.unit_offset else weight)
    if bias is not None:
        y = y + bias
    y = y * spec.scale
    return y - y.mean(-1, keepdim=True) if spec.centre_output else y


def inputs(spec: Spec, shape: list[int], shift: float, kind: str) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    full = (*shape, spec.entries)
    x = random(*full) + shift
    if kind == "zeros":
        x = torch.zeros(full, device=DEVICE)
    elif kind == "strided":
        x = torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
    elif kind == "rows apart":
        x = torch.cat([x, x], -1)[..., : spec.entries]
    elif kind == "transposed":
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    elif kind == "not finite":
        x[0, 0], x[1, -1], x[2, 0] = float("inf"), float("nan"), float("-inf")
    dtype = {
        name: getattr(torch, d)
        for name in ("x", "residual", "weight", "bias", "sum", "out")
        if (d := getattr(spec, name))
    }
    tensors = {"x": x.to(dtype["x"])}
    if spec.residual:
        tensors["residual"] = random(*full).to(dtype["residual"])
    if spec.weight:
        tensors["weight"] = (random(spec.entries) + (0.0 if spec.unit_offset else 1.0)).to(dtype["weight"])
    if spec.bias:
        tensors["bias"] = random(spec.entries).to(dtype["bias"])
    if spec.x_bias:
        tensors["x_bias"] = random(spec.entries).to(getattr(torch, spec.x_bias))
    if spec.inner is not None:
        for name, named in (("inner_weight", spec.inner.weight), ("inner_bias", spec.inner.bias)):
            if named:
                tensors[name] = (random(spec.entries) + (name == "inner_weight")).to(getattr(torch, named))
    if kind == "strided":
        tensors.update({name: torch.stack([t, t + 1], -1)[..., 0] for name, t in tensors.items() if name != "x"})
    sum_grad = random(*full).to(dtype["sum"]) if spec.sum else None
    return tensors, random(*full).to(dtype["out"]), sum_grad


def largest(tensor: Tensor) -> float:
    """The largest magnitude of an entry; 0 of nothing."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def trains(spec: Spec) -> bool:
    """Backward reads the sum again, so that without it there is none."""
    return spec.residual is None or spec.sum is not None


def cancellation(s: Tensor, eps: float) -> float:
    """The largest mean over deviation of a row: by so much x − mean multiplies the rounding of the mean."""
    variance, mean = torch.var_mean(s.double(), -1, correction=0)
    return largest(mean / (variance + eps).sqrt())


def terms(spec: Spec, tensors: dict[str, Tensor], out_grad: Tensor, rstd: Tensor) -> float:
    """The largest entry of rstd · k·γ ⊙ dy."""
    inner = out_grad.double() * rstd.double().unsqueeze(-1) * spec.scale
    if "weight" in tensors:
        inner = inner * (tensors["weight"].double() + spec.unit_offset)
    return largest(inner)


def results(
    spec: Spec, eps: float, tensors: dict[str, Tensor], out_grad: Tensor, sum_grad: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """What the kernels give, and rstd."""
    x, residual, weight, bias = tensors["x"], *map(tensors.get, ("residual", "weight", "bias"))
    inner_weight, inner_bias = map(tensors.get, ("inner_weight", "inner_bias"))
    inner, x_bias = (inner_weight, inner_bias, INNER_EPS), tensors.get("x_bias")
    forward = run.forward(spec, x, eps, residual, weight, bias, inner=inner, x_bias=x_bias)
    assert forward.rstd is not None
    saved = x if forward.sum is None else forward.sum
    if not trains(spec):
        return {"out": forward.out}, forward.rstd
    last = spec if spec.inner is None else spec.last
    grads = run.backward(last, out_grad, saved, forward.rstd, forward.mean, weight, sum_grad)
    found = {
        "out": forward.out,
        "sum": forward.sum,
        "x_grad": grads.x,
        "weight_grad": grads.weight,
        "bias_grad": grads.bias,
        "x_bias_grad": grads.x_bias,
    }
    if spec.inner is not None:
        assert forward.inner_rstd is not None
        first = run.backward(spec.first, grads.x, x, forward.inner_rstd, forward.inner_mean, inner_weight)
        found |= {"x_grad": first.x, "inner_weight_grad": first.weight, "inner_bias_grad": first.bias}
    return {name: t for name, t in found.items() if t is not None}, forward.rstd


def without_statistics(spec: Spec, eps: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another kernel, whose compiler may contract other products and sums: equal up to rounding only."""
    names = ("x", "residual", "weight", "bias", "inner_weight", "inner_bias")
    x, residual, weight, bias, *inner = (tensors.get(name) for name in names)
    assert x is not None
    vectors = (inner[0], inner[1], INNER_EPS)
    x_bias = tensors.get("x_bias")
    found = run.forward(spec, x, eps, residual, weight, bias, statistics=False, inner=vectors, x_bias=x_bias)
    assert found.rstd is found.mean is found.inner_rstd is found.inner_mean is None
    return {name: t for name, t in (("out", found.out), ("sum", found.sum)) if t is not None}


def answer(case: dict[str, Any]) -> dict[str, float]:
    given = case["spec"]
    inner = Inner(**given["inner"]) if given.get("inner") else None
    spec, eps = Spec(**{**given, "inner": inner}), case.get("eps", 1e-5)
    shift, kind = case.get("shift", 0.0), case.get("kind", "")
    tensors, out_grad, sum_grad = inputs(spec, case["shape"], shift, kind)
    found, rstd = results(spec, eps, tensors, out_grad, sum_grad)
    again = results(spec, eps, tensors, out_grad, sum_grad)[0] if case.get("twice") else found
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), f"{name} differs from run to run"
    if kind == "not finite":
        return compare_with_definition(spec, eps, tensors["x"], found["out"])

    def wanted(stored: Tensor | None) -> dict[str, Tensor]:
        return exact(spec, case.get("exact_eps", eps), tensors, out_grad, sum_grad, stored)

    right = wanted(found.get("sum"))
    between = right.pop("between")
    assert found.keys() == (right.keys() if trains(spec) else {"out"})
    judge = Judge(spec, eps, tensors, out_grad, rstd, between)
    errors = judge.errors(found, right)
    if case.get("twice"):
        lean = without_statistics(spec, eps, tensors)
        more = judge.errors(lean, wanted(lean.get("sum")))
        errors |= {f"{name} without statistics": error for name, error in more.items()}
    return errors


@dataclass(frozen=True)
class Judge:
    """Knows how far results of these inputs may be off. between: the gradient of the sum, of two norms in a row."""

    spec: Spec
    eps: float
    tensors: dict[str, Tensor]
    out_grad: Tensor
    rstd: Tensor
    between: Tensor

    def errors(self, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
        """The largest of every result, as a part of what its dtype allows."""
        spec, tensors = self.spec, self.tensors
        cancelled = cancellation(found.get("sum", tensors["x"]), self.eps) if spec.centre else 0.0
        errors = {}
        for name, got in found.items():
            want = wanted[name]
            assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}"
            dtype = dtype_of(spec, name)
            assert got.dtype == getattr(torch, dtype), f"{name} is {got.dtype}"
            if want.numel():
                errors[name] = largest(got.double() - want) / (self.allowed(name, got, want, cancelled) + 1e-300)
        return errors

    def allowed(self, name: str, got: Tensor, want: Tensor, cancelled: float) -> float:
        spec, tensors = self.spec, self.tensors
        unit = UNIT[got.dtype] + OPERATIONS * UNIT[torch.float32] * (1 + cancelled / 8)
        scale = largest(want)
        if name == "x_grad":  # a difference of terms of this size, which may cancel
            scale = max(scale, terms(spec, tensors, self.out_grad, self.rstd))
        elif name == "weight_grad":  # a sum of these over rows
            scale = max(scale, spec.scale * largest(self.out_grad))
        elif name == "x_bias_grad":  # a sum over rows of dx, in a kernel of its own of dx as it is stored
            scale = max(scale, terms(spec, tensors, self.out_grad, self.rstd))
            unit += 0.0 if backward_launch(spec).persistent else UNIT[tensors["x"].dtype]
        allowed = unit * scale
        if spec.inner is not None and spec.sum is not None:
            own = UNIT[getattr(torch, spec.sum)] + OPERATIONS * UNIT[torch.float32] * (1 + cancelled / 8)
            most = max(largest(self.between), terms(spec, tensors, self.out_grad, self.rstd))
            allowed += carried_on(spec.inner, own * most, tensors, name)
        return allowed


def dtype_of(spec: Spec, name: str) -> str:
    if name.startswith("inner_"):
        assert spec.inner is not None
        return str(getattr(spec.inner, name.removeprefix("inner_").removesuffix("_grad")))
    named = {"out": spec.out, "sum": spec.sum, "x_grad": spec.x}.get(name)
    return named or str(getattr(spec, name.removesuffix("_grad")))


def carried_on(inner: Inner, error: float, tensors: dict[str, Tensor], name: str) -> float:
    """What an error of the sum's gradient, rounded between the two backward kernels, adds to a gradient after it."""
    if name not in ("x_grad", "inner_weight_grad", "inner_bias_grad"):
        return 0.0
    x = tensors["x"].double()
    z = x - x.mean(-1, keepdim=True) if inner.centre else x
    rstd = torch.rsqrt(z.square().sum(-1, keepdim=True) / (x.shape[-1] - inner.correction) + INNER_EPS)
    normal = largest(z * rstd)
    error *= inner.scale
    if name == "x_grad":  # three terms of this size: of the entry, of the mean and along x̂
        gamma = largest(tensors["inner_weight"].double()) if "inner_weight" in tensors else 1.0
        return error * largest(rstd) * gamma * (2 + normal)
    return error * (x.numel() // x.shape[-1]) * (normal if name == "inner_weight_grad" else 1.0)


def compare_with_definition(spec: Spec, eps: float, x: Tensor, out: Tensor) -> dict[str, float]:
    """NaN and infinities where the definition has them.

    Not where eager has them: on CUDA its RMSNorm makes a whole row NaN for one infinity where the width is no multiple
    of 4 (torch 2.11), and NaN only that entry elsewhere.
    """
    wanted = normalised(spec, x.double(), eps, None, None)
    assert torch.equal(out.isnan(), wanted.isnan()), "NaN elsewhere than in the definition"
    assert torch.equal(out.isinf(), wanted.isinf()), "infinite elsewhere than in the definition"
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            reply = {"errors": answer(json.loads(line))}
        except Exception as error:
            reply = {"failure": f"{type(error).__name__}: {error}"}
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # other processes have cases on the same device
        print(json.dumps(reply), flush=True)
