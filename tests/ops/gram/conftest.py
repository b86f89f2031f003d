"""Every test of the ``gram`` op runs once per backend."""

from collections.abc import Iterator

import pytest

from tests.backends import NATIVE, preferring


@pytest.fixture(scope="module", autouse=True, params=["reference", NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that ``auto`` takes."""
    yield from preferring("gram", request.param)
