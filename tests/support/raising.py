"""Finds normfx's own exception inside what torch.compile raises around it.

Dynamo wraps what a backend raises in an exception of its own, whose class and words differ between versions of torch.
That it is raised *from* the backend's exception does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_inside(kind: type[BaseException], words: str) -> Iterator[None]:
    """Expect an exception that is, or comes from, one of this kind whose own text matches the pattern `words`."""
    with pytest.raises(Exception) as caught:
        yield
    chain = list(causes(caught.value))
    assert any(isinstance(error, kind) and re.search(words, str(error)) for error in chain), chain


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception itself, and each one that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
