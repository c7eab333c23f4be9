"""Fused norms: graphs that someone has read. test_fuse_residual_norm.py proves the same models in float64."""

from __future__ import annotations

from equivalence import transformed
from excerpts import excerpt
from expecttest import TestCase
from test_fuse_residual_norm import Net, ids


class Goldens(TestCase):
    maxDiff = None

    def test_sandwich_norms_on_a_stream(self) -> None:
        _, report = transformed(Net("peri"), ids(), {"rules": "default,-fold_affine"})
        self.assertExpectedInline(
            excerpt(report.graphs[0].after),
            """\
%0 = embedding(table.weight, ids): f32[2, 5, 8]
%1 = center(%0, dim=2): f32[2, 5, 8]
%2 = rms_norm(%1, norms.0.weight, bias=norms.0.bias, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.0
%3 = center(writes.0.weight, dim=0): f32[8, 8]
%4 = center(writes.0.bias, dim=0): f32[8]
%5 = linear(<tanh>, %3, %4): f32[2, 5, 8]
%6, %7 = norm_add_norm(%5, %1, outs.0.weight, outs.0.bias, norms.1.weight, bias=norms.1.bias, inner=rms_norm, outer=rms_norm, inner_eps=1e-05, inner_centre_output=True, dim=2, eps=1e-05): f32[2, 5, 8], f32[2, 5, 8]  # norms.1
%8 = center(writes.1.weight, dim=0): f32[8, 8]
%9 = center(writes.1.bias, dim=0): f32[8]
%10 = linear(<tanh>, %8, %9): f32[2, 5, 8]
%11, %12 = norm_add_norm(%10, %7, outs.1.weight, outs.1.bias, norms.2.weight, bias=norms.2.bias, inner=rms_norm, outer=rms_norm, inner_eps=1e-05, inner_centre_output=True, dim=2, eps=1e-05): f32[2, 5, 8], f32[2, 5, 8]  # norms.2
%13 = center(writes.2.weight, dim=0): f32[8, 8]
%14 = center(writes.2.bias, dim=0): f32[8]
%15 = linear(<tanh>, %13, %14): f32[2, 5, 8]
%16 = norm_add_norm(%15, %12, outs.2.weight, outs.2.bias, final.weight, bias=final.bias, inner=rms_norm, outer=rms_norm, inner_eps=1e-05, inner_centre_output=True, dim=2, eps=1e-05): f32[2, 5, 8]  # final
%17 = linear(%16, head.weight, head.bias): f32[2, 5, 3]
return [%17]
""",
        )

    def test_a_stream_behind_a_norm(self) -> None:
        _, report = transformed(Net("mix"), ids())
        self.assertExpectedInline(
            excerpt(report.graphs[0].after),
            """\
%0 = embedding(table.weight, ids): f32[2, 5, 8]
%1 = linear(<tanh>, writes.0.weight, writes.0.bias): f32[2, 5, 8]
%2 = add_layer_norm(%0, %1, norms.0.weight, bias=norms.0.bias, dim=2, eps=1e-05, centre_output=True): f32[2, 5, 8]  # norms.0
%3 = rms_norm(%2, norms.1.weight, bias=norms.1.bias, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.1
%4 = center(writes.1.weight, dim=0): f32[8, 8]
%5 = center(writes.1.bias, dim=0): f32[8]
%6 = linear(<tanh>, %4, %5): f32[2, 5, 8]
%7, %8 = add_rms_norm(%2, %6, norms.2.weight, bias=norms.2.bias, dim=2, eps=1e-05): f32[2, 5, 8], f32[2, 5, 8]  # norms.2
%9 = center(writes.2.weight, dim=0): f32[8, 8]
%10 = center(writes.2.bias, dim=0): f32[8]
%11 = linear(<tanh>, %9, %10): f32[2, 5, 8]
%12 = add_rms_norm(%8, %11, dim=2, eps=1e-05): f32[2, 5, 8]  # final
%13 = fold_shift(head.weight, final.bias, bias=head.bias, dim=1): f32[3]
%14 = scale_features(head.weight, final.weight, dim=1): f32[3, 8]
%15 = linear(%12, %14, %13): f32[2, 5, 3]
return [%15]
""",
        )

    def test_deep_norm(self) -> None:
        _, report = transformed(Net("deep"), ids())
        self.assertExpectedInline(
            excerpt(report.graphs[0].after),
            """\
%0 = embedding(table.weight, ids): f32[2, 5, 8]
%1 = linear(<tanh>, writes.0.weight, writes.0.bias): f32[2, 5, 8]
%2 = add_layer_norm(%1, %0, norms.0.weight, bias=norms.0.bias, alpha=1.7, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.0
%3 = linear(<tanh>, writes.1.weight, writes.1.bias): f32[2, 5, 8]
%4 = add_layer_norm(%3, %2, norms.1.weight, bias=norms.1.bias, alpha=1.7, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.1
%5 = linear(<tanh>, writes.2.weight, writes.2.bias): f32[2, 5, 8]
%6 = add_layer_norm(%5, %4, alpha=1.7, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.2
%7 = fold_shift(head.weight, norms.2.bias, bias=head.bias, dim=1): f32[3]
%8 = scale_features(head.weight, norms.2.weight, dim=1): f32[3, 8]
%9 = linear(%6, %8, %7): f32[2, 5, 3]
return [%9]
""",
        )
