"""Values of views follow what they are views of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from normfx.checks.verify import verify
from normfx.errors import VerifyError
from normfx.graph.aliasing import mutated, storages_of
from normfx.graph.calls import add_call
from normfx.graph.views import settle

aten = torch.ops.aten


def traced(f: Any) -> GraphModule:
    gm = make_fx(f, tracing_mode="fake", pre_dispatch=True)(torch.ones(2, 6))
    assert isinstance(gm, GraphModule)
    return gm


def replaced(gm: GraphModule) -> Node:
    """Replaces the product in a graph by a sum."""
    (old,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    with gm.graph.inserting_before(old):
        new = add_call(gm.graph, aten.add.Tensor, (old.args[0], old.args[0]), old)
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
    return new


def chain(x: Tensor) -> Tensor:
    return (x * 2).view(3, 4).transpose(0, 1).reshape(4, 3).relu()


def pieces(x: Tensor) -> Tensor:
    one, two = (x * 2).chunk(2)
    return one.unsqueeze(0).expand(5, 1, 6).relu() + two.select(1, 0).relu()


@pytest.mark.parametrize("f", [chain, pieces])
def test_views_are_renewed(f: Any) -> None:
    gm = traced(f)
    new = replaced(gm)
    views = [n for n in gm.graph.nodes if "view" in str(n.target) or "transpose" in n.name or "expand" in n.name]
    views += [n for n in gm.graph.nodes if "getitem" in n.name or "select" in n.name or "reshape" in n.name]
    assert views and not any(storages_of(gm.graph)[new] & storages_of(gm.graph)[view] for view in views)
    with pytest.raises(VerifyError, match="expected a view of its operand, found a value that shares no memory"):
        verify(gm, "rewrite")
    settle(gm)
    assert all(storages_of(gm.graph)[new] & storages_of(gm.graph)[view] for view in views)
    verify(gm, "rewrite")


def test_a_write_through_a_view_is_seen() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.view(12).add_(1)
        return y + 0

    gm = traced(f)
    new = replaced(gm)
    assert new not in mutated(gm.graph)
    settle(gm)
    assert new in mutated(gm.graph)


def test_what_is_written_in_place_is_its_operand() -> None:
    gm = traced(lambda x: (x * 2).t_().add_(1).relu())
    new = replaced(gm)
    (turned,) = gm.graph.find_nodes(op="call_function", target=aten.t_.default)
    settle(gm)
    assert storages_of(gm.graph)[turned] == storages_of(gm.graph)[new] and new in mutated(gm.graph)
    assert new.meta["val"].shape == (2, 6) and turned.meta["val"].shape == (6, 2)
    verify(gm, "rewrite")


def test_copies_stay_copies() -> None:
    gm = traced(lambda x: (x * 2).t().reshape(12).relu())
    (copy,) = gm.graph.find_nodes(op="call_function", target=aten.reshape.default)
    before = copy.meta["val"]
    replaced(gm)
    settle(gm)
    assert copy.meta["val"] is before
