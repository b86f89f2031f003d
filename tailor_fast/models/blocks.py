"""The repeated blocks of a model: entries of its outermost lists of modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def blocks_of(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """Map each module name to the block that holds it; None outside every block.

    A block is an entry of a ``ModuleList`` (or ``Sequential``) with at least two entries of one
    class that have children; of nested lists the outermost counts: a block's experts are none.
    """
    lists = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and _is_stack(module)
    }
    return {name: _outermost(name, lists) for name in names}


def _is_stack(module: nn.Module) -> bool:
    entries = list(module.children())
    kinds = {type(entry) for entry in entries}
    return len(entries) >= 2 and len(kinds) == 1 and any(True for _ in entries[0].children())


def _outermost(name: str, lists: set[str]) -> str | None:
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if ".".join(parts[:depth]) in lists:
            return ".".join(parts[: depth + 1])
    return None
