"""More steps of random programs: norms whose γ and β are ops after them, norms over channels that convolutions read,
and streams that are joined and split again."""

from __future__ import annotations

import torch
from token_programs import WIDTH, At, Form
from torch import Tensor, nn
from torch.nn import functional as F


class Affine(nn.Module):
    """γ − 1 and β of a norm, something that computes γ from data, and readers: a linear and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))
        self.condition, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.patches, self.padded = nn.Conv1d(WIDTH, 4, 2, 2, groups=2), nn.Conv1d(WIDTH, 3, 3, padding=1, bias=False)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,)) * (self.gamma + 1.0) + self.beta

    def length(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-3) * WIDTH**0.5 * (self.gamma + 1.0)


class Pieces(nn.Module):
    """One product, pieces of which are normalised, and a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.product, self.read = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def run(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        mixed = F.layer_norm(first, (WIDTH,)) * F.layer_norm(second, (WIDTH,))
        out: Tensor = self.read(mixed * third)
        return out


def _pieces(at: At) -> Tensor:
    out: Tensor = at.part.run(*at.part.product(at.x).chunk(3, -1))
    return out


def _picked(at: At) -> Tensor:
    """Every third feature belongs to one piece; two are normalised, one of which is read as it is, too."""
    pieces = at.part.product(at.x).unflatten(-1, (WIDTH, 3)).movedim(-1, 0)
    out: Tensor = at.part.run(pieces[0], pieces[1], pieces[2]) + at.part.read(pieces[1])
    return out


def _twice(at: At) -> Tensor:
    """One norm without affine, of which two values are made."""
    bare = F.layer_norm(at.x, (WIDTH,))
    out: Tensor = at.part.read(bare * at.part.gamma) + at.part.read(bare * at.part.beta)
    return out


def _halves(at: At) -> Tensor:
    first, second = torch.cat([at.x, at.first], -1).chunk(2, -1)
    return first + torch.tanh(at.part(second))


def _reversible(at: At) -> Tensor:
    first, second = torch.cat([at.x, at.last[0]], -1).chunk(2, -1)
    first = first + at.part.norm(second)
    first, second = torch.cat([first, second], -1).split(WIDTH, -1)
    return first - second * 0.5


NORM_OPS: dict[str, Form] = {
    "halves": Form(_halves, lambda: nn.Linear(WIDTH, WIDTH)),
    "reversible": Form(_reversible, Affine),
    "post_affine": Form(lambda at: at.part.norm(at.x + torch.sin(at.first)), Affine),
    "length_branch": Form(lambda at: at.x + at.part.condition(at.part.length(at.x)), Affine),
}
"""What becomes of a stream, other than a norm's readers."""

KEEP_A_MEAN = frozenset({"halves", "post_affine", "length_branch"})
"""Steps among NORM_OPS that keep a mean: an activation enters that only the running model could centre, or an RMSNorm
reads the mean."""

NORM_OBSERVERS: dict[str, Form] = {
    "affine_after": Form(lambda at: at.part.read(at.part.norm(at.x)), Affine),
    "length_after": Form(lambda at: at.part.read(at.part.length(at.x)), Affine),
    "affine_of_data": Form(lambda at: at.part.read(F.layer_norm(at.x, (WIDTH,)) * at.part.condition(at.first)), Affine),
    "affine_twice": Form(_twice, Affine),
    "pieces": Form(_pieces, Pieces),
    "picked": Form(_picked, Pieces),
    "norm_patches": Form(lambda at: at.part.patches(at.part.norm(at.x).transpose(1, 2)), Affine),
    "norm_padded": Form(lambda at: at.part.padded(at.part.length(at.x).transpose(1, 2)), Affine),
    "norm_padded_shift": Form(lambda at: at.part.padded(at.part.norm(at.x).transpose(1, 2)), Affine),
}
"""Readers of a norm on the stream, as outputs of the program."""

FORMS = NORM_OPS | NORM_OBSERVERS
