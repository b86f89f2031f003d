"""The select tests run on every CPU backend: what ``auto`` takes is turned, not the calls."""

from collections.abc import Iterator
from unittest import mock

import pytest

from tailor_fast.ops.select.schema import ORDER
from tests.backends import NATIVE

ONE_BACKEND = ("test_scores", "test_native")  # these name the implementation that they call


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] not in ONE_BACKEND:
        metafunc.fixturenames.append("auto_backend")
        metafunc.parametrize("auto_backend", [NATIVE, "reference"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def auto_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes ``auto`` take one backend, on the CPU."""
    with mock.patch.dict(ORDER, {"cpu": (request.param, "reference")}):
        yield request.param
