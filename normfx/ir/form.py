"""The form of a norm: what it computes, its input and its vectors aside. Said once, for all of normfx.

Ops of torch take numbers and strings, no records: `flat` makes a function that takes a Form one that takes its fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_type_hints

import torch

Kind = Literal["rms_norm", "layer_norm", "crms_norm"]
EpsPlace = Literal["inside", "outside", "clamped"]


class Form(NamedTuple):
    """k·(weight ⊙ (x − μ)·rstd + bias) along one dimension of x.

    kind:        "rms_norm": μ = 0; "layer_norm": μ is the mean of the row; "crms_norm": μ = 0, and one entry of a row,
                 −Σx, is not stored ("Pre-RMSNorm and Pre-CRMSNorm Transformers", Jiang et al. 2023, section 3.2)
    dim:         the dimension that is normalised
    eps:         with v the mean square of x − μ, rstd = 1/sqrt(v + eps) if eps_place is "inside", 1/(sqrt(v) + eps) if
                 it is "outside", 1/sqrt(max(v, eps)) if it is "clamped"
    correction:  c of the divisor d − c of v, where d counts the entries that are stored
    scale:       k
    compute_dtype, out_dtype: in which the norm is computed, and to which it is rounded once, last
    centre_output: the output is P y instead of y (maths M9)
    """

    kind: Kind
    dim: int
    eps: float
    eps_place: EpsPlace
    correction: int
    scale: float
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    centre_output: bool = False

    @property
    def centres(self) -> bool:
        """Whether the mean of a row is subtracted."""
        return self.kind == "layer_norm"

    @property
    def compressed(self) -> bool:
        """Whether one entry of a row is not stored."""
        return self.kind == "crms_norm"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The fields as arguments of an op whose name says the kind."""
        return self[1:]


FIELDS = tuple(get_type_hints(Form).items())
_SCHEMA = {int: "int", float: "float", bool: "bool", torch.dtype: "ScalarType"}


def schema(prefix: str = "") -> str:
    """The arguments of an op whose name says the kind."""
    return ", ".join(f"{_SCHEMA.get(type_, 'str')} {prefix}{name}" for name, type_ in FIELDS[1:])


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, taking the fields of each parameter that is a Form instead of it, in their order.

    Those of a parameter named `form` keep their names, those of another get its name before theirs. torch reads the
    schema of an op from this signature.
    """
    hints = get_type_hints(function)
    parameters = [p for name in inspect.signature(function).parameters for p in _parameters(name, hints[name])]

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return function(*gathered(function, arguments))

    made: Any = run
    made.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": hints["return"]}
    made.__signature__ = inspect.Signature(parameters, return_annotation=hints["return"])
    return run


def gathered(function: Callable[..., Any], arguments: Iterable[Any]) -> tuple[Any, ...]:
    """The arguments of a function that takes Forms, from those of the flat one."""
    rest = iter(arguments)
    return tuple(Form(*(next(rest) for _ in FIELDS)) if is_form else next(rest) for is_form in _takes_forms(function))


@functools.cache
def _takes_forms(function: Callable[..., Any]) -> tuple[bool, ...]:
    hints = get_type_hints(function)
    return tuple(hints[name] is Form for name in inspect.signature(function).parameters)


def _parameters(name: str, hint: Any) -> Iterable[inspect.Parameter]:
    prefix = "" if name == "form" else f"{name}_"
    named = {prefix + field: own if own in _SCHEMA else str for field, own in FIELDS} if hint is Form else {name: hint}
    for own_name, own_hint in named.items():
        yield inspect.Parameter(own_name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=own_hint)
