"""The lines of backward kernels: of dx, of the sums over rows (dγ, dβ, Σds) with it, or of these sums by columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .launch import Launch
from .rows import Rows
from .spec import Spec


def backward_rows(r: Rows, sum_grad: bool) -> Iterator[str]:
    """
    x̂ = (s − mean)·rstd,  g = k·γ ⊙ dy,  ds = rstd·(g − x̂·Σ(g x̂)/divisor − mean g) + the sum's own gradient
    """
    spec, launch, sums = r.spec, r.launch, r.spec.sums
    shape = f"[{launch.rows}, {launch.block}]" if r.several else f"[{launch.block}]"
    yield from r.columns()
    for name in sums:
        yield f"{name}_total = tl.zeros({shape}, tl.float32)"
    indent = ""
    if launch.persistent:
        groups = f"tl.program_id(0), tl.cdiv(rows, {launch.rows}), tl.num_programs(0)"
        if launch.keeps and spec.weight:
            yield from r.keep_gamma()
        stages = f", num_stages={launch.stages}" if launch.stages > 1 else ""
        yield f"for group in {'tl.range' if stages else 'range'}({groups}{stages}):"
        indent = "    "
    for line in _backward_row(r, sum_grad, "group" if launch.persistent else "tl.program_id(0)"):
        yield indent + line
    for name in sums:
        yield r.store(
            f"{name}_sums",
            f"tl.program_id(0) * {spec.entries} + cols",
            f"tl.sum({name}_total, 0, keep_dims=True)" if r.several else f"{name}_total",
            r.column_mask,
        )


def _backward_row(r: Rows, sum_grad: bool, group: str) -> Iterator[str]:
    spec = r.spec
    yield from r.row(group)
    yield f"dy = {r.scaled(r.entry('out_grad'))}"
    if spec.centre_output:
        mean = f"{r.sum('dy')} / {spec.width}"
        yield f"dy = {r.inside(f'dy - {mean}')}"
    yield f"x = {r.entry('saved')}"
    yield f"rstd = {r.of_row('rstd')}"
    if spec.centre:
        mean = r.of_row("mean")
        yield f"x = {r.inside(f'(x - {mean}) * rstd')}"
    else:
        yield "x *= rstd"
    if spec.weight:
        yield "weight_total += dy * x"
    if spec.bias:
        yield "bias_total += dy"
    if spec.weight:
        yield f"dy *= {r.kept_gamma if r.launch.keeps else r.gamma}"
    yield f"projection = {r.sum('dy * x')} / {r.divisor}"
    normal = f"(x + {r.sum('x')})" if spec.compressed else "x"
    shift = f" - {r.sum('dy')} / {spec.width}" if spec.centre else ""
    yield f"dx = (dy - {normal} * projection{shift}) * rstd"
    if sum_grad:
        yield f"dx += {r.entry('sum_grad')}"
    if spec.x_bias:
        yield "x_bias_total += dx"
    yield r.store_entry("x_grad", "dx")


def backward_chunks(r: Rows, sum_grad: bool) -> Iterator[str]:
    """Each row twice: for its sums, and for dx. Where programs keep dγ and dβ, these are in registers and the second
    time is written out chunk by chunk, of the program's part of the columns."""
    spec, launch = r.spec, r.launch
    starts = [f"first + {i * launch.block}" for i in range(_chunks(launch, spec))]
    sums = spec.sums
    if not launch.persistent:
        yield from _row_sums(r, "tl.program_id(0)")
        yield f"for start in tl.range(0, {spec.entries}, {launch.block}, loop_unroll_factor=1):"
        for line in (*_chunk(r, "start"), *_chunk_grad(r, sum_grad)):
            yield f"    {line}"
        return
    yield f"first = tl.program_id(1) * {len(starts) * launch.block}"
    for name, i in itertools.product(sums, range(len(starts))):
        yield f"{name}_total_{i} = tl.zeros([{launch.block}], tl.float32)"
    yield "for group in range(tl.program_id(0), rows, tl.num_programs(0)):"
    for line in _row_sums(r, "group"):
        yield f"    {line}"
    for i, start in enumerate(starts):
        for line in (*_chunk(r, start, f"_{i}"), *_chunk_grad(r, sum_grad, f"_{i}")):
            yield f"    {line}"
    for i, start in enumerate(starts):
        yield from r.columns(f"{start} + ")
        for name in sums:
            place = f"tl.program_id(0) * {spec.entries} + cols"
            yield r.store(f"{name}_sums", place, f"{name}_total_{i}", r.column_mask)


def _chunks(launch: Launch, spec: Spec) -> int:
    """The number of chunks in a program's part of the columns."""
    return -(-spec.entries // (launch.block * launch.parts))


def _row_sums(r: Rows, group: str) -> Iterator[str]:
    """What dx needs of a whole row."""
    spec, block = r.spec, r.launch.block
    wanted = {"products": "dy * x"}
    if spec.centre:
        wanted["sums"] = "dy"
    if spec.compressed:
        wanted["totals"] = "x"
    yield f"row = tl.cast({group}, tl.int64)"
    if spec.centre:
        yield "mean = " + r.of_row("mean")
    yield "rstd = " + r.of_row("rstd")
    for name in wanted:
        yield f"{name} = tl.zeros([{block}], tl.float32)"
    yield f"for start in tl.range(0, {spec.entries}, {block}, loop_unroll_factor=1):"
    for line in (*_chunk(r, "start"), *(f"{name} += {term}" for name, term in wanted.items())):
        yield f"    {line}"
    yield f"projection = tl.sum(products, 0) / {r.divisor}"
    if spec.centre:
        yield f"mean_grad = tl.sum(sums, 0) / {spec.width}"
    if spec.compressed:
        yield "total = tl.sum(totals, 0)"


def _chunk(r: Rows, start: str, total: str = "") -> Iterator[str]:
    """x̂ and γ ⊙ dy of a chunk; `total`: where its share of dγ and dβ goes, by the end of the name."""
    spec = r.spec
    yield from r.columns(f"{start} + ")
    yield f"dy = {r.scaled(r.entry('out_grad'))}"
    yield f"x = {r.entry('saved')}"
    yield f"x = {r.inside('(x - mean) * rstd')}" if spec.centre else "x *= rstd"
    if spec.weight and total:
        yield f"weight_total{total} += dy * x"
    if spec.bias and total:
        yield f"bias_total{total} += dy"
    if spec.weight:
        yield f"dy *= {r.gamma}"


def _chunk_grad(r: Rows, sum_grad: bool, total: str = "") -> Iterator[str]:
    """dx of a chunk, and its share of Σds as in `_chunk`."""
    normal = "(x + total)" if r.spec.compressed else "x"
    yield f"dx = (dy - {normal} * projection{' - mean_grad' if r.spec.centre else ''}) * rstd"
    if sum_grad:
        yield f"dx += {r.entry('sum_grad')}"
    if r.spec.x_bias and total:
        yield f"x_bias_total{total} += dx"
    yield r.store_entry("x_grad", "dx")


def columns(r: Rows) -> Iterator[str]:
    """Each program: some columns, and every row of its part. dx is written already."""
    spec, launch, sums = r.spec, r.launch, r.spec.sums
    yield from r.columns(f"tl.program_id(1) * {launch.block} + ")
    for name in sums:
        yield f"{name}_total = tl.zeros([{launch.block}], tl.float32)"
    yield "first = tl.program_id(0) * rows_each"
    yield "for position in range(first, tl.minimum(first + rows_each, rows)):"
    yield "    row = tl.cast(position, tl.int64)"
    if spec.weight or spec.bias:
        yield f"    dy = {r.scaled(r.entry('out_grad'))}"
    if spec.weight:
        mean = f" - {r.of_row('mean')}" if spec.centre else ""
        yield f"    weight_total += dy * ({r.entry('saved')}{mean}) * {r.of_row('rstd')}"
    if spec.bias:
        yield "    bias_total += dy"
    if spec.x_bias:
        yield f"    x_bias_total += {r.entry('x_grad')}"
    for name in sums:
        yield r.store(f"{name}_sums", f"tl.program_id(0) * {spec.entries} + cols", f"{name}_total", r.column_mask)
