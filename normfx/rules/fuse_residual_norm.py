"""fuse_residual_norm: a norm and the residual add it reads are one op, with the norm before the add if there is one.

    s = f + α·x,        y = norm(s)                      Post-LN, DeepNorm; any pre-norm stream
    s = norm₁(f) + x,   y = norm₂(s)                     sandwich norms (Peri-LN)

It serves every norm, also those that keep their mean. Where rows of norm₁ enter a stream that is stored centred, norm₁
emits them centred, for one more sum over the row (M9):

    P (γ⊙z + β)  ==  γ⊙z + β − (γ·z/d + mean β)

On a GPU with kernels the op is one kernel, which reads the sum from registers. Without kernels a GPU gets nothing from
it: Inductor fuses the add and the norm by itself, and the op's own derivative reads more than that of the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfx.edit import Edit
from normfx.graph.nodes import bytes_of
from normfx.ir.sites import Leaf, Residual, Sites
from normfx.rules import algebra, centring, defer_norm
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols


def centred_output(z: Any, gamma: Any, beta: Any) -> Any:
    """P (γ⊙z + β) with one dot product; runs on tensors of one row and on arrays of symbols alike."""
    return gamma * z + beta - ((gamma * z).sum() + beta.sum()) / len(z)


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """M9, and a sandwich on a centred stream: norm₂ of x + norm₁(f) is an RMSNorm of P x + P norm₁(f)."""
    x, f, gamma, beta = symbols("x", d), symbols("f", d), symbols("gamma", d), symbols("beta", d)
    alpha, eps, delta = symbols("alpha", 1)[0], symbols("eps", 1)[0], symbols("delta", 1)[0]
    z = algebra.rms_norm(algebra.center(f), eps)
    yield from zip(algebra.center(gamma * z + beta), centred_output(z, gamma, beta), strict=True)
    if d > 2:
        return  # the roots of roots below are slow to expand, and d plays no part in them
    plain = algebra.layer_norm(gamma * z + beta + alpha * x, delta)
    fused = algebra.rms_norm(centred_output(z, gamma, beta) + alpha * algebra.center(x), delta)
    yield from zip(plain, fused, strict=True)


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Residual]:
    return sites.residuals


def guard(site: Residual, so_far: SoFar) -> Iterator[Objection]:
    deferred = defer_norm.deferred(site.norms, so_far)
    if site.obstacle:
        yield site.obstacle, site.detail, (site.node,)
    elif deferred:
        yield "deferred", ", ".join(node.name for node in deferred), deferred
    elif any(_reads_copy(site, leaf) for part in so_far.centred for leaf in part.stream.leaves):
        yield "centred_copy", site.node.name, (site.node,)


def _reads_copy(site: Residual, leaf: Leaf) -> bool:
    """Whether the norm reads the copy of the sum that is made where a stream is centred."""
    return leaf.explicit and leaf.node is site.node and site.norm in leaf.users


def cost(site: Residual) -> Cost:
    """The sum is read once less; of a sandwich the first norm's rows are neither written nor read."""
    return Cost(bytes_of(site.node) * (1 if site.inner is None else 3), sympy.Integer(0))


def rewrite(site: Residual, edit: Edit) -> None:
    edit.fuse(site)


class _PostNorm(nn.Module):
    """norm(α·x + f(x)), once or in the ways that `case` says."""

    def __init__(self, case: str = "", norm_dims: int = 1) -> None:
        super().__init__()
        self.case = case
        self.write, self.norm = nn.Linear(8, 8), nn.LayerNorm(8 if norm_dims == 1 else (4, 8))
        self.inner, self.gain = nn.LayerNorm(8), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> Any:
        f = self.write(x)
        if self.case == "broadcast":
            return self.norm(x + f[:, :1])
        if self.case == "without gradient":
            with torch.no_grad():
                s = x + f
            return self.norm(s)
        if self.case == "checkpointed":
            s = checkpoint(torch.add, x, f, use_reentrant=False)
            return self.norm(s)
        if self.case == "written":
            view = f.view(-1)
            view.mul_(2.0)
            return self.norm(x + f)
        if self.case == "statistics":
            return torch.native_layer_norm(x + f, [8], self.norm.weight, self.norm.bias, 1e-5)
        if self.case == "late weight":
            s = x + f
            early = torch.tanh(s)
            with torch.no_grad():
                gain = 1.0 + self.gain
            return nn.functional.layer_norm(s, (8,), gain), early
        if self.case == "deferred":
            return torch.relu(self.write(nn.functional.rms_norm(x + f, (8,), self.gain)))
        if self.case == "sandwich":
            return self.norm(x + self.inner(f))
        return self.norm(1.5 * x + f)


class _Copied(nn.Module):
    """A stream whose sum is returned, and that feeds so many norms that a centred copy of it pays."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.writes = nn.Embedding(10, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        x = x + self.writes[0](torch.tanh(x))
        tap = x
        for norm, write in zip(self.norms, self.writes, strict=True):
            x = x + write(norm(x))
        return nn.functional.layer_norm(x, (8,)), tap


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)),)


RULE = Rule(
    name="fuse_residual_norm",
    formula="LN(αx + f) in one op; P(γ⊙z + β) == γ⊙z + β − (γ·z/d + mean β)",
    source="Peri-LN (Kim et al. 2025); DeepNet (Wang et al. 2022), equation 4",
    codes={
        "opaque_norm": centring.CODES["opaque_norm"],
        "several_axes": centring.CODES["several_axes"],
        "mutated": centring.CODES["mutated"],
        "broadcast": Code(
            "the residual add broadcasts or mixes dtypes",
            "none needed: the sum is computed before the norm",
        ),
        "gradient_mode": Code(
            "gradients are recorded for the norm and not for the sum, or the other way round",
            "keep the residual add and the norm in one torch.no_grad() region, or outside of it",
        ),
        "checkpointed": Code(
            "the sum and the norm belong to different checkpointed regions: one op would keep or recompute both",
            "none needed: the sum is kept, and the norm is computed again from it",
        ),
        "read_before": Code(
            "the sum is read before the norm's weight or bias is computed, in another mode, so neither can be moved",
            "compute the norm's weight before the residual add",
        ),
        "centred_copy": Code(
            "the norm reads a centred copy of the sum, which is made once for several norms",
            "none needed: the norm is an RMSNorm",
        ),
        "deferred": defer_norm.DEFERRED,
    },
    identity=identity,
    mistake=("fuse_residual_norm.centred_output", lambda z, gamma, beta: gamma * z + beta),
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    exported=False,  # its op would be written out again
    for_kernels=True,
    summary="{norms} {are} computed together with the residual add",
    example=Example("post-norm", _PostNorm, _input),
    counterexamples=(
        Example("broadcast", lambda: _PostNorm("broadcast"), _input, "broadcast"),
        Example("no gradient", lambda: _PostNorm("without gradient"), _input, "gradient_mode"),
        Example("checkpoint", lambda: _PostNorm("checkpointed"), _input, "checkpointed"),
        Example("written in place", lambda: _PostNorm("written"), _input, "mutated"),
        Example("statistics returned", lambda: _PostNorm("statistics"), _input, "opaque_norm"),
        Example("two axes", lambda: _PostNorm(norm_dims=2), _input, "several_axes"),
        Example("late weight", lambda: _PostNorm("late weight"), _input, "read_before"),
        Example("copied", _Copied, lambda: (torch.arange(8).reshape(2, 4),), "centred_copy"),
        Example(
            "deferred", lambda: _PostNorm("deferred"), _input, "deferred", options={"rules": "default,+defer_norm"}
        ),
    ),
)
