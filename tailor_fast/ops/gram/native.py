"""The ``gram`` op on CPU tensors: conversion and squares in C++, GEMM as ``ops/gemm.py`` says.

Tokens are converted to float32 a chunk at a time into one buffer; those that do not count are left
out there. The diagonal, and what the extension's GEMM gives, has the same bits at any number of
threads.
"""

from collections.abc import Iterator

import torch

from tailor_fast import _C
from tailor_fast.ops.gemm import add_product_

CHUNK_TOKENS = 2048
_BLOCK = 256  # rows and columns of a tile that is mirrored at a time: it stays in the cache
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _counted(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.nonzero()[:, 0]


def _chunks(x: torch.Tensor, counted: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Counted tokens in float32, all chunks in the same memory unless ``x`` serves as it is."""
    cols = x.shape[1]
    tokens = x.shape[0] if counted is None else counted.shape[0]
    if counted is None and x.dtype == torch.float32:
        yield from x.split(CHUNK_TOKENS)
        return
    buffer = torch.empty(min(tokens, CHUNK_TOKENS), cols)
    for start in range(0, tokens, CHUNK_TOKENS):
        count = min(CHUNK_TOKENS, tokens - start)
        _C.gram_convert(
            x.data_ptr(),
            _KINDS[x.dtype],
            cols,
            0 if counted is None else counted.data_ptr(),
            start,
            count,
            buffer.data_ptr(),
            torch.get_num_threads(),
        )
        yield buffer[:count]


def accumulate_gram_(gram: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> None:
    """``gram [cols, cols] += sum of x_t x_t^T``, exactly symmetric."""
    for chunk in _chunks(x, _counted(mask)):
        add_product_(gram, chunk.T, chunk, lower=True)
    _mirror_(gram)


def _mirror_(gram: torch.Tensor) -> None:
    """Overwrite what is above the diagonal with what is below it."""
    size = gram.shape[0]
    lower = torch.ones(min(size, _BLOCK), min(size, _BLOCK), dtype=torch.bool).tril_()
    for start in range(0, size, _BLOCK):
        cols = slice(start, min(start + _BLOCK, size))
        for below in range(start, size, _BLOCK):
            rows = slice(below, min(below + _BLOCK, size))
            tile = gram[rows, cols].contiguous().T.contiguous()
            if below == start:
                width = len(tile)
                tile = torch.where(lower[:width, :width], gram[rows, cols], tile)
            gram[cols, rows] = tile


def accumulate_cross_gram_(
    cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None
) -> None:
    """``cross [x_cols, y_cols] += sum of x_t y_t^T``."""
    counted = _counted(mask)
    for left, right in zip(_chunks(x, counted), _chunks(y, counted), strict=True):
        add_product_(cross, left.T, right)


def accumulate_gram_diag_(diag: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> None:
    """``diag [cols] += sum of x_t * x_t``."""
    counted, cols = _counted(mask), x.shape[1]
    tokens = x.shape[0] if counted is None else counted.shape[0]
    sums = torch.zeros(-(-tokens // _C.GRAM_DIAGONAL_TOKENS), cols, dtype=torch.float64)
    _C.gram_add_diagonal(
        diag.data_ptr(),
        x.data_ptr(),
        _KINDS[x.dtype],
        cols,
        0 if counted is None else counted.data_ptr(),
        tokens,
        sums.data_ptr(),
        torch.get_num_threads(),
    )
