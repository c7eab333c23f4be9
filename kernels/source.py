"""Specification and launch → Triton source: plain text, only the lines that this kernel needs, the same every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from textwrap import fill

from .launch import Launch
from .spec import Spec

SUM_ROWS, SUM_COLUMNS = 32, 128
"""A tile of partial sums that the finalising kernel reads at a time."""


@dataclass(frozen=True)
class Source:
    """name: of the kernel function; parameters: its arguments, in order; warps: to launch it with; text: a module."""

    name: str
    parameters: tuple[str, ...]
    warps: int
    text: str


def forward_source(spec: Spec, launch: Launch, statistics: bool) -> Source:
    """y, the sum if it is stored, and under `statistics` what backward needs: rstd of each row, and its mean."""
    tensors = [
        ("x", True),
        ("residual", spec.residual),
        ("weight", spec.weight),
        ("bias", spec.bias),
        ("sum", spec.sum),
        ("out", True),
        ("mean", statistics and spec.centre),
        ("rstd", statistics),
    ]
    by_row = ("x", "residual", "sum", "out")
    parameters = [*_parameters(tensors, by_row), "eps"]
    body = _forward_chunks if launch.form == "chunks" else _forward_rows
    return _source(f"{spec.name}_forward", spec, launch, parameters, body(_Rows(spec, launch), statistics))


def backward_source(spec: Spec, launch: Launch, sum_grad: bool) -> Source:
    """dx from dy, and from the gradient of the stored sum under `sum_grad`; where the launch says so dγ and dβ
    too, as one row of partial sums for each program."""
    if spec.residual and not spec.sum:
        raise ValueError(f"normfx kernels: backward reads the sum again, and {spec} does not store it")
    tensors = [
        ("out_grad", True),
        ("saved", True),
        ("weight", spec.weight),
        ("mean", spec.centre),
        ("rstd", True),
        ("sum_grad", sum_grad),
        ("x_grad", True),
        ("weight_sums", launch.persistent and spec.weight),
        ("bias_sums", launch.persistent and spec.bias),
    ]
    parameters = _parameters(tensors, ("out_grad", "saved", "sum_grad", "x_grad"))
    body = _backward_rows if launch.form == "rows" else _backward_chunks
    return _source(f"{spec.name}_backward", spec, launch, parameters, body(_Rows(spec, launch), sum_grad))


def column_source(spec: Spec, launch: Launch) -> Source:
    """Partial sums of dγ and dβ over rows, for rows too wide for the kernel of dx to keep them."""
    tensors = [
        ("out_grad", True),
        ("saved", True),
        ("mean", spec.centre),
        ("rstd", True),
        ("weight_sums", spec.weight),
        ("bias_sums", spec.bias),
    ]
    parameters = [*_parameters(tensors, ("out_grad", "saved")), "rows_each"]
    return _source(f"{spec.name}_columns", spec, launch, parameters, _columns(_Rows(spec, launch)))


def finalise_source(width: int) -> Source:
    """Sum of partial sums [rows, width], in a fixed order."""
    lines = [
        f"cols = tl.program_id(0) * {SUM_COLUMNS} + tl.arange(0, {SUM_COLUMNS})[None, :]",
        f"total = tl.zeros([{SUM_ROWS}, {SUM_COLUMNS}], tl.float32)",
        f"for start in range(0, rows, {SUM_ROWS}):",
        f"    row = start + tl.arange(0, {SUM_ROWS})[:, None]",
        f"    inside = (row < rows) & (cols < {width})",
        f"    total += tl.load(sums_ptr + row * {width} + cols, mask=inside, other=0.0)",
        f"tl.store(out_ptr + cols, tl.sum(total, 0, keep_dims=True), mask=cols < {width})",
    ]
    return _module(f"sum_{width}", ["sums_ptr", "out_ptr", "rows"], 4, "Partial sums, added up.", lines)


def _parameters(tensors: Iterable[tuple[str, object]], by_row: tuple[str, ...]) -> list[str]:
    present = [name for name, there in tensors if there]
    return [*(f"{n}_ptr" for n in present), "rows", *(f"{n}_stride" for n in present if n in by_row)]


def _source(name: str, spec: Spec, launch: Launch, parameters: list[str], lines: Iterator[str]) -> Source:
    if spec.centre_output and launch.form == "chunks":
        raise ValueError(f"normfx kernels: none centres the output of rows of {spec.entries}: {launch.reason}")
    return _module(name, parameters, launch.warps, f"{spec}\n\n{launch.reason}; {launch.warps} warps.", lines)


def _module(name: str, parameters: list[str], warps: int, doc: str, lines: Iterable[str]) -> Source:
    body = "\n".join(f"    {line}" for line in lines)
    signature = fill(", ".join(parameters) + ",", 110, initial_indent="    ", subsequent_indent="    ")
    text = (
        f'"""{doc}"""\n\nimport triton\nimport triton.language as tl\n\n\n'
        f"@triton.jit\ndef {name}(\n{signature}\n):\n{body}\n"
    )
    return Source(name, tuple(parameters), warps, text)


class _Rows:
    """How the entries of a program are spelled: one row as a vector, or several as a matrix."""

    def __init__(self, spec: Spec, launch: Launch) -> None:
        self.spec, self.launch = spec, launch
        self.several = launch.rows > 1
        self.cut = launch.block != spec.entries  # some columns of the block lie outside of the row

    @property
    def row_mask(self) -> str:
        """Of the rows: those there are. A program of one row is not started, or does not loop, for others."""
        return "row < rows" if self.several else ""

    @property
    def column_mask(self) -> str:
        return "real" if self.cut else ""

    @property
    def mask(self) -> str:
        """Of the entries: those inside."""
        return "inside" if self.row_mask and self.cut else self.row_mask or self.column_mask

    def columns(self, start: str = "") -> Iterator[str]:
        shape = "[None, :]" if self.several else ""
        yield f"cols = {start}tl.arange(0, {self.launch.block}){shape}"
        if self.cut:
            yield f"real = cols < {self.spec.entries}"

    def row(self, group: str) -> Iterator[str]:
        if self.several:
            yield f"row = tl.cast({group}, tl.int64) * {self.launch.rows} + tl.arange(0, {self.launch.rows})[:, None]"
        else:
            yield f"row = tl.cast({group}, tl.int64)"
        if self.mask == "inside":
            yield "inside = (row < rows) & real"

    def load(self, name: str, offset: str, mask: str) -> str:
        masked = f", mask={mask}, other=0.0" if mask else ""
        return f"tl.load({name}_ptr + {offset}{masked}).to(tl.float32)"

    def entry(self, name: str) -> str:
        return self.load(name, f"row * {name}_stride + cols", self.mask)

    def of_row(self, name: str) -> str:
        return self.load(name, "row", self.row_mask)

    def of_column(self, name: str) -> str:
        return self.load(name, "cols", self.column_mask)

    def store(self, name: str, offset: str, value: str, mask: str) -> str:
        return f"tl.store({name}_ptr + {offset}, {value}{f', mask={mask}' if mask else ''})"

    def store_entry(self, name: str, value: str) -> str:
        return self.store(name, f"row * {name}_stride + cols", value, self.mask)

    def sum(self, value: str) -> str:
        return f"tl.sum({value}, 1, keep_dims=True)" if self.several else f"tl.sum({value}, 0)"

    def inside(self, value: str) -> str:
        """0 outside. Outer rows of a block are never stored, so only columns count."""
        return f"tl.where(real, {value}, 0.0)" if self.cut else value

    @property
    def gamma(self) -> str:
        weight = self.of_column("weight")
        return f"(1.0 + {weight})" if self.spec.unit_offset else weight

    def scaled(self, value: str) -> str:
        return f"{value} * {self.spec.scale}" if self.spec.scale != 1.0 else value

    @property
    def divisor(self) -> int:
        return self.spec.width - self.spec.correction

    def normalised(self) -> Iterator[str]:
        """y from x̂, in place."""
        yield f"y = x * ({self.scaled('rstd')})" if self.spec.scale != 1.0 else "y = x * rstd"
        if self.spec.weight:
            yield f"y *= {self.gamma}"
        if self.spec.bias:
            yield f"y += {self.scaled(self.of_column('bias'))}"

    def read(self) -> Iterator[str]:
        """s, with the residual, stored if it is wanted."""
        spec = self.spec
        yield f"x = {self.entry('x')}"
        if spec.residual:
            yield f"x += {f'{spec.alpha} * ' if spec.alpha != 1.0 else ''}{self.entry('residual')}"
        if spec.sum:
            yield f"rounded = x.to(tl.{spec.sum})  # the norm is of the sum that is stored"
            yield self.store_entry("sum", "rounded")
            yield "x = rounded.to(tl.float32)"


def _forward_rows(r: _Rows, statistics: bool) -> Iterator[str]:
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


def _forward_chunks(r: _Rows, statistics: bool) -> Iterator[str]:
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


def _backward_rows(r: _Rows, sum_grad: bool) -> Iterator[str]:
    """
    x̂ = (s − mean)·rstd,  g = k·γ ⊙ dy,  ds = rstd·(g − x̂·Σ(g x̂)/divisor − mean g) + the sum's own gradient
    """
    spec, launch = r.spec, r.launch
    sums = [name for name in ("weight", "bias") if getattr(spec, name)]
    shape = f"[{launch.rows}, {launch.block}]" if r.several else f"[{launch.block}]"
    yield from r.columns()
    for name in sums:
        yield f"{name}_total = tl.zeros({shape}, tl.float32)"
    indent = ""
    if launch.persistent:
        yield f"for group in range(tl.program_id(0), tl.cdiv(rows, {launch.rows}), tl.num_programs(0)):"
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


def _backward_row(r: _Rows, sum_grad: bool, group: str) -> Iterator[str]:
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
        yield f"dy *= {r.gamma}"
    yield f"projection = {r.sum('dy * x')} / {r.divisor}"
    normal = f"(x + {r.sum('x')})" if spec.compressed else "x"
    shift = f" - {r.sum('dy')} / {spec.width}" if spec.centre else ""
    yield f"dx = (dy - {normal} * projection{shift}) * rstd"
    if sum_grad:
        yield f"dx += {r.entry('sum_grad')}"
    yield r.store_entry("x_grad", "dx")


def _backward_chunks(r: _Rows, sum_grad: bool) -> Iterator[str]:
    """Each row twice: for its sums, and for dx. Where programs keep dγ and dβ, these are in registers and the second
    time is written out chunk by chunk, of the program's part of the columns."""
    spec, launch = r.spec, r.launch
    starts = [f"first + {i * launch.block}" for i in range(_chunks(launch, spec))]
    sums = [name for name in ("weight", "bias") if getattr(spec, name)]
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
        for line in (*_chunk(r, start, f"_{i}"), *_chunk_grad(r, sum_grad)):
            yield f"    {line}"
    for i, start in enumerate(starts):
        yield from r.columns(f"{start} + ")
        for name in sums:
            place = f"tl.program_id(0) * {spec.entries} + cols"
            yield r.store(f"{name}_sums", place, f"{name}_total_{i}", r.column_mask)


def _chunks(launch: Launch, spec: Spec) -> int:
    """Of a program's part of the columns."""
    return -(-spec.entries // (launch.block * launch.parts))


def _row_sums(r: _Rows, group: str) -> Iterator[str]:
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


def _chunk(r: _Rows, start: str, total: str = "") -> Iterator[str]:
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


def _chunk_grad(r: _Rows, sum_grad: bool) -> Iterator[str]:
    normal = "(x + total)" if r.spec.compressed else "x"
    yield f"dx = (dy - {normal} * projection{' - mean_grad' if r.spec.centre else ''}) * rstd"
    if sum_grad:
        yield f"dx += {r.entry('sum_grad')}"
    yield r.store_entry("x_grad", "dx")


def _columns(r: _Rows) -> Iterator[str]:
    """Each program: some columns, and every row of its part."""
    spec, launch = r.spec, r.launch
    sums = [name for name in ("weight", "bias") if getattr(spec, name)]
    yield from r.columns(f"tl.program_id(1) * {launch.block} + ")
    for name in sums:
        yield f"{name}_total = tl.zeros([{launch.block}], tl.float32)"
    yield "first = tl.program_id(0) * rows_each"
    yield "for position in range(first, tl.minimum(first + rows_each, rows)):"
    yield "    row = tl.cast(position, tl.int64)"
    yield f"    dy = {r.scaled(r.entry('out_grad'))}"
    if spec.weight:
        mean = f" - {r.of_row('mean')}" if spec.centre else ""
        yield f"    weight_total += dy * ({r.entry('saved')}{mean}) * {r.of_row('rstd')}"
    if spec.bias:
        yield "    bias_total += dy"
    for name in sums:
        yield r.store(f"{name}_sums", f"tl.program_id(0) * {spec.entries} + cols", f"{name}_total", r.column_mask)
