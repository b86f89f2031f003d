"""Backends that a test runs on: one that cannot run here is skipped, with its reason."""

from collections.abc import Iterator
from importlib import import_module

import pytest

from tailor_fast._core.backend import why_unavailable

needs_native = pytest.mark.skipif(
    why_unavailable("native", "cpu") is not None, reason=str(why_unavailable("native", "cpu"))
)
NATIVE = pytest.param("native", marks=needs_native)


def preferring(op: str, backend: str) -> Iterator[str]:
    """Body of a fixture: ``auto`` takes ``backend`` on CPU tensors while the tests run."""
    order = import_module(f"tailor_fast.ops.{op}.schema").ORDER
    before = order["cpu"]
    order["cpu"] = (backend, *(name for name in before if name != backend))
    yield backend
    order["cpu"] = before
