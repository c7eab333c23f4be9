"""The parts of torch that torch keeps private and normfx needs: the only folder that may name them.

A module holds what belongs to one part of torch. Each name was tried with the versions in `TRIED`. A test looks every
one of them up in the installed torch, and fails by the name of the one that has moved (tests/project/test_compat.py).
What a version lacks is asked for with `getattr` here, and its docstring says what normfx does without it.
"""

import torch.utils._pytree as pytree

__all__ = ["TRIED", "pytree"]

TRIED = ("2.11", "2.13", "2.14", "2.15")
"""Versions of torch that the tests were run with."""
