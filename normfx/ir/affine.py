"""A scaling and shift of each feature, γ ⊙ v + β, as the ops that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node


@dataclass(frozen=True)
class Step:
    """v ⊙ operand, v / operand or v + alpha·operand, with an operand of parameters alone: a number for each feature, or
    one for all."""

    op: Literal["mul", "div", "add"]
    operand: Node
    alpha: float = 1.0


@dataclass(frozen=True)
class Affine:
    """Steps that make γ ⊙ v + β of a value v, one after the other.

    bounded: v is a norm or a function like tanh, so that its entries are about 1 or smaller
    rows:    v is itself x ⊙ r, with one number r for each row
    """

    steps: tuple[Step, ...]
    bounded: bool = False
    rows: bool = False

    @property
    def operands(self) -> tuple[Node, ...]:
        return tuple(step.operand for step in self.steps)

    @property
    def factors(self) -> tuple[Node, ...]:
        return tuple(step.operand for step in self.steps if step.op != "add")

    @property
    def terms(self) -> tuple[Node, ...]:
        return tuple(step.operand for step in self.steps if step.op == "add")
