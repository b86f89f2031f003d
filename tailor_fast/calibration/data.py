"""Samples from a file as batches on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tailor_fast.calibration.lockstep import Batch
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.streamed import StreamedModel, run_dtype
from tailor_fast.models.inputs import Tokens, load_processor, make_batches
from tailor_fast.models.samples import count_samples, hash_samples, read_samples


@dataclass(frozen=True)
class Data:
    """Batches, and what they were made from.

    Attributes:
        batches: keyword arguments of the forward pass, on the device.
        samples: how many samples.
        sha256: digest of the samples and their images.
        note: a sentence when not every sample is used, else empty.
    """

    batches: list[Batch]
    samples: int
    sha256: str
    note: str


def read_data(
    path: Path,
    directory: Path,
    model: StreamedModel,
    options: RunOptions,
    device: torch.device,
    tokens: Tokens = "all",
) -> Data:
    """Read a data file through a checkpoint's own processor.

    Args:
        path: JSON lines.
        directory: the checkpoint that holds the processor.
        model: for its configuration and dtype.
        options: how many samples, how long, how many at once.
        device: where the batches are to be.
        tokens: which tokens count.

    Raises:
        InputError: a sample or the processor is not usable.
    """
    found = count_samples(path)
    samples = read_samples(path, most=options.samples)
    batches = make_batches(
        samples,
        load_processor(directory),
        batch_size=options.batch_size,
        max_length=options.max_length,
        dtype=run_dtype(model.model),
        tokens=tokens,
        config=model.model.config,
    )
    note = ""
    if len(samples) < found:
        note = f"{path.name}: {len(samples)} of {found} samples are used, evenly spaced"
    moved = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    return Data(moved, len(samples), hash_samples(samples), note)
