"""A small pre-norm stream, compressed in each basis: graphs that someone has read."""

from __future__ import annotations

import torch
from equivalence import assert_same_float64, transformed
from excerpts import excerpt
from expecttest import TestCase
from torch import nn


class Residual(nn.Module):
    """One pre-norm branch over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.final = nn.Embedding(10, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids).reshape(-1, 8)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        out: torch.Tensor = self.head(self.final(x))
        return out


def compressed(**options: str) -> str:
    torch.manual_seed(0)
    model, inputs = Residual(), (torch.arange(6).reshape(2, 3),)
    given = {"rules": "default,+crms_norm", "fold": "live", "crms_width": "exact", **options}
    assert_same_float64(model, inputs, given)
    report = transformed(model, inputs, given)[1]
    assert all("crms_norm" in site.rules for site in report.sites)
    return excerpt(report.graphs[0].after)


class Goldens(TestCase):
    maxDiff = None

    def test_crms_norm_in_an_orthonormal_basis(self) -> None:
        self.assertExpectedInline(
            compressed(),
            """\
%0 = embedding(table.weight, ids): f32[2, 3, 8]
%1 = compress(%0, dim=2, basis=orthonormal, channel=2, width=7): f32[2, 3, 7]
%2 = rms_norm(<reshape>, dim=1, eps=1e-05, correction=-1): f32[6, 7]  # norm
%3 = fold_shift(up.weight, norm.bias, bias=up.bias, dim=1): f32[6]
%4 = scale_features(up.weight, norm.weight, dim=1): f32[6, 8]
%5 = compress_input(%4, dim=1, basis=orthonormal, channel=2, width=7): f32[6, 7]
%6 = linear(%2, %5, %3): f32[6, 6]
%7 = compress(down.weight, dim=0, basis=orthonormal, channel=2, width=7): f32[7, 6]
%8 = compress(down.bias, dim=0, basis=orthonormal, channel=2, width=7): f32[7]
%9 = linear(<relu>, %7, %8): f32[6, 7]
%10 = add_rms_norm(<reshape>, %9, dim=1, eps=1e-05, correction=-1): f32[6, 7]  # final
%11 = fold_shift(head.weight, final.bias, bias=head.bias, dim=1): f32[3]
%12 = scale_features(head.weight, final.weight, dim=1): f32[3, 8]
%13 = compress_input(%12, dim=1, basis=orthonormal, channel=2, width=7): f32[3, 7]
%14 = linear(%10, %13, %11): f32[6, 3]
return [%14]
""",
        )

    def test_crms_norm_without_a_channel_padded(self) -> None:
        self.assertExpectedInline(
            compressed(crms_basis="drop", crms_width="padded"),
            """\
%0 = embedding(table.weight, ids): f32[2, 3, 8]
%1 = compress(%0, dim=2, basis=drop, channel=5, width=8): f32[2, 3, 8]
%2 = crms_norm(<reshape>, dim=1, eps=1e-05): f32[6, 8]  # norm
%3 = fold_shift(up.weight, norm.bias, bias=up.bias, dim=1): f32[6]
%4 = scale_features(up.weight, norm.weight, dim=1): f32[6, 8]
%5 = compress_input(%4, dim=1, basis=drop, channel=5, width=8): f32[6, 8]
%6 = linear(%2, %5, %3): f32[6, 6]
%7 = compress(down.weight, dim=0, basis=drop, channel=5, width=8): f32[8, 6]
%8 = compress(down.bias, dim=0, basis=drop, channel=5, width=8): f32[8]
%9 = linear(<relu>, %7, %8): f32[6, 8]
%10 = add_crms_norm(<reshape>, %9, dim=1, eps=1e-05): f32[6, 8]  # final
%11 = fold_shift(head.weight, final.bias, bias=head.bias, dim=1): f32[3]
%12 = scale_features(head.weight, final.weight, dim=1): f32[3, 8]
%13 = compress_input(%12, dim=1, basis=drop, channel=5, width=8): f32[3, 8]
%14 = linear(%10, %13, %11): f32[6, 3]
return [%14]
""",
        )
