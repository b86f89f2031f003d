"""Every test of the ``decorate`` op runs once per backend."""

from collections.abc import Iterator

import pytest

from tests.backends import NATIVE, preferring


@pytest.fixture(scope="module", autouse=True, params=["reference", NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that ``auto`` takes."""
    yield from preferring("decorate", request.param)
