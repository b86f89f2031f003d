"""Samples from a file as batches on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from tailor_fast._core.errors import InputError
from tailor_fast.calibration.lockstep import Batch
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.prepared import hash_prepared, is_tensors, read_prepared
from tailor_fast.calibration.streamed import run_dtype
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import Part, count_samples, hash_samples, read_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a picture and the like: its words come from elsewhere, and a model may have no row for it.
_PLACEHOLDERS = tuple(
    f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index")
)
Tensors = TypeVar("Tensors", bound=Mapping[str, torch.Tensor])


@dataclass(frozen=True)
class Data:
    """Batches, and what they were made from.

    Attributes:
        batches: keyword arguments of the forward pass, on the device.
        samples: how many samples.
        sha256: digest of the samples and their images.
        note: a sentence when not every sample is used, else empty.
        first: number of the first batch, where other processes have those before it.
    """

    batches: list[Batch]
    samples: int
    sha256: str
    note: str
    first: int = 0


def read_data(
    path: Path,
    directory: Path,
    model: PreTrainedModel,
    options: RunOptions,
    device: torch.device,
    share: Callable[[int], slice] = slice,
) -> Data:
    """Read a data file through a checkpoint's own processor, or batches that are prepared.

    Args:
        path: JSON lines; or a safetensors file of batches, or a directory of such files.
        directory: the checkpoint that holds the processor.
        model: for its configuration and dtype.
        options: how many samples, how long, how many at once, and which of their tokens count.
        device: where the batches are to be.
        share: which of how many batches are wanted, the others being another process's.

    Raises:
        InputError: a sample or the processor is not usable.
    """
    if is_tensors(path):
        read = read_prepared(path, model, options, run_dtype(model), share)
        moved = [batch.to(device) for batch in read.batches]
        note = _note(path, read.samples, read.found, options)
        return Data(moved, read.samples, read.sha256, note, read.first)
    found = count_samples(path)
    samples = read_samples(path, most=options.samples, part=options.part)
    first = 0

    def counted(size: int) -> slice:
        nonlocal first
        part = share(size)
        first = part.start or 0
        return part

    batches = make_batches(
        samples,
        load_processor(directory),
        batch_size=options.batch_size,
        max_length=options.max_length,
        dtype=run_dtype(model),
        tokens=options.tokens,
        config=model.config,
        share=counted,
    )
    note = _note(path, len(samples), found, options)
    moved = [batch.to(device) for batch in _known(batches, model, path)]
    return Data(moved, len(samples), hash_samples(samples), note, first)


def hash_data(path: Path, most: int | None, part: Part = "all") -> str:
    """Return the SHA-256 (hex) of what ``most`` samples of a data file's part are read from.

    Raises:
        InputError: the file is malformed or cannot be read.
    """
    if is_tensors(path):
        return hash_prepared(path, most, part)
    return hash_samples(read_samples(path, most=most, part=part))


def _known(batches: Iterable[Tensors], model: PreTrainedModel, path: Path) -> Iterator[Tensors]:
    """The batches, of whose tokens the model has an embedding."""
    embedding = model.get_input_embeddings()
    words = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
    held = {getattr(model.config, name, None) for name in _PLACEHOLDERS} - {None}
    for batch in batches:
        for name in ("input_ids", "decoder_input_ids"):
            ids = batch.get(name)
            if words is None or ids is None:
                continue
            unknown = ids[(ids < 0) | (ids >= words)]
            for token in held:
                unknown = unknown[unknown != token]
            if len(unknown):
                raise InputError(
                    f"{path}: a sample has token {int(unknown[0])}; expected one of the {words}"
                    " that the model has an embedding for; take the tokenizer that it was trained"
                    " with, or save the model with its embedding resized"
                )
        yield batch


def _note(path: Path, used: int, found: int, options: RunOptions) -> str:
    if used == found:
        return ""
    how = {"all": "used, evenly spaced", "fitted": "fitted on", "held": "held back"}[options.part]
    return f"{path.name}: {used} of {found} samples are {how}"
