"""How the lines of a kernel spell the entries of its program: one row as a vector, or several as a matrix."""

from __future__ import annotations

from collections.abc import Iterator

from .launch import Launch
from .spec import Inner, Spec

_WIDE = ".to(tl.float32)"


class Rows:
    """Writes the source lines of one kernel that deal with its rows."""

    def __init__(self, spec: Spec, launch: Launch) -> None:
        self.spec, self.launch = spec, launch
        self.several = launch.rows > 1
        self.cut = launch.block != spec.entries  # some columns of the block lie outside of the row

    @property
    def row_mask(self) -> str:
        """The mask of rows that exist. A program of one row is not started, or does not loop, for others."""
        return "row < rows" if self.several else ""

    @property
    def column_mask(self) -> str:
        return "real" if self.cut else ""

    @property
    def mask(self) -> str:
        """The mask of entries inside the matrix."""
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

    def load(self, name: str, offset: str, mask: str, more: str = "") -> str:
        return f"tl.load({name}_ptr + {offset}{f', mask={mask}, other=0.0' if mask else ''}{more}){_WIDE}"

    def entry(self, name: str) -> str:
        return self.load(name, f"row * {name}_stride + cols", self.mask)

    def of_row(self, name: str) -> str:
        return self.load(name, "row", self.row_mask)

    def of_column(self, name: str) -> str:
        """Every program reads the same: caches keep it longer than rows, which are read once. Not in pieces of wide
        rows, where the policy takes registers that a loop needs (8 bytes in local memory on sm_80)."""
        more = ", eviction_policy='evict_last'" if self.launch.form == "rows" else ""
        return self.load(name, "cols", self.column_mask, more)

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
        return self.offset(self.of_column("weight"))

    def keep_gamma(self) -> Iterator[str]:
        """`gamma`, as it is stored: before a loop over rows."""
        yield f"gamma = {self.of_column('weight').removesuffix(_WIDE)}"

    @property
    def kept_gamma(self) -> str:
        return self.offset(f"gamma{_WIDE}")

    def offset(self, weight: str) -> str:
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

    def inner(self, norm: Inner) -> Iterator[str]:
        """norm(x), in place."""
        if norm.centre:
            yield f"inner_mean = {self.sum('x')} / {self.spec.width}"
            yield f"x = {self.inside('x - inner_mean')}"
        yield f"inner_rstd = tl.rsqrt({self.sum('x * x')} / {self.spec.width - norm.correction} + inner_eps)"
        yield f"x *= inner_rstd * {norm.scale}" if norm.scale != 1.0 else "x *= inner_rstd"
        if norm.weight:
            yield f"x *= {self.of_column('inner_weight')}"
        if norm.bias:
            yield f"x += {self.of_column('inner_bias')}{f' * {norm.scale}' if norm.scale != 1.0 else ''}"
        if norm.centre_output:
            yield f"inner_shift = {self.sum('x')} / {self.spec.width}"
            yield f"x = {self.inside('x - inner_shift')}"

    def read(self) -> Iterator[str]:
        """s, with the residual, stored if it is wanted."""
        spec = self.spec
        yield f"x = {self.entry('x')}"
        if spec.inner is not None:
            yield from self.inner(spec.inner)
        if spec.x_bias:
            yield f"x += {self.of_column('x_bias')}"
        if spec.residual:
            yield f"x += {f'{spec.alpha} * ' if spec.alpha != 1.0 else ''}{self.entry('residual')}"
        if spec.sum:
            yield f"rounded = x.to(tl.{spec.sum})  # the norm is of the sum that is stored"
            yield self.store_entry("sum", "rounded")
            yield "x = rounded.to(tl.float32)"
