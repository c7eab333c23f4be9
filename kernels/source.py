"""Specification and launch → Triton source: plain text, only the lines that this kernel needs, the same every time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from textwrap import fill

from .backward import backward_chunks, backward_rows, columns
from .forward import forward_chunks, forward_rows
from .launch import Launch
from .rows import Rows
from .spec import Spec

SUM_ROWS, SUM_COLUMNS = 128, 32
"""A tile of partial sums that the finalising kernel reads at a time: as narrow as a cache line, since each tile of
columns is one program, and tall, since its loop over rows waits for memory once for each tile."""


@dataclass(frozen=True)
class Source:
    """name: of the kernel function; parameters: its arguments, in order; warps: to launch it with; text: a module."""

    name: str
    parameters: tuple[str, ...]
    warps: int
    text: str


def forward_source(spec: Spec, launch: Launch, statistics: bool) -> Source:
    """y, the sum if it is stored, and under `statistics` what backward needs: rstd of each row, and its mean."""
    tensors: list[tuple[str, object]] = [
        ("x", True),
        ("residual", spec.residual),
        ("x_bias", spec.x_bias),
        ("weight", spec.weight),
        ("bias", spec.bias),
        ("sum", spec.sum),
        ("out", True),
        ("mean", statistics and spec.centre),
        ("rstd", statistics),
    ]
    if spec.inner is not None:
        tensors += [
            ("inner_weight", spec.inner.weight),
            ("inner_bias", spec.inner.bias),
            ("inner_mean", statistics and spec.inner.centre),
            ("inner_rstd", statistics),
        ]
    by_row = ("x", "residual", "sum", "out")
    numbers = ["eps", *(["inner_eps"] if spec.inner is not None else [])]
    parameters = [*_parameters(tensors, by_row), *numbers]
    # a compiler that launches the kernel passes a Python number in float64, which would make the whole row float64
    casts = [f"{number} = tl.cast({number}, tl.float32)" for number in numbers]
    body = forward_chunks if launch.form == "chunks" else forward_rows
    lines = chain(casts, body(Rows(spec, launch), statistics))
    return _source(f"{spec.name}_forward", spec, launch, parameters, lines)


def backward_source(spec: Spec, launch: Launch, sum_grad: bool) -> Source:
    """dx from dy, and from the gradient of the stored sum under `sum_grad`; where the launch says so dγ, dβ and Σds
    too, as one row of partial sums for each program."""
    if spec.inner is not None:
        raise ValueError("normfx kernels: backward of two norms is that of `last` and then that of `first`")
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
        ("x_bias_sums", launch.persistent and spec.x_bias),
    ]
    parameters = _parameters(tensors, ("out_grad", "saved", "sum_grad", "x_grad"))
    body = backward_rows if launch.form == "rows" else backward_chunks
    return _source(f"{spec.name}_backward", spec, launch, parameters, body(Rows(spec, launch), sum_grad))


def column_source(spec: Spec, launch: Launch) -> Source:
    """Partial sums of dγ, dβ and Σds over rows, for rows too wide for the kernel of dx to keep them."""
    tensors = [
        ("out_grad", spec.weight or spec.bias),
        ("saved", spec.weight),
        ("mean", spec.weight and spec.centre),
        ("rstd", spec.weight),
        ("x_grad", spec.x_bias),
        ("weight_sums", spec.weight),
        ("bias_sums", spec.bias),
        ("x_bias_sums", spec.x_bias),
    ]
    parameters = [*_parameters(tensors, ("out_grad", "saved", "x_grad")), "rows_each"]
    return _source(f"{spec.name}_columns", spec, launch, parameters, columns(Rows(spec, launch)))


def finalise_source(spec: Spec) -> Source:
    """dγ, dβ and Σds from the partial sums [rows, entries] of each, in a fixed order, in one launch: where there are
    several, by programs of their own."""
    width, sums = spec.entries, spec.sums
    lines = [f"cols = tl.program_id(0) * {SUM_COLUMNS} + tl.arange(0, {SUM_COLUMNS})[None, :]"]
    for i, name in enumerate(sums):
        total = [
            f"total = tl.zeros([{SUM_ROWS}, {SUM_COLUMNS}], tl.float32)",
            f"for start in range(0, rows, {SUM_ROWS}):",
            f"    row = start + tl.arange(0, {SUM_ROWS})[:, None]",
            f"    inside = (row < rows) & (cols < {width})",
            f"    total += tl.load({name}_sums_ptr + row * {width} + cols, mask=inside, other=0.0)",
            f"tl.store({name}_grad_ptr + cols, tl.sum(total, 0, keep_dims=True), mask=cols < {width})",
        ]
        lines += [f"if tl.program_id(1) == {i}:", *(f"    {line}" for line in total)] if len(sums) > 1 else total
    parameters = [*(f"{name}_{kind}_ptr" for kind in ("sums", "grad") for name in sums), "rows"]
    return module(f"sum_{width}", parameters, 4, "Partial sums, added up.", lines)


def _parameters(tensors: Iterable[tuple[str, object]], by_row: tuple[str, ...]) -> list[str]:
    present = [name for name, there in tensors if there]
    return [*(f"{n}_ptr" for n in present), "rows", *(f"{n}_stride" for n in present if n in by_row)]


def _source(name: str, spec: Spec, launch: Launch, parameters: list[str], lines: Iterator[str]) -> Source:
    if launch.form == "chunks" and (spec.centre_output or spec.inner is not None):
        what = "centres the output" if spec.centre_output else "has a norm before the add"
        raise ValueError(f"normfx kernels: none {what} of rows of {spec.entries}: {launch.reason}")
    return module(name, parameters, launch.warps, f"{spec}\n\n{launch.reason}; {launch.warps} warps.", lines)


def module(name: str, parameters: list[str], warps: int, doc: str, lines: Iterable[str]) -> Source:
    """A kernel of these lines, in a module of its own; doc says what it computes, warps how to launch it."""
    body = "\n".join(f"    {line}" for line in lines)
    signature = fill(", ".join(parameters) + ",", 110, initial_indent="    ", subsequent_indent="    ")
    text = (
        f'"""{doc}"""\n\nimport triton\nimport triton.language as tl\n\n\n'
        f"@triton.jit\ndef {name}(\n{signature}\n):\n{body}\n"
    )
    return Source(name, tuple(parameters), warps, text)
