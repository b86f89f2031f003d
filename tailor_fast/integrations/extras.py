"""Packages that only an integration needs: one sentence where one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tailor_fast._core.errors import UsageError


def need(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: the module's full name.
        extra: the extra of ``tailor_fast`` that brings its package.

    Raises:
        UsageError: the package is not installed, or a package that it needs is not.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{module.partition('.')[0]} cannot be imported ({error}); expected it beside"
            f" tailor_fast; pip install 'tailor_fast[{extra}]'"
        ) from error
