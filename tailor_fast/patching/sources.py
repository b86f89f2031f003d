"""Two checkpoints side by side, seen as one model: which tensor on disk is which layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.checkpoint import Checkpoint, Hashed, TensorInfo, match_pair, open_checkpoint
from tailor_fast.models import Target, build_skeleton, find_targets, known_targets, map_keys
from tailor_fast.patching.recipe import Recipe

_FLOATS = ("F32", "F16", "BF16")
# Names that are no linear layer although the tensor has two dimensions.
_NOT_LINEAR = re.compile(
    r"(embed|wte|wpe|lm_head|norm|position|class_embedding|relative_attention)"
)
BLOCK_BYTES = 8 << 20
PROBE_BYTES = 64 << 10


@dataclass(frozen=True)
class LayerOnDisk:
    """A patchable layer and the tensor that holds its weight, under one name in both files."""

    target: Target
    tensor: str
    shape: tuple[int, int]  # [rows, cols], whatever the order on disk
    bias: str | None


@dataclass(frozen=True)
class Sources:
    """BASE and TUNED, open, paired tensor by tensor.

    Attributes:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.
        keys: state-dict name -> tensor name on disk, for running the model; empty where no model
            class is known, or none is run.
        layers: the layers that the recipe names, in module order.
        notes: what was decided, for the report.
    """

    base: Hashed
    tuned: Hashed
    keys: dict[str, str]
    layers: tuple[LayerOnDisk, ...]
    notes: tuple[str, ...]

    @cached_property
    def layer_tensors(self) -> frozenset[str]:
        """Names on disk of the layers' weights."""
        return frozenset(layer.tensor for layer in self.layers)

    def equal(self, name: str) -> bool:
        """Whether tensor ``name`` has the same bytes in both.

        Tensors that differ do so near their beginning, as a rule: little is read of them.
        """
        size = self.base.checkpoint.tensors[name].nbytes
        begin, step = 0, PROBE_BYTES
        ours, theirs = (torch.empty(min(size, BLOCK_BYTES), dtype=torch.uint8) for _ in range(2))
        while begin < size:
            end = min(size, begin + step)
            self.base.read_into(name, ours, begin, end)
            self.tuned.read_into(name, theirs, begin, end)
            if not torch.equal(ours[: end - begin], theirs[: end - begin]):
                return False
            begin, step = end, min(BLOCK_BYTES, 2 * step)
        return True


@contextmanager
def open_sources(base: Path, tuned: Path, recipe: Recipe, *, runs_model: bool) -> Iterator[Sources]:
    """Open both checkpoints and find the layers to patch; reads headers only.

    Args:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.
        recipe: which layers are wanted.
        runs_model: whether the model itself will be needed, not only the names of its layers.

    Raises:
        InputError: a file is malformed, or the two do not match.
        UsageError: the recipe's patterns leave no layer.
    """
    with ExitStack() as stack:
        ours = stack.enter_context(open_checkpoint(base))
        theirs = stack.enter_context(open_checkpoint(tuned))
        match_pair(ours, theirs)
        keys, layers, notes = _layers(theirs, recipe, runs_model)
        if not layers:
            raise UsageError(
                f"{tuned}: no layer to patch; expected a linear layer that `targets`, `layers` and"
                " `ignore` leave"
            )
        yield Sources(Hashed(ours), Hashed(theirs), keys, tuple(layers), notes)


def _layers(
    tuned: Checkpoint, recipe: Recipe, runs_model: bool
) -> tuple[dict[str, str], list[LayerOnDisk], tuple[str, ...]]:
    if tuned.directory is not None and not runs_model:
        targets = known_targets(tuned.directory, tuned.tensors)
        if targets is not None:
            names = {name: name for name in tuned.tensors}
            wanted = [target for target in targets if recipe.selects(target.name)]
            return {}, _on_disk(tuned, wanted, names), ()
    try:
        if tuned.directory is None:
            raise InputError(f"{tuned.path}: a single file has no config.json")
        model = build_skeleton(tuned.directory)
        keys = map_keys(model, tuned.tensors, str(tuned.path))
    except InputError as error:
        notes = (f"layers were found by name and shape, not from the model's class: {error}",)
        return {}, _by_name(tuned, recipe), notes
    return keys, _on_disk(tuned, find_targets(model, recipe.selects), keys), ()


def _on_disk(
    tuned: Checkpoint, targets: Iterable[Target], keys: Mapping[str, str]
) -> list[LayerOnDisk]:
    layers = []
    for target in targets:
        info = tuned.tensors.get(keys.get(f"{target.name}.weight", ""))
        if info is not None and info.dtype in _FLOATS:
            rows, cols = reversed(info.shape) if target.transposed else info.shape
            bias = keys.get(f"{target.name}.bias")
            layers.append(LayerOnDisk(target, info.name, (rows, cols), bias))
    return layers


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
