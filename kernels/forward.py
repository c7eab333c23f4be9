"""The lines of forward kernels: whole rows in registers, or row by row in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from .rows import Rows


def forward_rows(r: Rows, statistics: bool) -> Iterator[str]:
    spec = r.spec
    yield from r.columns()
    yield from r.row("tl.program_id(0)")
    yield from r.read()
    if spec.centre:
        yield f"mean = {r.sum('x')} / {spec.width}"
        yield f"x = {r.inside('x - mean')}"
    squares = r.sum("x * x")
    if spec.compressed:
        yield f"total = {r.sum('x')}  # the entry that is not stored is −total"
        squares = f"({squares} + total * total)"
    yield f"rstd = tl.rsqrt({squares} / {r.divisor} + eps)"
    yield from r.normalised()
    if spec.centre_output:
        yield f"y -= {r.sum(r.inside('y'))} / {spec.width}"
    yield r.store_entry("out", "y")
    if statistics and spec.centre:
        yield r.store("mean", "row", "mean", r.row_mask)
    if statistics:
        yield r.store("rstd", "row", "rstd", r.row_mask)
    if statistics and spec.inner is not None:
        kept = ("inner_mean", "inner_rstd") if spec.inner.centre else ("inner_rstd",)
        yield from (r.store(name, "row", name, r.row_mask) for name in kept)


def forward_chunks(r: Rows, statistics: bool) -> Iterator[str]:
    """Mean and squares of each piece about its own mean, combined (Chan, Golub, LeVeque 1979): no cancellation."""
    spec, block = r.spec, r.launch.block
    yield "row = tl.cast(tl.program_id(0), tl.int64)"
    yield "mean = 0.0" if spec.centre else "total = 0.0" if spec.compressed else "# squares of the row"
    yield "squares = 0.0"
    yield f"for start in tl.range(0, {spec.entries}, {block}, loop_unroll_factor=1):"
    for line in (*r.columns("start + "), *r.read()):
        yield f"    {line}"
    if spec.centre:
        yield f"    count = tl.cast(tl.minimum({spec.entries} - start, {block}), tl.float32)"
        yield "    own = tl.sum(x, 0) / count"
        yield f"    x = {r.inside('x - own')}"
        yield "    step = own - mean"
        yield "    mean += step * (count / (start + count))"
        yield "    squares += tl.sum(x * x, 0) + step * step * (start * count / (start + count))"
    else:
        yield "    squares += tl.sum(x * x, 0)"
        if spec.compressed:
            yield "    total += tl.sum(x, 0)"
    if spec.compressed:
        yield "squares += total * total  # the entry that is not stored is −total"
    yield f"rstd = tl.rsqrt(squares / {r.divisor} + eps)"
    yield f"for start in tl.range(0, {spec.entries}, {block}, loop_unroll_factor=1):"
    again = [f"x = {r.entry('sum')}"] if spec.sum else [*r.read()]
    centred = ["x -= mean"] if spec.centre else []
    for line in (*r.columns("start + "), *again, *centred, *r.normalised(), r.store_entry("out", "y")):
        yield f"    {line}"
    if statistics and spec.centre:
        yield r.store("mean", "row", "mean", "")
    if statistics:
        yield r.store("rstd", "row", "rstd", "")
