"""Every test of the ``gram`` op runs once per backend and, for the C++ one, instruction set."""

from collections.abc import Iterator

import pytest

from tests.backends import NATIVES, preferring


@pytest.fixture(scope="module", autouse=True, params=["reference", *NATIVES])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that ``auto`` takes."""
    yield from preferring("gram", request.param)
