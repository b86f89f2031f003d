"""Backends that a test runs on: one that cannot run here is skipped, with its reason."""

import pytest

from tailor_fast._core.backend import why_unavailable

needs_native = pytest.mark.skipif(
    why_unavailable("native", "cpu") is not None, reason=str(why_unavailable("native", "cpu"))
)
NATIVE = pytest.param("native", marks=needs_native)
