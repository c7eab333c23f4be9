"""What a norm kernel computes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an entry."""


@dataclass(frozen=True)
class Inner:
    """The norm before a residual add: x becomes scale · (γ ⊙ z + β), z as in Spec, minus its mean under
    `centre_output`. It is not rounded before the add."""

    centre: bool
    weight: str | None = None
    bias: str | None = None
    scale: float = 1.0
    correction: int = 0
    centre_output: bool = False


@dataclass(frozen=True)
class Spec:
    """A norm over rows of `width` features, with what is fused around it. Dtypes are names ("bfloat16") or None.

        x = inner(x)                                                                        where there is an `inner`
        s = x + x_bias + alpha · residual            (s = x without a residual; rounded to `sum` when that is stored)
        z = (s − mean s) · rstd,  rstd = 1 / sqrt(Σ(s − mean s)² / (width − correction) + ε)       (RMSNorm: no mean)
        y = scale · (γ ⊙ z + β),  γ = weight, or 1 + weight under `unit_offset`
        y − mean y                                                                          under `centre_output`

    All of it in float32, rounded once into `out`.

    x_bias:     the bias of the linear layer that writes x, which then leaves it out: its gradient is the sum of ds over
                rows, which backward has in registers and a kernel of its own would read again
    compressed: rows hold width − 1 entries u, the one that is missing being −Σu: rstd = 1 / sqrt((Σu² + (Σu)²) / width
                + ε), "CRMSNorm" of Pre-RMSNorm and Pre-CRMSNorm Transformers (Jiang et al. 2023), section 3.2
    """

    width: int
    centre: bool
    x: str
    out: str
    weight: str | None = None
    bias: str | None = None
    unit_offset: bool = False
    residual: str | None = None
    sum: str | None = None
    alpha: float = 1.0
    scale: float = 1.0
    correction: int = 0
    compressed: bool = False
    centre_output: bool = False
    inner: Inner | None = None
    x_bias: str | None = None

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in ("x", "out", "weight", "bias", "residual", "sum", "x_bias")}
        if self.inner is not None:
            named |= {"inner weight": self.inner.weight, "inner bias": self.inner.bias}
        for name, dtype in named.items():
            if dtype is not None and dtype not in DTYPES:
                raise ValueError(f"normfx kernels: {name} is {dtype!r}; there are kernels for {', '.join(DTYPES)}")
        wrong = [
            (self.width < 1 + self.compressed, f"width is {self.width}"),
            (self.correction >= self.width, f"correction is {self.correction} for a width of {self.width}"),
            (self.compressed and self.centre, "a compressed row is centred already"),
            (self.compressed and self.centre_output, "the output of a compressed row cannot be centred"),
            (self.sum is not None and self.residual is None, "there is no sum without a residual"),
            (self.unit_offset and self.weight is None, "unit_offset without a weight"),
            (self.x_bias is not None and self.residual is None, "there is no x_bias without a residual"),
            (self.x_bias is not None and self.inner is not None, "an x_bias before an inner norm"),
            (self.x_bias is not None and self.compressed, "an x_bias of compressed rows"),
            (self.inner is not None and self.sum is None, "an inner norm without a sum that is stored"),
            (self.inner is not None and self.compressed, "an inner norm of compressed rows"),
            (self.inner is not None and self.inner.correction >= self.width, "the inner correction is too large"),
        ]
        for is_wrong, why in wrong:
            if is_wrong:
                raise ValueError(f"normfx kernels: {why}")

    @property
    def entries(self) -> int:
        """Stored entries of a row."""
        return self.width - self.compressed

    @property
    def sums(self) -> tuple[str, ...]:
        """The vectors whose gradients are sums over rows."""
        return tuple(name for name in ("weight", "bias", "x_bias") if getattr(self, name))

    @property
    def saved(self) -> str:
        """Dtype of what backward reads again: the sum, or x."""
        return self.sum or self.x

    @property
    def name(self) -> str:
        """A Python identifier that is short and tells kernels of one kind apart."""
        kind = "crms_norm" if self.compressed else "layer_norm" if self.centre else "rms_norm"
        inner = "" if self.inner is None else "layer_norm_" if self.inner.centre else "rms_norm_"
        return f"{inner}{'add_' if self.residual else ''}{kind}_{self.width}"

    @property
    def first(self) -> Spec:
        """The inner norm alone, as backward sees it: from x to rows of the sum's dtype."""
        inner = self.inner
        assert inner is not None and self.sum is not None
        return Spec(
            self.width, inner.centre, self.x, self.sum, inner.weight, inner.bias,
            scale=inner.scale, correction=inner.correction, centre_output=inner.centre_output,
        )  # fmt: skip

    @property
    def last(self) -> Spec:
        """Without the inner norm."""
        return replace(self, inner=None)

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]
        shown = [f"{name}={value}" for (name, value), f in zip(given, fields(self), strict=True) if value != f.default]
        return f"{self.name}({', '.join(shown)})"
