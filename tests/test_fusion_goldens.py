"""Fused norms: graphs that someone has read. test_fusion.py proves the same models in float64."""

from __future__ import annotations

from equivalence import transformed
from excerpts import excerpt
from expecttest import TestCase
from test_fusion import Net, ids


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
%5 = linear(%6, %3, %4): f32[2, 5, 8]
%7, %8 = norm_add_norm(%5, %1, outs.0.weight, outs.0.bias, norms.1.weight, bias=norms.1.bias, inner=rms_norm, outer=rms_norm, inner_eps=1e-05, inner_centre_output=True, dim=2, eps=1e-05): f32[2, 5, 8], f32[2, 5, 8]  # norms.1
%9 = center(writes.1.weight, dim=0): f32[8, 8]
%10 = center(writes.1.bias, dim=0): f32[8]
%11 = linear(%12, %9, %10): f32[2, 5, 8]
%13, %14 = norm_add_norm(%11, %8, outs.1.weight, outs.1.bias, norms.2.weight, bias=norms.2.bias, inner=rms_norm, outer=rms_norm, inner_eps=1e-05, inner_centre_output=True, dim=2, eps=1e-05): f32[2, 5, 8], f32[2, 5, 8]  # norms.2
%15 = center(writes.2.weight, dim=0): f32[8, 8]
%16 = center(writes.2.bias, dim=0): f32[8]
%17 = linear(%18, %15, %16): f32[2, 5, 8]
%19 = norm_add_norm(%17, %14, outs.2.weight, outs.2.bias, final.weight, bias=final.bias, inner=rms_norm, outer=rms_norm, inner_eps=1e-05, inner_centre_output=True, dim=2, eps=1e-05): f32[2, 5, 8]  # final
%20 = linear(%19, head.weight, head.bias): f32[2, 5, 3]
return [%20]
""",
        )

    def test_a_stream_behind_a_norm(self) -> None:
        _, report = transformed(Net("mix"), ids())
        self.assertExpectedInline(
            excerpt(report.graphs[0].after),
            """\
%0 = embedding(table.weight, ids): f32[2, 5, 8]
%1 = linear(%2, writes.0.weight, writes.0.bias): f32[2, 5, 8]
%3 = add_layer_norm(%0, %1, norms.0.weight, bias=norms.0.bias, dim=2, eps=1e-05, centre_output=True): f32[2, 5, 8]  # norms.0
%4 = rms_norm(%3, norms.1.weight, bias=norms.1.bias, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.1
%5 = center(writes.1.weight, dim=0): f32[8, 8]
%6 = center(writes.1.bias, dim=0): f32[8]
%7 = linear(%8, %5, %6): f32[2, 5, 8]
%9, %10 = add_rms_norm(%3, %7, norms.2.weight, bias=norms.2.bias, dim=2, eps=1e-05): f32[2, 5, 8], f32[2, 5, 8]  # norms.2
%11 = center(writes.2.weight, dim=0): f32[8, 8]
%12 = center(writes.2.bias, dim=0): f32[8]
%13 = linear(%14, %11, %12): f32[2, 5, 8]
%15 = add_rms_norm(%10, %13, dim=2, eps=1e-05): f32[2, 5, 8]  # final
%16 = fold_shift(head.weight, final.bias, bias=head.bias, dim=1): f32[3]
%17 = scale_features(head.weight, final.weight, dim=1): f32[3, 8]
%18 = linear(%15, %17, %16): f32[2, 5, 3]
return [%18]
""",
        )

    def test_deep_norm(self) -> None:
        _, report = transformed(Net("deep"), ids())
        self.assertExpectedInline(
            excerpt(report.graphs[0].after),
            """\
%0 = embedding(table.weight, ids): f32[2, 5, 8]
%1 = linear(%2, writes.0.weight, writes.0.bias): f32[2, 5, 8]
%3 = add_layer_norm(%1, %0, norms.0.weight, bias=norms.0.bias, alpha=1.7, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.0
%4 = linear(%5, writes.1.weight, writes.1.bias): f32[2, 5, 8]
%6 = add_layer_norm(%4, %3, norms.1.weight, bias=norms.1.bias, alpha=1.7, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.1
%7 = linear(%8, writes.2.weight, writes.2.bias): f32[2, 5, 8]
%9 = add_layer_norm(%7, %6, alpha=1.7, dim=2, eps=1e-05): f32[2, 5, 8]  # norms.2
%10 = fold_shift(head.weight, norms.2.bias, bias=head.bias, dim=1): f32[3]
%11 = scale_features(head.weight, norms.2.weight, dim=1): f32[3, 8]
%12 = linear(%9, %11, %10): f32[2, 5, 3]
return [%12]
""",
        )
