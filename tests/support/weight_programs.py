"""More steps of random programs: weights computed late, written in place or stored as codes; writes that promote."""

from __future__ import annotations

import torch
from token_programs import TOKENS, WIDTH, At, Form
from torch import Tensor, nn
from torch.nn import functional as F


class Coded(nn.Module):
    """A weight in several pieces: codes and their scale, a low-rank product and scattered values; a norm."""

    codes: Tensor
    zeros: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.norm = nn.LayerNorm(WIDTH)
        self.weight, self.scale = nn.Parameter(torch.empty(WIDTH, WIDTH)), nn.Parameter(torch.empty(WIDTH))
        self.left, self.right = nn.Parameter(torch.empty(WIDTH, 2)), nn.Parameter(torch.empty(2, WIDTH))
        self.values = nn.Parameter(torch.empty(9))
        self.register_buffer("codes", torch.randint(-9, 9, (WIDTH, WIDTH), generator=draw).to(torch.int8))
        self.register_buffer("zeros", torch.randint(-2, 3, (WIDTH, 1), generator=draw).to(torch.int8))
        self.register_buffer("places", torch.randperm(WIDTH * WIDTH, generator=draw)[:9])


def _write(at: At) -> Tensor:
    return at.part(torch.sin(at.first))


def _constant(at: At) -> Tensor:
    return at.x + _write(at) * torch.tensor([1.0, -2.0, 3.0, 0.5, 1.5, 2.0, 0.25, 1.0], dtype=at.x.dtype)


def _late_chain(at: At) -> Tensor:
    """λ is a long expression, and read again after the product."""
    written = _write(at)
    scale = torch.sigmoid(at.vector.clone().view(1, 1, -1)) * 2.0 - at.part.bias
    return at.x + written * scale + torch.sin(at.first.mean(-1, keepdim=True)) * scale.mean()


def _composed_scale(at: At) -> Tensor:
    return at.x + F.linear(torch.sin(at.first), at.part.weight) * (at.part.left @ at.part.right).diagonal()


def _scattered(at: At) -> Tensor:
    low = (at.part.left @ at.part.right).view(-1)
    weight = low.scatter_add(0, at.part.places, at.part.values).view(WIDTH, WIDTH)
    return at.x + F.linear(torch.cos(at.first), weight)


def _signed(at: At) -> Tensor:
    signs = (at.part.weight.diagonal() > 0).int() * 2 - 1
    return at.x + F.linear(torch.cos(at.first), at.part.weight * signs)


def _zero_point(at: At) -> Tensor:
    return at.x + F.linear(torch.cos(at.first), (at.part.weight - at.part.zeros) * at.part.scale[:, None])


def _promoted_gate(at: At) -> Tensor:
    """The first write stores float64 in float32; gradients would be rounded so too, hence none."""
    gate = at.ids.float() * 0.25
    gate.mul_(at.vector.detach())
    gate.add_(1.0)
    gate -= at.vector.detach() * 0.5
    return at.x * gate.unsqueeze(-1)


def _promoted_counts(at: At) -> Tensor:
    count = at.ids.int() + 0
    count.mul_(at.ids > 2).add_(at.ids)
    count -= at.flag.long()
    return at.x * (count.unsqueeze(-1) + 1) * 0.25


def _promoted_then_viewed(at: At) -> Tensor:
    gate = at.ids.float() * 0.25
    gate.mul_(at.vector.detach())
    gate[:1].add_(at.vector.detach())
    return at.x * gate.add_(0.5).unsqueeze(-1)


def _made(at: At) -> Tensor:
    """A weight that needs an identity and zeros: Cayley's map of a skew matrix."""
    skew = torch.cat([at.part.weight[:1] * 0.1, torch.zeros(WIDTH - 1, WIDTH, dtype=at.x.dtype)])
    skew = skew - skew.t()
    unit = torch.eye(WIDTH, dtype=at.x.dtype)
    return at.x + F.linear(torch.sin(at.first), torch.linalg.solve(unit + skew, unit - skew))


def _rounded(at: At) -> Tensor:
    """A quantiser through which gradients pass straight."""
    weight = at.part.weight
    return at.x + F.linear(torch.sin(at.first), weight + ((weight * 8).round() / 8 - weight).detach())


WEIGHT_OPS: dict[str, Form] = {
    "made_weight": Form(_made, Coded),
    "rounded_weight": Form(_rounded, Coded),
    "late_scale": Form(lambda at: at.x + _write(at) * (1.0 + at.vector), lambda: nn.Linear(WIDTH, WIDTH), (WIDTH,)),
    "late_exp": Form(lambda at: at.x - _write(at) * at.vector.exp().clone(), lambda: nn.Linear(WIDTH, WIDTH), (WIDTH,)),
    "late_view": Form(
        lambda at: at.x + _write(at) * at.vector.view(1, 1, -1), lambda: nn.Linear(WIDTH, WIDTH), (WIDTH,)
    ),
    "late_chain": Form(_late_chain, lambda: nn.Linear(WIDTH, WIDTH), (WIDTH,)),
    "late_constant": Form(_constant, lambda: nn.Linear(WIDTH, WIDTH)),
    "late_product": Form(_composed_scale, Coded),
    "scattered_weight": Form(_scattered, Coded),
    "signed_weight": Form(_signed, Coded),
    "zero_point": Form(_zero_point, Coded),
    "promoted_gate": Form(_promoted_gate, shape=(TOKENS,)),
    "promoted_counts": Form(_promoted_counts),
    "promoted_then_viewed": Form(_promoted_then_viewed, shape=(TOKENS,)),
}
"""A centred stream passes these, or they write to it."""


def _written_weight(at: At) -> Tensor:
    weight = at.part.weight.clone()
    weight[:2].mul_(at.first.mean())
    return at.x + F.linear(torch.sin(at.first), weight + 0.5)


def _written_scale(at: At) -> Tensor:
    scale = at.vector.clone()
    written = _write(at)
    scale.view(2, -1)[0].add_(1.0)
    return at.x + written * scale.exp()


def _coded(at: At) -> Tensor:
    return at.x + F.linear(torch.sin(at.first), at.part.codes.to(at.x.dtype) * (at.part.scale[:, None] * 0.1))


def _coded_output(at: At) -> Tensor:
    return at.x + F.linear(torch.sin(at.first), at.part.codes.to(at.x.dtype)) * (at.part.scale * 0.1)


WEIGHT_TRAPS: dict[str, Form] = {
    "written_weight": Form(_written_weight, Coded),
    "written_scale": Form(_written_scale, lambda: nn.Linear(WIDTH, WIDTH), (WIDTH,)),
    "coded_weight": Form(_coded, Coded),
    "coded_output": Form(_coded_output, Coded),
}
"""Their weights cannot be folded: they are written through a view, or packed."""


def _late_affine(at: At) -> Tensor:
    """The sum that a norm reads is read before the norm's weight is computed."""
    total = at.x + at.part(torch.sin(at.first))
    early = torch.tanh(total)
    return F.layer_norm(total, (WIDTH,), 1.0 + at.vector, at.vector.exp()) + early


def _read_written(at: At) -> Tensor:
    weight = at.part.weight.clone()
    weight.view(-1)[:9].copy_(at.part.values)
    return F.linear(at.part.norm(at.x), weight * 2.0)


WEIGHT_OBSERVERS: dict[str, Form] = {
    "read_einsum": Form(lambda at: torch.einsum("...d,hd->...h", at.part.norm(at.x), at.part.weight), Coded),
    "read_heads": Form(
        lambda at: torch.einsum("btd,dhk->hbkt", at.part.norm(at.x), at.part.weight.view(WIDTH, 2, -1)), Coded
    ),
    "read_tensordot": Form(
        lambda at: torch.tensordot(at.part.weight.view(WIDTH, 2, -1), at.part.norm(at.x), ([0], [2])), Coded
    ),
    "read_columns": Form(lambda at: at.part.weight @ at.part.norm(at.x).transpose(-1, -2), Coded),
    "read_queries": Form(
        lambda at: torch.einsum("td,sd->ts", at.part.norm(at.x)[0], at.part.norm(torch.cos(at.x))[0]), Coded
    ),
    "late_affine": Form(_late_affine, lambda: nn.Linear(WIDTH, WIDTH), (WIDTH,)),
    "read_coded": Form(lambda at: F.linear(at.part.norm(at.x), at.part.codes * (at.part.scale[:, None] * 0.1)), Coded),
    "read_coded_output": Form(
        lambda at: F.linear(at.part.norm(at.x), at.part.codes.to(at.x.dtype)) * (at.part.scale * 0.1), Coded
    ),
    "read_written_weight": Form(_read_written, Coded),
}
"""Readers of the stream or of a norm on it, as outputs of the program."""

FORMS = WEIGHT_OPS | WEIGHT_TRAPS | WEIGHT_OBSERVERS
