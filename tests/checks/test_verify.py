"""verify: a canonical graph passes, each broken invariant is named with its stage and node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from normfx.capture.trace import capture
from normfx.checks.verify import Checked, verify
from normfx.errors import VerifyError

aten = torch.ops.aten


def canonical(f: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> GraphModule:
    seen: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(capture(gm, example_inputs).graph_module)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return seen[-1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(self.norm(x))
        return y.float().reshape(x.shape[0] * 4) + 1


def find(gm: GraphModule, target: Any) -> Any:
    return gm.graph.find_nodes(op="call_function", target=target)[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_canonical_graph_passes(dynamic: bool) -> None:
    gm = canonical(Model(), torch.randn(3, 4), dynamic=dynamic)
    autocast, grad = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    verify(gm, "capture")
    assert (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()) == (autocast, grad)


def test_in_place_ops_do_not_disturb_the_record() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.t_()
        return y.add_(1)

    gm = canonical(f, torch.randn(3, 4))
    verify(gm, "capture")
    verify(gm, "again")


def test_ambient_autocast_is_the_callers() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    args = torch.randn(3, 4), torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        gm = canonical(f, *args)
        verify(gm, "capture")
    with pytest.raises(VerifyError, match=r"expected torch.float32 .* found torch.bfloat16"):
        verify(gm, "capture")


def test_wrong_dtype_shape_and_missing_value() -> None:
    gm = canonical(Model(), torch.randn(3, 4))
    norm = find(gm, aten.layer_norm.default)
    good = norm.meta["val"]
    norm.meta["val"] = good.double()
    with pytest.raises(VerifyError, match=r"after stage 'rewrite', node 'layer_norm.*found torch.float64"):
        verify(gm, "rewrite")
    norm.meta["val"] = good.new_empty(3, 5)
    with pytest.raises(VerifyError, match=r"expected torch.float32 \(3, 4\) on cpu, found torch.float32 \(3, 5\)"):
        verify(gm, "rewrite")
    del norm.meta["val"]
    with pytest.raises(VerifyError, match=r"node 'layer_norm.*expected meta\['val'\], found none"):
        verify(gm, "rewrite")


def test_wrong_symbolic_shape() -> None:
    gm = canonical(Model(), torch.randn(3, 4), dynamic=True)
    norm = find(gm, aten.layer_norm.default)
    size = norm.meta["val"].shape[0]
    with norm.meta["val"].fake_mode:
        norm.meta["val"] = torch.empty(size + 1, 4)
    with pytest.raises(VerifyError, match="layer_norm"):
        verify(gm, "rewrite")


def test_foreign_targets_and_arguments() -> None:
    gm = canonical(Model(), torch.randn(3, 4))
    norm = find(gm, aten.layer_norm.default)
    norm.target = F.layer_norm
    with pytest.raises(VerifyError, match="expected an op overload"):
        verify(gm, "rewrite")
    norm.target = aten.layer_norm.default
    norm.args = (norm.args[0], [5], *norm.args[2:])
    with pytest.raises(VerifyError, match="expected an op that accepts its arguments"):
        verify(gm, "rewrite")


def test_malformed_graph_and_foreign_fakes() -> None:
    gm = canonical(Model(), torch.randn(3, 4))
    norm, linear = find(gm, aten.layer_norm.default), find(gm, aten.linear.default)
    val = norm.meta["val"]
    norm.meta["val"] = torch._subclasses.FakeTensorMode().from_tensor(torch.randn(3, 4))
    with pytest.raises(VerifyError, match="one fake mode"):
        verify(gm, "rewrite")
    norm.meta["val"] = val
    norm.append(linear)
    linear.append(norm)
    with pytest.raises(VerifyError, match="malformed"):
        verify(gm, "rewrite")


def test_what_was_checked_is_checked_again_when_it_changes() -> None:
    """A value, an argument, an argument's value, the autocast region: all that the outcome depends on."""
    gm = canonical(Model(), torch.randn(3, 4))
    norm, linear = find(gm, aten.layer_norm.default), find(gm, aten.linear.default)
    checked: Checked = {}

    def passes() -> bool:
        try:
            verify(gm, "rewrite", checked)
        except VerifyError:
            return False
        return True

    assert passes() and len(checked) >= 3
    reruns = dict(checked)
    assert passes() and all(checked[node] is reruns[node] for node in reruns), "nothing is run twice"
    good, arguments = norm.meta["val"], norm.args
    norm.meta["val"] = good.double()
    assert not passes()
    norm.meta["val"] = good
    norm.args = (norm.args[0], [5], *norm.args[2:])
    assert not passes()
    norm.args = arguments
    weight = linear.args[1]
    kept = weight.meta["val"]
    with kept.fake_mode:
        weight.meta["val"] = torch.empty(5, 4)
    assert not passes()
    weight.meta["val"] = kept
    assert passes()
    region = next(node for node in gm.graph.nodes if "enter_autocast" in str(node.target))
    region.args = ("cpu", torch.float16, *region.args[2:])
    assert not passes()
