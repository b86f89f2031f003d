"""Two checkpoints side by side, seen as one model: which tensor on disk is which layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.checkpoint import Checkpoint, TensorHasher, TensorInfo, match_pair, open_checkpoint
from tailor_fast.models import Target, build_skeleton, find_targets, map_keys
from tailor_fast.patching.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = ("F32", "F16", "BF16")
# Names that are no linear layer although the tensor has two dimensions.
_NOT_LINEAR = re.compile(
    r"(embed|wte|wpe|lm_head|norm|position|class_embedding|relative_attention)"
)
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class LayerOnDisk:
    """A patchable layer and the tensor that holds its weight, under one name in both files."""

    target: Target
    tensor: str
    shape: tuple[int, int]  # [rows, cols], whatever the order on disk
    bias: str | None


class Hashed:
    """A checkpoint whose tensors are hashed as they pass by, so that each is read once.

    Attributes:
        checkpoint: the open files.
        digests: tensor name -> digest of what was read whole so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.digests: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name``, owned by the caller."""
        tensor = self.checkpoint.read(name)
        if name not in self.digests:
            hasher = self._hasher(name)
            hasher.update(tensor)
            self.digests[name] = hasher.hexdigest()
        return tensor

    def blocks(self, name: str, buffer: bytearray) -> Iterator[tuple[int, memoryview]]:
        """Read tensor ``name`` through ``buffer``: yields (first byte, bytes)."""
        hasher = self._hasher(name)
        size = self.checkpoint.tensors[name].nbytes
        for begin in range(0, size, len(buffer)):
            end = min(size, begin + len(buffer))
            self.checkpoint.read_into(name, buffer, begin, end)
            view = memoryview(buffer)[: end - begin]
            hasher.update(view)
            yield begin, view
        self.digests[name] = hasher.hexdigest()

    def finish(self, buffer: bytearray) -> dict[str, str]:
        """Hash what was not read so far, and return every digest."""
        for name in self.checkpoint.tensors:
            if name not in self.digests:
                for _ in self.blocks(name, buffer):
                    pass
        return self.digests

    def _hasher(self, name: str) -> TensorHasher:
        info = self.checkpoint.tensors[name]
        return TensorHasher(info.dtype, info.shape)


@dataclass(frozen=True)
class Sources:
    """BASE and TUNED, open, paired tensor by tensor.

    Attributes:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.
        keys: state-dict name -> tensor name on disk; empty where no model class is known.
        layers: the layers that the recipe names, in module order.
        notes: what was decided, for the report.
    """

    base: Hashed
    tuned: Hashed
    keys: dict[str, str]
    layers: tuple[LayerOnDisk, ...]
    notes: tuple[str, ...]

    def skeleton(self, source: Hashed) -> PreTrainedModel:
        """A model without weights for one of the two checkpoints.

        Raises:
            InputError: no configuration, or no such class.
        """
        checkpoint = source.checkpoint
        if checkpoint.directory is None:
            raise InputError(
                f"{checkpoint.path}: a single file has no config.json beside it; expected a model"
                " directory; patch without calibration data"
            )
        return build_skeleton(checkpoint.directory)

    def equal(self, name: str) -> bool:
        """Whether tensor ``name`` has the same bytes in both, read block by block."""
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        size = base.tensors[name].nbytes
        ours, theirs = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        for begin in range(0, size, BLOCK_BYTES):
            end = min(size, begin + BLOCK_BYTES)
            base.read_into(name, ours, begin, end)
            tuned.read_into(name, theirs, begin, end)
            if memoryview(ours)[: end - begin] != memoryview(theirs)[: end - begin]:
                return False
        return True


@contextmanager
def open_sources(base: Path, tuned: Path, recipe: Recipe) -> Iterator[Sources]:
    """Open both checkpoints and find the layers to patch; reads headers only.

    Raises:
        InputError: a file is malformed, or the two do not match.
        UsageError: the recipe's patterns leave no layer.
    """
    with ExitStack() as stack:
        ours = stack.enter_context(open_checkpoint(base))
        theirs = stack.enter_context(open_checkpoint(tuned))
        match_pair(ours, theirs)
        keys, layers, notes = _layers(theirs, recipe)
        if not layers:
            raise UsageError(
                f"{tuned}: no layer to patch; expected a linear layer that `targets`, `layers` and"
                " `ignore` leave"
            )
        yield Sources(Hashed(ours), Hashed(theirs), keys, tuple(layers), notes)


def _layers(
    tuned: Checkpoint, recipe: Recipe
) -> tuple[dict[str, str], list[LayerOnDisk], tuple[str, ...]]:
    try:
        if tuned.directory is None:
            raise InputError(f"{tuned.path}: a single file has no config.json")
        model = build_skeleton(tuned.directory)
        keys = map_keys(model, tuned.tensors, str(tuned.path))
    except InputError as error:
        notes = (f"layers were found by name and shape, not from the model's class: {error}",)
        return {}, _by_name(tuned, recipe), notes
    layers = []
    for target in find_targets(model, recipe.selects):
        info = tuned.tensors.get(keys.get(f"{target.name}.weight", ""))
        if info is not None and info.dtype in _FLOATS:
            rows, cols = reversed(info.shape) if target.transposed else info.shape
            bias = keys.get(f"{target.name}.bias")
            layers.append(LayerOnDisk(target, info.name, (rows, cols), bias))
    return keys, layers, ()


def _by_name(tuned: Checkpoint, recipe: Recipe) -> list[LayerOnDisk]:
    layers = []
    for name, info in sorted(tuned.tensors.items()):
        module = name.removesuffix(".weight")
        if module == name or not _is_matrix(info) or _NOT_LINEAR.search(name):
            continue
        if recipe.selects(module):
            bias = f"{module}.bias" if f"{module}.bias" in tuned.tensors else None
            rows, cols = info.shape
            layers.append(LayerOnDisk(Target(module, False), name, (rows, cols), bias))
    return layers


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.dtype in _FLOATS


def run_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the model's forward pass runs in."""
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
