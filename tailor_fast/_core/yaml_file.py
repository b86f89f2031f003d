"""Reading what a user wrote in YAML: keys and values, or one sentence about what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailor_fast._core.errors import InputError, UsageError


def read_mapping(path: Path, known: Sequence[str], what: str) -> dict[str, Any]:
    """Read a file of keys and values; an empty file is an empty mapping.

    Args:
        path: the file.
        known: keys that it may have.
        what: what the file is, for messages: ``"a recipe"``.

    Raises:
        InputError: the file cannot be read.
        UsageError: no YAML, no keys and values, an unknown key, or a key that occurs twice.
    """
    import yaml

    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        body, written = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not YAML: {error}") from None
    if body is None or written is None:
        return {}
    if not isinstance(body, dict):
        raise UsageError(f"{path}: expected keys and values; got {type(body).__name__}")
    unknown = [repr(key) for key in body if key not in known]
    if unknown:
        listed = ", ".join(known)
        raise UsageError(
            f"{path}: unknown key {', '.join(unknown)}; the keys of {what} are {listed}"
        )
    twice = _key_that_occurs_twice(written)
    if twice is not None:
        raise UsageError(f"{path}: a key occurs twice, {twice!r}; expected each of them once")
    return body


def _key_that_occurs_twice(node: Any) -> str | None:
    """YAML's own reader keeps the last of two equal keys without a word."""
    if node.id == "mapping":
        keys = [key.value for key, _ in node.value if key.id == "scalar"]
        found = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        children = [value for _, value in node.value]
    else:
        found, children = None, node.value if node.id == "sequence" else []
    return found or next(filter(None, map(_key_that_occurs_twice, children)), None)
