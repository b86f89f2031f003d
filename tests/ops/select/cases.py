"""Inputs of the select tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from tailor_fast.ops.select.reference import masks, scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_pair(
    rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A base, a tuned tensor near it, and a column weight with a wide spread."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, cols, generator=generator) * 0.02
    tuned = base + torch.randn(rows, cols, generator=generator) * 0.002
    weight = torch.randn(cols, generator=generator).exp()
    return base.to(dtype), tuned.to(dtype), weight


def tied_pair(
    rows: int, cols: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pair whose deltas take five values, zero most often: many ties."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-2, 3, (rows, cols), generator=generator)
    steps *= torch.randint(0, 2, (rows, cols), generator=generator)
    return torch.zeros(rows, cols), steps / 64, torch.ones(cols)


@contextmanager
def chunk_sizes(chunk: int, keep: int) -> Iterator[None]:
    """Other sizes of what the reference scores at a time and of what it keeps."""
    in_masks = mock.patch.multiple(masks, CHUNK=chunk, KEEP=keep)
    with in_masks, mock.patch.object(scores, "CHUNK", chunk):
        yield
