"""The select tests run on every CPU backend and with every instruction set of the native one.

What ``auto`` takes is turned, not the calls.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest

from tailor_fast.ops.select.schema import ORDER
from tests.backends import INSTRUCTION_SETS, NATIVE, instruction_set

# These name the implementation that they call.
ONE_BACKEND = ("test_scores", "test_native", "test_select_gpu")
ONE_BACKEND += ("test_triton", "test_triton_grid", "test_triton_ptx")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] not in ONE_BACKEND:
        metafunc.fixturenames.append("auto_backend")
        backends = [NATIVE, *(f"native-{isa}" for isa in INSTRUCTION_SETS[:-1]), "reference"]
        metafunc.parametrize("auto_backend", backends, indirect=True, scope="module")


@pytest.fixture(scope="module")
def auto_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes ``auto`` take one backend, on the CPU; ``native-avx2`` is one held to an old CPU."""
    name, _, isa = request.param.partition("-")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(ORDER, {"cpu": (name, "reference")}))
        if isa:
            stack.enter_context(instruction_set(isa))
        yield name
