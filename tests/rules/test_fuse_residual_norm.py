"""Norms and what stands next to them in one op: post-norm, DeepNorm, sandwich norms, centred outputs, shared norms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import LOW_PRECISION, EagerBackend, assert_low_precision, assert_same_float64, transformed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfx.ir import fused_ops, ops
from normfx.lower import triton as lowering
from normfx.rules import fuse_residual_norm

D = 8


class Net(nn.Module):
    """Two blocks of a kind over an embedding, and a head.

    post: LN(x + f(x)); deep: LN(αx + f(x)) (DeepNet, equation 4); peri: x + LN(f(LN(x))) (Peri-LN, figure 1);
    swin: x + LN(f(x)), no norm at all before f; mix: a post-norm block and then pre-norm ones (Mix-LN);
    start: pre-norm after a norm of the embedding
    """

    def __init__(self, kind: str, d: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.table, self.head = kind, nn.Embedding(200, d), nn.Linear(d, 3)
        self.writes = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.outs = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.first, self.final = nn.LayerNorm(d), nn.LayerNorm(d)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if self.kind == "start":
            x = self.first(x)
        for i, (write, norm, out) in enumerate(zip(self.writes, self.norms, self.outs, strict=True)):
            if self.kind == "post" or (self.kind == "mix" and i == 0):
                x = norm(x + write(torch.tanh(x)))
            elif self.kind == "deep":
                x = norm(x * 1.7 + write(torch.tanh(x)))
            elif self.kind == "peri":
                x = x + out(write(torch.tanh(norm(x))))
            elif self.kind == "swin":
                x = x + out(write(torch.tanh(x)))
            else:
                x = x + write(torch.tanh(norm(x)))
        out: Tensor = self.head(x if self.kind in ("post", "deep") else self.final(x))
        return out


@pytest.mark.parametrize(("inner", "outer"), [("rms", "rms"), ("rms", "layer"), ("layer", "rms")])
def test_each_norm_keeps_its_kind(inner: str, outer: str) -> None:
    """A norm, an add and a norm in one op are written apart where a LayerNorm of ATen is faster; an RMSNorm is none."""
    kinds = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
    net = Net("swin")
    net.outs, net.final = nn.ModuleList(kinds[inner](D) for _ in range(3)), kinds[outer](D)
    ids = torch.randint(0, 200, (2, 6))
    report = assert_same_float64(net, (ids,))
    assert any("fuse_residual_norm" in site.rules for site in report.sites)
    assert_low_precision(net, [(ids,)], EagerBackend(), torch.float32)


def ids() -> tuple[Tensor, ...]:
    return (torch.arange(10).reshape(2, 5),)


RULES = {
    "post": [("fuse_residual_norm",)] * 3,
    "deep": [("fuse_residual_norm",)] * 3,
    "swin": [("linear_norm",), ("linear_norm",), ("linear_norm", "fuse_residual_norm"), ("fuse_residual_norm",)],
    "peri": [
        ("pre_rms_norm",),
        *[("linear_norm", "fuse_residual_norm"), ("pre_rms_norm", "fuse_residual_norm")] * 3,
    ],
    "start": [*[("pre_rms_norm",)] * 2, *[("pre_rms_norm", "fuse_residual_norm")] * 3],
    "mix": [("fuse_residual_norm",), ("pre_rms_norm",), *[("pre_rms_norm", "fuse_residual_norm")] * 2],
}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("kind", RULES)
def test_decisions_and_float64(kind: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """kernels: as if there were some for the CPU; the ops run as ATen."""
    options = {"rules": "default,-fold_affine", "fold": "live"}
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(lowering, "has_kernels", lambda fake: True)
        options["lowering"] = "triton"
    report = assert_same_float64(Net(kind), ids(), options)
    assert [site.rules for site in report.sites] == RULES[kind]
    if kernels:
        assert all(site.lowering.startswith("triton: ") for site in report.sites)
        two = sum("layer_norm_add_" in s.lowering or "rms_norm_add_" in s.lowering for s in report.sites)
        assert two == {"peri": 6, "swin": 2}.get(kind, 0)


@pytest.mark.parametrize(
    "dtype", [d if d == torch.bfloat16 else pytest.param(d, marks=pytest.mark.slow) for d in LOW_PRECISION]
)
@pytest.mark.parametrize("kind", RULES)
def test_low_precision(kind: str, dtype: torch.dtype) -> None:
    batches = [(torch.randint(0, 200, (16, 16), generator=torch.Generator().manual_seed(i)),) for i in range(8)]
    assert_low_precision(Net(kind, 64).eval(), batches, EagerBackend(), dtype)


@pytest.mark.parametrize("kind", ["start", "peri"])
def test_under_autocast(kind: str) -> None:
    """The stream is float32, what is added to it bfloat16: still one op, without norms of bfloat16 before the add."""
    model, backend = Net(kind, 64).eval(), EagerBackend()
    given = (torch.randint(0, 200, (16, 16), generator=torch.Generator().manual_seed(0)),)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own, eager = ((call(*given).double() - want).norm().item() for call in (compiled, model))
    assert own <= LOW_PRECISION[torch.bfloat16] * eager
    assert sum("fuse_residual_norm" in site.rules for site in backend.report.sites) == 3


def test_flag_off() -> None:
    options = {"rules": "default,-fuse_residual_norm"}
    for kind in RULES:
        report = assert_same_float64(Net(kind), ids(), options)
        assert all("fuse_residual_norm" not in site.rules for site in report.sites)
        assert not any(name in report.graphs[0].after for name in ("add_rms", "add_layer", "norm_add"))


class Twice(nn.Module):
    """Two norms of one value: both equal once γ and β are folded, unless ε differs."""

    def __init__(self, eps: float = 1e-5, tap: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.tap = nn.LayerNorm(D), nn.LayerNorm(D, eps), tap
        self.left, self.right = nn.Linear(D, D), nn.Linear(D, D)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        s = x + y
        second = self.two(s)
        return self.left(self.one(s)) + self.right(second), *([second] if self.tap else [])


@pytest.mark.parametrize(("eps", "tap", "shared"), [(1e-5, False, True), (1e-3, False, False), (1e-5, True, False)])
def test_equal_norms_are_computed_once(eps: float, tap: bool, shared: bool) -> None:
    given = torch.randn(2, 5, D), torch.randn(2, 5, D)
    report = assert_same_float64(Twice(eps, tap), given, {"fold": "live"})
    first, second = sorted(report.sites, key=lambda site: site.name)
    assert {first.shares, second.shares} == ({"", "two"} if shared else {""})
    assert ("(computed by two)" in str(report)) is shared
    after = report.graphs[0].after
    assert after.count("layer_norm(") == (1 if shared else 2)


@pytest.mark.parametrize("returned", [1, 2])
def test_returned_norms_have_memory_of_their_own(returned: int) -> None:
    """What the caller writes into one result is not seen in the other."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(D)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            s = x + y
            last = F.dropout(self.norm(s), 0.5, training=False)
            return self.norm(s), last if returned == 2 else torch.tanh(last)

    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(Model(), backend="normfx", options={"strict": True})
        first, second = compiled(torch.randn(2, 5, D), torch.randn(2, 5, D))
        before = second.clone()
        first.zero_()
    assert torch.equal(second, before)


class Twin(nn.Module):
    """One value as both terms of the sum that a norm reads."""

    def __init__(self, join: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.last, self.write, self.join = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, D), join

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.join(self.norm(self.write(x))))
        return out


@pytest.mark.parametrize(
    "join",
    [
        lambda z: z + z,
        lambda z: torch.add(z, z, alpha=2),
        lambda z: z * 0.5 + z * 0.5,
        lambda z: z + z * 0.5,
        lambda z: z - z,
    ],
)
def test_a_value_added_to_itself(join: Callable[[Tensor], Tensor]) -> None:
    assert_same_float64(Twin(join), (torch.randn(2, 5, D),), floor=1.0)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize(
    ("kind", "rules", "native"),
    [
        ("post", "default,-fold_affine", 3),
        ("swin", "default,-fold_affine", 4),  # lone writers in half precision are not centred
        ("mix", "default,-fold_affine", 0),  # the one that stays emits centred rows
        ("swin", "fuse_residual_norm", 4),
        ("peri", "fuse_residual_norm", 7),
    ],
)
def test_native_norms_of_a_cpu(kind: str, rules: str, native: int, records: bool) -> None:
    """LayerNorms that keep their mean are torch's own in low-precision inference, next to an add or not."""
    model, backend = Net(kind).to(torch.bfloat16), EagerBackend({"rules": rules})
    torch._dynamo.reset()
    with torch.set_grad_enabled(records):
        torch.compile(model, backend=backend, fullgraph=True)(*ids())
    targets = [node.target for node in backend.modules[0].graph.nodes]
    assert targets.count(torch.ops.aten.layer_norm.default) == (0 if records else native)


def test_norms_of_two_gradient_modes_stay_two() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                quiet = F.rms_norm(x, (D,), eps=1e-5)
            return F.rms_norm(x, (D,), eps=1e-5) * quiet

    backend = EagerBackend({"lowering": "triton"})
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(Model(), backend=backend, fullgraph=True)
    torch._dynamo.reset()
    (own,) = torch.autograd.grad(compiled(x).sum(), x)
    (want,) = torch.autograd.grad(Model()(x).sum(), x)
    torch.testing.assert_close(own, want, rtol=1e-12, atol=1e-12)


class Quiet(nn.Module):
    """An add and its norms, one of them without gradients."""

    def __init__(self, quiet: str) -> None:
        super().__init__()
        self.quiet, self.inner, self.norm = quiet, nn.LayerNorm(D), nn.LayerNorm(D)
        self.write, self.read = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, z = torch.tanh(self.write(x)), x.sin()
        with torch.set_grad_enabled(self.quiet != "inner"):
            y = self.inner(y)
        with torch.set_grad_enabled(self.quiet != "scaled"):
            z = z * 1.5
        s = y + z
        with torch.set_grad_enabled(self.quiet != "reader"):
            early = s.cos()
        with torch.set_grad_enabled(self.quiet != "norm"):
            out = self.norm(s)
        return self.read(out), early, s.exp()


@pytest.mark.parametrize(
    ("quiet", "fused"),
    [
        ("", [True, True]), ("inner", [False, True]), ("scaled", [True, True]), ("reader", [False, False]),
        ("norm", [False, False]),
    ],
)  # fmt: skip
def test_what_records_no_gradients_stays_apart(quiet: str, fused: list[bool]) -> None:
    report = assert_same_float64(Quiet(quiet), (torch.randn(2, 5, D),), {"rules": "fuse_residual_norm", "fold": "live"})
    assert [bool(site.rules) for site in report.sites] == fused


@pytest.mark.parametrize("apart", [False, True])
def test_norms_of_two_checkpoints_stay_two(apart: bool) -> None:
    """Each is recomputed with its own region."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def half(s: Tensor) -> Tensor:
                return torch.tanh(F.layer_norm(s, (D,)))

            if apart:
                return checkpoint(half, x, use_reentrant=False) * checkpoint(half, x, use_reentrant=False)
            return half(x) * half(x)

    report = assert_same_float64(Model(), (torch.randn(3, D),), {"rules": "default", "lowering": "triton"})
    assert sum(bool(site.shares) for site in report.sites) == (0 if apart else 1)


def test_a_centred_norm_that_others_read_keeps_its_output() -> None:
    """Its centred rows are a copy then."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.norms = nn.LayerNorm(D), nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
            self.table, self.writes = nn.Embedding(20, D), nn.ModuleList(nn.Linear(D, D) for _ in range(4))
            with torch.no_grad():
                for p in self.parameters():
                    p.add_(0.3 * torch.randn_like(p))

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = start = self.start(self.table(ids))
            for norm, write in zip(self.norms, self.writes, strict=True):
                x = x + write(torch.tanh(norm(x)))
            return self.norms[0](x), torch.tanh(start)

    _, report = transformed(Model(), ids())
    assert "centre_output" not in report.graphs[0].after and report.counts["centrings"] == 1
    assert_same_float64(Model(), ids())


def test_a_multiple_of_a_centred_norm() -> None:
    """fold_scale, M9 and the add of the next norm together."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.norm, self.table = nn.LayerNorm(D), nn.LayerNorm(D), nn.Embedding(20, D)
            self.write, self.head = nn.Linear(D, D), nn.Linear(D, 2)
            with torch.no_grad():
                for p in self.parameters():
                    p.add_(0.3 * torch.randn_like(p))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.start(self.table(ids)) * 0.5
            out: Tensor = self.head(self.norm(x + self.write(torch.sin(ids[..., None] * torch.ones(D).to(x.dtype)))))
            return out

    backend = EagerBackend()
    torch.compile(Model(), backend=backend, fullgraph=True)(*ids())
    (node,) = [n for n in backend.modules[0].graph.nodes if n.target is fused_ops.NORM_ADD_NORM]
    assert not any(n.target is ops.CENTER and n.args[0] is node for n in backend.modules[0].graph.nodes)
    assert_same_float64(Model(), ids())


def test_a_copy_that_is_not_made_keeps_no_sum_apart() -> None:
    """`centred_copy` is said of a stream that was centred, and not of one that could have been."""
    example = next(e for e in fuse_residual_norm.RULE.counterexamples if e.code == "centred_copy")
    model, inputs = example.build().eval(), example.inputs()
    fused = {}
    for rules in ("default", "default,-pre_rms_norm"):
        report = assert_same_float64(model, inputs, {"rules": rules, "fold": "live"})
        codes = {r.code for site in report.sites for r in site.refusals}
        assert ("centred_copy" in codes) == (rules == "default")
        fused[rules] = report.counts.get("fuse_residual_norm", 0)
    assert fused["default,-pre_rms_norm"] > fused["default"]
