"""Watches of memory are tried with the kernel's help and without."""

from collections.abc import Iterator

import pytest

from normfx.weights import native


@pytest.fixture(params=["pages", "contents"])
def library(request: pytest.FixtureRequest) -> Iterator[object]:
    """The C++ functions, with the kernel's help where there is any, and without."""
    found = native.native_library()
    assert found is not None
    found.normfx_allow_pages(request.param == "pages")
    yield found
    found.normfx_allow_pages(1)
