"""Generated kernels as text. Update with EXPECTTEST_ACCEPT=1 and read the difference."""

from __future__ import annotations

import unittest

import expecttest

from normfx.kernels.launch import backward_launch, forward_launch
from normfx.kernels.source import backward_source, forward_source
from normfx.kernels.spec import Spec


class Sources(expecttest.TestCase):
    def test_add_rms_norm_forward(self) -> None:
        spec = Spec(4096, False, "bfloat16", "bfloat16", residual="bfloat16", sum="bfloat16")
        self.assertExpectedInline(
            forward_source(spec, forward_launch(spec), True).text,
            """\
\"\"\"add_rms_norm_4096(width=4096, centre=False, x=bfloat16, out=bfloat16, residual=bfloat16, sum=bfloat16)

one row of 4096, 16 entries a thread; 8 warps.\"\"\"

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_4096_forward(
    x_ptr, residual_ptr, sum_ptr, out_ptr, rstd_ptr, rows, x_stride, residual_stride, sum_stride, out_stride,
    eps,
):
    eps = tl.cast(eps, tl.float32)
    cols = tl.arange(0, 4096)
    row = tl.cast(tl.program_id(0), tl.int64)
    x = tl.load(x_ptr + row * x_stride + cols).to(tl.float32)
    x += tl.load(residual_ptr + row * residual_stride + cols).to(tl.float32)
    rounded = x.to(tl.bfloat16)  # the norm is of the sum that is stored
    tl.store(sum_ptr + row * sum_stride + cols, rounded)
    x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / 4096 + eps)
    y = x * rstd
    tl.store(out_ptr + row * out_stride + cols, y)
    tl.store(rstd_ptr + row, rstd)
""",
        )

    def test_layer_norm_backward(self) -> None:
        spec = Spec(1000, True, "bfloat16", "bfloat16", weight="float32", bias="float32")
        self.assertExpectedInline(
            backward_source(spec, backward_launch(spec), False).text,
            """\
\"\"\"layer_norm_1000(width=1000, centre=True, x=bfloat16, out=bfloat16, weight=float32, bias=float32)

2 rows of 1024, 16 entries a thread; 4 warps.\"\"\"

import triton
import triton.language as tl


@triton.jit
def layer_norm_1000_backward(
    out_grad_ptr, saved_ptr, weight_ptr, mean_ptr, rstd_ptr, x_grad_ptr, weight_sums_ptr, bias_sums_ptr, rows,
    out_grad_stride, saved_stride, x_grad_stride,
):
    cols = tl.arange(0, 1024)[None, :]
    real = cols < 1000
    weight_total = tl.zeros([2, 1024], tl.float32)
    bias_total = tl.zeros([2, 1024], tl.float32)
    gamma = tl.load(weight_ptr + cols, mask=real, other=0.0, eviction_policy='evict_last')
    for group in range(tl.program_id(0), tl.cdiv(rows, 2), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * 2 + tl.arange(0, 2)[:, None]
        inside = (row < rows) & real
        dy = tl.load(out_grad_ptr + row * out_grad_stride + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(saved_ptr + row * saved_stride + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        x = tl.where(real, (x - tl.load(mean_ptr + row, mask=row < rows, other=0.0).to(tl.float32)) * rstd, 0.0)
        weight_total += dy * x
        bias_total += dy
        dy *= gamma.to(tl.float32)
        projection = tl.sum(dy * x, 1, keep_dims=True) / 1000
        dx = (dy - x * projection - tl.sum(dy, 1, keep_dims=True) / 1000) * rstd
        tl.store(x_grad_ptr + row * x_grad_stride + cols, dx, mask=inside)
    tl.store(weight_sums_ptr + tl.program_id(0) * 1000 + cols, tl.sum(weight_total, 0, keep_dims=True), mask=real)
    tl.store(bias_sums_ptr + tl.program_id(0) * 1000 + cols, tl.sum(bias_total, 0, keep_dims=True), mask=real)
""",
        )

    def test_layer_norm_forward_in_pieces(self) -> None:
        spec = Spec(20000, True, "float32", "float32", weight="float32")
        self.assertExpectedInline(
            forward_source(spec, forward_launch(spec), False).text,
            """\
\"\"\"layer_norm_20000(width=20000, centre=True, x=float32, out=float32, weight=float32)

a row of 20000 does not fit into registers; 8 warps.\"\"\"

import triton
import triton.language as tl


@triton.jit
def layer_norm_20000_forward(
    x_ptr, weight_ptr, out_ptr, rows, x_stride, out_stride, eps,
):
    eps = tl.cast(eps, tl.float32)
    row = tl.cast(tl.program_id(0), tl.int64)
    mean = 0.0
    squares = 0.0
    for start in tl.range(0, 20000, 4096, loop_unroll_factor=1):
        cols = start + tl.arange(0, 4096)
        real = cols < 20000
        x = tl.load(x_ptr + row * x_stride + cols, mask=real, other=0.0).to(tl.float32)
        count = tl.cast(tl.minimum(20000 - start, 4096), tl.float32)
        own = tl.sum(x, 0) / count
        x = tl.where(real, x - own, 0.0)
        step = own - mean
        mean += step * (count / (start + count))
        squares += tl.sum(x * x, 0) + step * step * (start * count / (start + count))
    rstd = tl.rsqrt(squares / 20000 + eps)
    for start in tl.range(0, 20000, 4096, loop_unroll_factor=1):
        cols = start + tl.arange(0, 4096)
        real = cols < 20000
        x = tl.load(x_ptr + row * x_stride + cols, mask=real, other=0.0).to(tl.float32)
        x -= mean
        y = x * rstd
        y *= tl.load(weight_ptr + cols, mask=real, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_stride + cols, y, mask=real)
""",
        )


if __name__ == "__main__":
    unittest.main()
