"""Two checkpoints side by side, seen as one model: which tensor on disk is which layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.statfile import Statistics
from tailor_fast.checkpoint import (
    Hashed,
    Held,
    Joined,
    MismatchError,
    Origin,
    TensorInfo,
    TensorSource,
    join_pair,
    match_pair,
    open_checkpoint,
    open_tuned,
    refuse_shape,
)
from tailor_fast.models import (
    Target,
    build_skeleton,
    find_targets,
    fused_targets,
    is_original,
    known_targets,
    map_keys,
    names_as_stored,
    refuse_fused,
    tied_names,
    transformers_name,
)
from tailor_fast.patching.recipe import Recipe

_FLOATS = ("F32", "F16", "BF16")
# Names that are no linear layer although the tensor has two dimensions.
_NOT_LINEAR = re.compile(
    r"(embed|wte|wpe|lm_head|norm|position|class_embedding|relative_attention)"
)
Readable = Hashed | TensorSource
BLOCK_BYTES = 8 << 20
PROBE_BYTES = 64 << 10


@dataclass(frozen=True)
class LayerOnDisk:
    """A patchable layer and the tensor that holds its weight, under one name in both files.

    Attributes:
        target: the layer.
        tensor: its weight's name on disk.
        shape: ``[rows, cols]``, whatever the order on disk.
        bias: its bias's name on disk; None without one.
        slices: how many matrices of equal size the tensor holds, one behind the other, each a unit
            of its own: the experts of a mixture that are stored together. ``rows`` counts all.
    """

    target: Target
    tensor: str
    shape: tuple[int, int]
    bias: str | None
    slices: int = 1


@dataclass(frozen=True)
class Sources:
    """BASE and TUNED, open, paired tensor by tensor.

    Attributes:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.
        keys: state-dict name -> tensor name on disk, for running the model; empty where no model
            class is known, or none is run.
        layers: the layers that the recipe names, in module order.
        joined: the output's tensors, and where those that are not patched come from.
        side_files: configuration, tokenizer and the like of the output.
        notes: what was decided, for the report.
    """

    base: Hashed
    tuned: Hashed
    keys: dict[str, str]
    layers: tuple[LayerOnDisk, ...]
    joined: Joined
    side_files: tuple[Path, ...]
    notes: tuple[str, ...]

    @cached_property
    def layer_tensors(self) -> frozenset[str]:
        """Names on disk of the layers' weights."""
        return frozenset(layer.tensor for layer in self.layers)

    def origins(self, name: str) -> tuple[Origin, ...]:
        """Where the words of a tensor come from when it is not patched: a layer's from base."""
        if name in self.layer_tensors:
            return (Origin("base", 0, self.joined.tensors[name].nbytes),)
        return self.joined.origins[name]

    def equal(self, name: str) -> bool:
        """Whether tensor ``name`` has the same bytes in both.

        Tensors that differ do so near their beginning, as a rule: little is read of them.
        """
        return _equal((self.base, name), (self.tuned, name))


@contextmanager
def open_sources(
    base: Path,
    tuned: Path,
    recipe: Recipe,
    *,
    runs_model: bool,
    joins: bool = False,
    held: Held | None = None,
) -> Iterator[Sources]:
    """Open both checkpoints and find the layers to patch; reads headers only.

    Args:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.
        recipe: which layers are wanted.
        runs_model: whether the model itself will be needed, not only the names of its layers.
        joins: whether tensors may differ as ``join_pair`` allows; else both must have the same.
        held: keeps what is read of ``base`` for the next one.

    Raises:
        InputError: a file is malformed, or the two do not match.
        UsageError: ``missing`` does not allow that the model is run; or the recipe's patterns leave
            no layer.
    """
    with ExitStack() as stack:
        ours = stack.enter_context((held.open if held else open_checkpoint)(base))
        theirs = stack.enter_context(open_tuned(tuned, ours, names_as_stored))
        if not joins:
            match_pair(ours, theirs)
        tied = _tied(ours, theirs) | _tied(theirs, ours)
        joined = join_pair(
            ours, theirs, untouched=recipe.untouched, missing=recipe.missing, without=tied
        )
        keys, layers, notes = _layers(theirs, recipe, runs_model)
        keys = {state: tied.get(name, name) for state, name in keys.items()}
        notes += tuple(
            f"tied: {name!r} is left out, {owner!r} has its words" for name, owner in tied.items()
        )
        layers = [layer for layer in layers if layer.tensor in ours.tensors]
        if runs_model and recipe.missing == "base" and joined.dropped:
            raise UsageError(
                f"{tuned}: runs with tensors that missing 'base' leaves out; expected a model that"
                " runs as it is written; give statistics, or no data"
            )
        for layer in layers:
            _check_layer(layer, joined, ours, theirs)
        changed = [layer for layer in layers if layer.tensor not in theirs.inherited]
        notes += joined.notes
        if theirs.inherited:
            count = f"{len(layers) - len(changed)} of {len(layers)} layers"
            notes += (f"an adapter, merged while it is read: it leaves {count} as they are",)
        if not changed:
            raise UsageError(
                f"{tuned}: no layer to patch; expected a linear layer that {recipe.selection}"
                " leave; `tailor-fast inspect` shows the names"
            )
        before = Hashed(ours, digests=held.digests if held else None)
        after = Hashed(theirs, base=before, shared=theirs.inherited)
        files = ours if recipe.missing == "base" and joined.dropped else theirs
        yield Sources(before, after, keys, tuple(changed), joined, files.side_files, notes)


def _tied(one: TensorSource, other: TensorSource) -> dict[str, str]:
    """Tensors of ``one`` that ``other`` lacks because the model ties them to one that both have.

    Raises:
        MismatchError: the two have different words in ``one``, so that it is not tied there.
    """
    alone = [name for name in one.tensors if name not in other.tensors]
    if not alone or one.directory is None:
        return {}
    groups, found = tied_names(one.directory, one.tensors), {}
    for name in alone:
        both = sorted(owner for owner in groups.get(name, ()) if owner in other.tensors)
        if both and not _equal((one, name), (one, both[0])):
            raise MismatchError(
                f"is tied to {both[0]!r} by the model's configuration, but has other words",
                path=one.path_of(name),
                tensor=name,
                remedy="untie them in config.json and store both in both checkpoints",
            )
        if both:
            found[name] = both[0]
    return found


def _equal(one: tuple[Readable, str], other: tuple[Readable, str]) -> bool:
    """Whether two tensors have the same bytes; little is read of two that differ early."""
    (ours, name), (theirs, other_name) = one, other
    size = _size(ours, name)
    if _size(theirs, other_name) != size:
        return False
    begin, step = 0, PROBE_BYTES
    left, right = (torch.empty(min(size, BLOCK_BYTES), dtype=torch.uint8) for _ in range(2))
    while begin < size:
        end = min(size, begin + step)
        ours.read_into(name, left, begin, end)
        theirs.read_into(other_name, right, begin, end)
        if not torch.equal(left[: end - begin], right[: end - begin]):
            return False
        begin, step = end, min(BLOCK_BYTES, 2 * step)
    return True


def _size(source: Readable, name: str) -> int:
    files = source.checkpoint if isinstance(source, Hashed) else source
    return files.tensors[name].nbytes


def _check_layer(
    layer: LayerOnDisk, joined: Joined, base: TensorSource, tuned: TensorSource
) -> None:
    if layer.tensor in joined.resized:
        refuse_shape(base, tuned, layer.tensor)
    if layer.bias in joined.only | joined.dropped:
        raise MismatchError(
            "is the bias of a layer that is patched, and in one input only",
            path=tuned.path,
            tensor=layer.bias,
            remedy="leave the layer out (`ignore`)",
        )


def _layers(
    tuned: TensorSource, recipe: Recipe, runs_model: bool
) -> tuple[dict[str, str], list[LayerOnDisk], tuple[str, ...]]:
    if tuned.directory is not None and not runs_model:
        targets = known_targets(tuned.directory, tuned.tensors)
        if targets is not None:
            names = {name: name for name in tuned.tensors}
            wanted = [target for target in targets if recipe.selects(target.name)]
            return {}, _on_disk(tuned, wanted, names), ()
    try:
        if tuned.directory is None:
            raise InputError(
                f"{tuned.path}: a single file has no config.json beside it; expected a model"
                " directory; patch without calibration data"
            )
        model = build_skeleton(tuned.directory)
        keys = map_keys(model, tuned.tensors, str(tuned.path))
        if runs_model:
            refuse_fused(model, keys, str(tuned.path))
    except InputError as error:
        if runs_model:
            raise
        note = f"layers were found by name and shape, not from the model's class: {error}"
        if is_original(tuned.tensors):
            note = "the layout of LLaVA's authors: layers have the names of transformers' class"
        return {}, _by_name(tuned, recipe), (note,)
    layers = _on_disk(tuned, find_targets(model, recipe.selects), keys)
    fused = (target for target in fused_targets(model) if recipe.selects(target.name))
    return keys, layers + _fused_on_disk(tuned, fused, keys), ()


def _on_disk(
    tuned: TensorSource, targets: Iterable[Target], keys: Mapping[str, str]
) -> list[LayerOnDisk]:
    layers = []
    for target in targets:
        info = tuned.tensors.get(keys.get(f"{target.name}.weight", ""))
        if info is not None and info.dtype in _FLOATS:
            rows, cols = reversed(info.shape) if target.transposed else info.shape
            bias = keys.get(f"{target.name}.bias")
            layers.append(LayerOnDisk(target, info.name, (rows, cols), bias))
    return layers


def _fused_on_disk(
    tuned: TensorSource, targets: Iterable[Target], keys: Mapping[str, str]
) -> list[LayerOnDisk]:
    """Tensors that hold one projection of all experts of a block."""
    found = ((target, tuned.tensors.get(keys.get(target.name, ""))) for target in targets)
    return [_fused(target, info) for target, info in found if info is not None]


def _fused(target: Target, info: TensorInfo) -> LayerOnDisk:
    count, *matrix = info.shape
    rows, cols = reversed(matrix) if target.transposed else matrix
    return LayerOnDisk(target, info.name, (count * rows, cols), None, count)


def _by_name(tuned: TensorSource, recipe: Recipe) -> list[LayerOnDisk]:
    layers = []
    original = is_original(tuned.tensors)
    for name, info in sorted(tuned.tensors.items()):
        if _holds_experts(info) and recipe.selects(name):
            layers.append(_fused(Target(name, False), info))
        stored = name.removesuffix(".weight")
        if stored == name or not _is_matrix(info) or _NOT_LINEAR.search(name):
            continue
        module = transformers_name(stored) if original else stored
        if recipe.selects(module):
            bias = f"{stored}.bias" if f"{stored}.bias" in tuned.tensors else None
            rows, cols = info.shape
            layers.append(LayerOnDisk(Target(module, False), name, (rows, cols), bias))
    return layers


def _holds_experts(info: TensorInfo) -> bool:
    floats = len(info.shape) == 3 and info.dtype in _FLOATS
    return floats and ".experts." in info.name and 0 not in info.shape


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.dtype in _FLOATS


def check_owner(
    statistics: Statistics, source: Hashed, layers: Sequence[LayerOnDisk], role: str
) -> None:
    """Check that statistics are of the model ``source``; reads what was not read of it so far.

    Raises:
        InputError: they are of another model.
    """
    root = source.root(bytearray(BLOCK_BYTES))
    weights = None
    if is_original(source.checkpoint.tensors):
        named = (layer for layer in layers if layer.target.name in statistics)
        weights = {layer.target.name: source.digests[layer.tensor] for layer in named}
    statistics.check_model(root, role, weights)
