"""Weights of one block in memory at a time: a model whose parameters come and go.

A unit is loaded when its module is first entered, and everything else leaves when a block is
entered. With all forward passes held at the block's entry, each block is loaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tailor_fast._core.errors import InputError
from tailor_fast.models.blocks import blocks_of

Loader = Callable[[str], torch.Tensor | None]  # state-dict name -> tensor, None when not on disk


@dataclass(frozen=True)
class _Slot:
    """One parameter: where it hangs and its placeholder."""

    module: nn.Module
    attribute: str
    name: str
    empty: nn.Parameter


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head of a language model, which runs only where its answers are asked for."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


class Residency:
    """Loads and drops the parameters of a skeleton.

    Args:
        model: parameters on ``meta``, buffers real.
        load: gives the tensor of a state-dict name, on the device and in the dtype to run with.

    Attributes:
        loaded_bytes: bytes loaded so far, for progress and tests.
        peak_bytes: most bytes resident at once.
    """

    def __init__(self, model: nn.Module, load: Loader) -> None:
        self._model = model
        self._load = load
        self._units: dict[str, list[_Slot]] = {}
        self._permanent: set[str] = set()
        self._resident: set[str] = set()
        self._index: dict[str, tuple[str, _Slot]] = {}
        self._overrides: dict[str, torch.Tensor] = {}
        self._changed: set[str] = set()
        self._sizes: dict[str, int] = {}
        self.loaded_bytes = 0
        self.peak_bytes = 0
        self._split()
        for name, buffer in model.named_buffers():
            stored = load(name)
            if stored is not None:
                buffer.copy_(stored)

    @classmethod
    def unit_sizes(cls, model: nn.Module) -> dict[str, int]:
        """Number of parameters in each unit of ``model`` but its output head."""
        plain, head = cls(model, lambda _name: None), output_head(model)
        return {
            unit: sum(slot.empty.numel() for slot in slots)
            for unit, slots in plain._units.items()
            if any(slot.module is not head for slot in slots)
        }

    @classmethod
    def most_resident(cls, model: nn.Module, names: Iterable[str]) -> dict[str, int]:
        """Most parameters that are resident while the layers ``names`` run.

        In a block, those of the block: whatever was loaded before leaves when it is entered. What
        runs between two blocks may come on top of the larger one.
        """
        plain, sizes = cls(model, lambda _name: None), cls.unit_sizes(model)
        between = sum(size for unit, size in sizes.items() if unit not in plain.blocks)
        largest = max((sizes[block] for block in plain.blocks), default=0)
        always = sum(sizes[unit] for unit in plain._permanent)
        return {
            name: largest + between if block is None else sizes[block] + always
            for name, block in blocks_of(model, names).items()
        }

    @property
    def blocks(self) -> frozenset[str]:
        """Names of the units that are blocks."""
        return self._blocks

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Load on entry while the context lasts; afterwards nothing is resident."""
        modules = dict(self._model.named_modules())
        handles = []
        try:
            for unit in self._units:
                if unit in self._permanent:
                    self._enter(unit)
                else:
                    hook = self._on_entry(unit)
                    handles.append(modules[unit].register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for unit in tuple(self._resident):
                self._drop(unit)

    def release(self) -> None:
        """Drop what is resident; it is loaded again when it is next entered."""
        for unit in self._resident - self._permanent:
            self._drop(unit)

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Let the model run with ``tensor`` for parameter ``name`` from now on.

        In a block that is resident, the tensor leaves with the block: a block runs once.
        """
        unit, slot = self._index[name]
        if unit in self._resident:
            slot.module._parameters[slot.attribute] = nn.Parameter(tensor, requires_grad=False)
            self._changed.add(unit)
        if unit not in self._resident or unit not in self._blocks:
            self._overrides[name] = tensor

    def get(self, name: str) -> torch.Tensor | None:
        """Return the resident parameter ``name``; None when its unit is not in memory."""
        unit, slot = self._index[name]
        if unit not in self._resident:
            return None
        parameter = slot.module._parameters[slot.attribute]
        return None if parameter is None else parameter.detach()

    def _split(self) -> None:
        names = [name for name, module in self._model.named_modules() if module._parameters]
        blocks = blocks_of(self._model, [f"{name}." for name in names])
        self._blocks = frozenset(block for block in blocks.values() if block is not None)
        for name in names:
            block = blocks[f"{name}."]
            unit = block if block is not None else self._free_unit(name)
            module = self._model.get_submodule(name)
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    full = f"{name}.{attribute}" if name else attribute
                    slot = _Slot(module, attribute, full, parameter)
                    self._units.setdefault(unit, []).append(slot)
                    self._index[full] = (unit, slot)
            if unit == name and self._holds_block(name):
                self._permanent.add(unit)

    def _free_unit(self, name: str) -> str:
        """The highest module on the way to ``name`` that holds no block; else ``name`` itself."""
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            if not self._holds_block(prefix):
                return prefix
        return name

    def _holds_block(self, name: str) -> bool:
        prefix = f"{name}." if name else ""
        return any(block.startswith(prefix) for block in self._blocks)

    def _on_entry(self, unit: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def enter(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            if unit not in self._resident:
                if unit in self._blocks:
                    for other in self._resident - self._permanent:
                        self._drop(other)
                self._enter(unit)

        return enter

    def _enter(self, unit: str) -> None:
        if unit in self._changed and unit in self._blocks:
            raise InputError(
                f"{unit} is entered again after its weights were patched and dropped; expected each"
                " block to run once in a forward pass; use propagate 'none'"
            )
        size = 0
        for slot in self._units[unit]:
            tensor = self._overrides.get(slot.name)
            if tensor is None:
                tensor = self._load(slot.name)
            if tensor is None:
                raise InputError(
                    f"{slot.name} is needed by the forward pass but is not in the checkpoint;"
                    " expected every weight that the model uses"
                )
            slot.module._parameters[slot.attribute] = nn.Parameter(tensor, requires_grad=False)
            size += tensor.numel() * tensor.element_size()
        self._resident.add(unit)
        self._sizes[unit] = size
        self.loaded_bytes += size
        self.peak_bytes = max(self.peak_bytes, sum(self._sizes[name] for name in self._resident))

    def _drop(self, unit: str) -> None:
        for slot in self._units[unit]:
            slot.module._parameters[slot.attribute] = slot.empty
        self._resident.discard(unit)
