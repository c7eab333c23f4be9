"""Folds of values that the graph computes late: expressions of parameters alone move up, nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_float64
from torch import Tensor, nn
from torch.fx import Graph, Node, symbolic_trace
from torch.nn import functional as F

from normfx.errors import NormfxError
from normfx.graph.order import Order
from normfx.report import Report

IDS = torch.arange(8).reshape(2, 4)
Scale = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """x + scale(write(norm(x))), then a norm read by a linear."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale
        self.table, self.norm, self.final = nn.Embedding(10, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.write, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.gamma, self.places = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(4, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places
        x = x + self.scale(self, self.write(torch.relu(self.up(self.norm(x)))))
        return self.head(self.final(x))


def _check(model: nn.Module, *inputs: Tensor) -> Report:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return assert_same_float64(model.eval(), inputs)


def _constant(block: Block, h: Tensor) -> Tensor:
    return h * torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5, 2.0, 0.25, 1.0], dtype=h.dtype)


def _shared(block: Block, h: Tensor) -> Tensor:
    """λ is read again after the fold, where it was."""
    scale = 1.0 + block.gamma
    return h * scale + torch.tanh(scale).mean()


def _normed(block: Block, h: Tensor) -> Tensor:
    return h * F.layer_norm(block.gamma, (8,))


def _split(block: Block, h: Tensor) -> Tensor:
    return h * torch.cat([block.gamma, block.gamma.exp()]).chunk(2)[1]


LATE: dict[str, Scale] = {
    "sum": lambda block, h: h * (1.0 + block.gamma),
    "view": lambda block, h: h * block.gamma.view(1, 1, -1),
    "exp": lambda block, h: h * block.gamma.exp(),
    "clone": lambda block, h: h * block.gamma.clone(),
    "chain": lambda block, h: h * (torch.sigmoid(block.gamma.clone().view(1, 1, -1)) * 2.0 - block.places[0]),
    "of a product": lambda block, h: h * (block.write.weight @ block.up.weight).diagonal(),
    "after a view": lambda block, h: h.unflatten(1, (2, 2)).flatten(1, 2) * (1.0 + block.gamma),
    "constant": _constant,
    "shared": _shared,
    "normed": _normed,
    "split": _split,
}


@pytest.mark.parametrize("name", LATE)
def test_an_expression_of_parameters_moves_before_the_linear_it_is_folded_into(name: str) -> None:
    report = _check(Block(LATE[name]), IDS)
    assert report.counts["to_rms_norm"] == 2 + (name == "normed") and report.counts["centrings"] == 0


def _without_gradient(block: Block, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 1.0 + block.gamma
    return h * scale


def _written(block: Block, h: Tensor) -> Tensor:
    scale = block.gamma.clone()
    scale[:4].mul_(2.0)
    return h * (scale + 1.0)


def _written_from_data(block: Block, h: Tensor) -> Tensor:
    scale = block.gamma.clone()
    scale.view(2, 4)[0].add_(h.mean())
    return h * scale.exp()


def _drawn(block: Block, h: Tensor) -> Tensor:
    return h * F.dropout(block.gamma, 0.5, training=True)


@pytest.mark.parametrize("scale", [_without_gradient, _written, _written_from_data, _drawn])
def test_what_would_be_another_value_there_stays(scale: Scale) -> None:
    report = _check(Block(scale), IDS)
    assert [r.code for r in report.sites[1].refusals] == ["uncentred_input"]


class Reads(nn.Module):
    """A norm read by a linear whose weight is `compose(W, x)`."""

    def __init__(self, compose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compose, self.norm, self.weight = compose, nn.LayerNorm(8), nn.Parameter(torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.compose(self.weight, x))


def _written_rows(weight: Tensor, x: Tensor) -> Tensor:
    copy = weight.clone()
    copy[:2].mul_(x.mean())
    return copy + 0.5


def _masked_view(weight: Tensor, x: Tensor) -> Tensor:
    copy = weight.clone()
    copy.view(-1)[:5].fill_(0.0)
    return copy * 2.0


@pytest.mark.parametrize("compose", [_written_rows, _masked_view])
def test_a_weight_written_through_a_view_is_no_value_of_parameters_alone(
    compose: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Kept, it would be computed without the write; computed in each call, it takes γ after the write."""
    (site,) = _check(Reads(compose), torch.randn(2, 5, 8)).sites
    assert [r.code for r in site.refusals if r.rule == "fold_affine"] == ["computed_weight"]
    (site,) = _check(Reads(compose), torch.randn(200, 5, 8)).sites
    assert "fold_affine" in site.rules


class LateGain(nn.Module):
    """The sum that a norm reads is read before the norm's weight and bias are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.gain, self.shift = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = x + self.write(x)
        early = torch.tanh(s)
        return F.layer_norm(s, (8,), 1.0 + self.gain, self.shift.exp()), early


def test_the_vectors_of_a_norm_move_before_the_sum_it_is_fused_with() -> None:
    report = _check(LateGain(), torch.randn(2, 4, 8))
    assert report.counts["fuse_residual_norm"] == 1


def _named(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def test_an_edit_that_cannot_be_ordered_is_an_error() -> None:
    """Never a graph in which a value is read before it is computed."""
    graph = symbolic_trace(lambda x, w: (x.sin(), w.cos())).graph
    order, place = Order(graph), _named(graph, "sin")
    assert not order.can_lift(_named(graph, "cos"), place)  # a method call, of which nothing is known
    with pytest.raises(NormfxError, match="cos cannot move before it"):
        order.lift(_named(graph, "cos"), place)
