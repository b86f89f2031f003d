"""Backends that a test runs on: one that cannot run here is skipped, with its reason.

``gram`` and ``decorate`` have their C++ kernels once per instruction set. Tests of these ops run on
each that the machine has.
"""

from collections.abc import Iterator
from importlib import import_module

import pytest

from tailor_fast._core.backend import why_unavailable
from tailor_fast._core.extension import extension, load_extension

needs_native = pytest.mark.skipif(
    why_unavailable("native", "cpu") is not None, reason=str(why_unavailable("native", "cpu"))
)
NATIVE = pytest.param("native", marks=needs_native)


INSTRUCTION_SETS = (
    [] if isinstance(load_extension(), ImportError) else extension().instruction_sets()
)
NATIVES = [f"native {name}" for name in INSTRUCTION_SETS] or [NATIVE]


def on_instruction_set(name: str) -> Iterator[str]:
    """Body of a fixture: the kernels of ``gram`` and ``decorate`` are those of one set."""
    extension().use_instruction_set(name)
    yield name
    extension().use_instruction_set(INSTRUCTION_SETS[-1])


def preferring(op: str, backend: str) -> Iterator[str]:
    """Body of a fixture: ``auto`` takes ``backend`` on CPU tensors while the tests run.

    Args:
        op: its name.
        backend: its name; one of ``NATIVES`` says on which instruction set.
    """
    backend, *instruction_set = backend.split()
    order = import_module(f"tailor_fast.ops.{op}.schema").ORDER
    before = order["cpu"]
    order["cpu"] = (backend, *(name for name in before if name != backend))
    if instruction_set:
        extension().use_instruction_set(*instruction_set)
    yield backend
    if instruction_set:
        extension().use_instruction_set(INSTRUCTION_SETS[-1])
    order["cpu"] = before
