"""A tensor pair as the kernels see it: their common arguments, grids and compile-time choices."""

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from tailor_fast._core.launch import Launch
from tailor_fast.ops.select.options import BLOCK, Scoring
from tailor_fast.ops.select.triton import scores

_KINDS = {
    "obs": scores.OBS.value,
    "diag": scores.LINEAR.value,
    "ratio": scores.LINEAR.value,
    "weight": scores.WEIGHT.value,
}
_NORMS = {
    "none": scores.NO_NORM.value,
    "tensor": scores.TENSOR.value,
    "row": scores.ROW.value,
    "row_block": scores.ROW_BLOCK.value,
}
FLAT, BY_ROW, BY_COLUMN = scores.FLAT.value, scores.BY_ROW.value, scores.BY_COLUMN.value
SEGMENTS: int = scores.SEGMENTS.value
# Of 16 threads per segment, all loads of a warp are whole lines; of 4, they are whole sectors, and
# two of the seven steps of a fold are shuffles instead of four.
LANES, FOLD_LANES = 16, 4


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def launch(kernel: Any, grid: Sequence[int], config: Launch, *args: Any, **constants: Any) -> None:
    """Start a kernel on the device of its first tensor."""
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        kernel[tuple(grid)](
            *args,
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=config.enable_fp_fusion,
        )


@dataclass(frozen=True)
class Pair:
    """Tensors and options that a score depends on.

    Attributes:
        base: ``[rows, cols]``; None where ``tuned`` holds scores.
        tuned: same shape.
        column_weight: float32 ``[cols]``, None where it is not read.
        affine: float32 ``[terms, 2, units of normalisation]`` of ``row`` and ``tensor``.
        kind, norm: numbers of ``scores.py``.
        weights: of salience and sensitivity.
        order: number of ``scores.py``: which segments follow each other.
    """

    base: torch.Tensor | None
    tuned: torch.Tensor
    column_weight: torch.Tensor | None
    affine: torch.Tensor | None
    kind: int
    norm: int
    weights: tuple[float, float]
    order: int

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Base and tuned; the latter twice where there is but one."""
        return self.tuned if self.base is None else self.base, self.tuned

    @property
    def flat(self) -> bool:
        """Whether a score depends on its own two elements alone, wherever they are."""
        return self.column_weight is None and self.norm in (_NORMS["none"], _NORMS["tensor"])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, those of one segment each in a flat order."""
        if self.order == FLAT:
            return -(-self.tuned.numel() // BLOCK), BLOCK
        return self.tuned.shape[0], self.tuned.shape[1]

    @property
    def blocks(self) -> int:
        """Segments of a row."""
        return -(-self.shape[1] // BLOCK)

    @property
    def units(self) -> int:
        """Units of scope, row aside."""
        return self.blocks if self.order == BY_COLUMN else 1

    @property
    def tiles(self) -> int:
        """Tiles of a unit of scope."""
        segments = self.shape[0] * (1 if self.order == BY_COLUMN else self.blocks)
        return -(-segments // SEGMENTS)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """``base_ptr`` to ``wv``."""
        tensors = self.base, self.tuned, self.column_weight, self.affine
        return (*tensors, *self.shape, self.tuned.numel(), self.blocks, *self.weight_bits)

    @property
    def weight_bits(self) -> tuple[int, int]:
        """The weights' bits: a float argument of a kernel would be rounded to float32."""
        return _bits(self.weights[0]), _bits(self.weights[1])

    @property
    def terms(self) -> dict[str, Any]:
        """What the scores are made of, at compile time."""
        used = [weight > 0 for weight in self.weights]
        return {"KIND": self.kind, "NORM": self.norm, "S": used[0], "V": used[1]}

    @property
    def lanes(self) -> int:
        """Threads that share a segment."""
        return FOLD_LANES if self.norm == _NORMS["row_block"] else LANES

    @property
    def wide(self) -> bool:
        """Whether 32 bits do not count the segments."""
        return self.tiles * SEGMENTS >= 2**31

    @property
    def masked(self) -> bool:
        """Whether a tile may reach beyond the tensor."""
        if self.order == FLAT:
            return self.tuned.numel() % (SEGMENTS * BLOCK) > 0
        rows, cols = self.shape
        segments = rows * (1 if self.order == BY_COLUMN else self.blocks)
        return cols % BLOCK > 0 or segments % SEGMENTS > 0

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels that work on tiles."""
        layout = {"ORDER": self.order, "WIDE": self.wide, "LANES": self.lanes}
        return {**self.terms, **layout, "MASKED": self.masked}

    def rows(self, start: int, stop: int) -> "Pair":
        """Some rows, with the moments of the whole."""
        base = None if self.base is None else self.base[start:stop]
        affine = self.affine
        if affine is not None and self.norm == _NORMS["row"]:
            affine = affine[..., start:stop].contiguous()
        return replace(self, base=base, tuned=self.tuned[start:stop], affine=affine)

    def ordered(self, scope: str) -> "Pair":
        """The pair in the linear order of a scope's units."""
        if scope == "block":
            return replace(self, order=BY_COLUMN)
        return replace(self, order=FLAT if scope == "tensor" and self.flat else BY_ROW)


def describe(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> Pair:
    """A pair without its moments."""
    salience = float(scoring.salience_weight)
    if column_weight is None or salience == 1:
        kind, column_weight, salience = scores.SALIENCE.value, None, 1.0
    else:
        kind = _KINDS[scoring.sensitivity]
    weights = salience, 1.0 - salience
    norm = _NORMS[scoring.normalize]
    return Pair(base, tuned, column_weight, None, kind, norm, weights, BY_ROW)


def describe_scores(values: torch.Tensor) -> Pair:
    """Scores as they are, in linear order."""
    norm = _NORMS["none"]
    return Pair(None, values, None, None, scores.SCORES.value, norm, (1.0, 0.0), FLAT)


def ceil_div(a: int, b: int) -> int:
    """Programs of ``b`` for ``a``."""
    return -(-a // b)
