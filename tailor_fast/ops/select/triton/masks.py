"""Masks of one tensor or pair: which kernels run, in which order, and what is read back.

Nothing is read back before the end: two flags then say whether a score must be refused and whether
the counts prove the bracket. Where they do not, the descent over all elements follows.
"""

import math
from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch

from tailor_fast._core.checks import fail
from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.options import BLOCK, Scoring
from tailor_fast.ops.select.radix import KeyInterval
from tailor_fast.ops.select.triton import lists, rows, state, whole
from tailor_fast.ops.select.triton.bracket import (
    BRACKET_LAUNCH,
    CAPACITY,
    CLASSIFY_LAUNCH,
    COLUMNS_LAUNCH,
    bracket_kernel,
    classify_kernel,
)
from tailor_fast.ops.select.triton.moments import with_moments
from tailor_fast.ops.select.triton.pair import (
    BY_COLUMN,
    BY_ROW,
    FOLD_LANES,
    Pair,
    ceil_div,
    describe,
    describe_scores,
    launch,
)
from tailor_fast.ops.select.triton.scores import OBS, ROW_BLOCK, WEIGHT

FIELDS, FLAGS, LEVELS, BINS = (
    value.value for value in (state.FIELDS, state.FLAGS, state.LEVELS, state.BINS)
)
SAMPLE_LANES = 2  # chunks of 16 elements: a sector of 16-bit words
COPIES = 32  # of a histogram over all elements, whose bins are as uneven as floats are
_END = 1 << 62


class Tuning(NamedTuple):
    """What tests turn; the mask does not depend on it.

    Attributes:
        bracket_from: elements of a unit of scope from which a bracket is sampled. Smaller units are
            searched whole: their lists would be too short for a sample's scatter.
        bracket: interval of keys instead of the sampled one.
    """

    bracket_from: int = 1 << 16
    bracket: tuple[int, int] | None = None


_DEFAULTS = Tuning()


class Work:
    """Device memory of one selection, zero where kernels count on it: one allocation, one fill."""

    def __init__(self, pair: Pair, copies: int) -> None:
        units, tiles, device = pair.units, pair.tiles, pair.tuned.device
        sizes = FLAGS, units * FIELDS, units * LEVELS * copies * BINS, ceil_div(units * tiles, 2)
        memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.flags, self.state, self.hist, counts = memory.split(sizes)
        self.counts: torch.Tensor = counts.view(torch.int32)
        self.ties = torch.empty(units * tiles, dtype=torch.int32, device=device)

    def field(self, field: int) -> torch.Tensor:
        """One number of every unit, int64 ``[units]``."""
        numbers: torch.Tensor = self.state.view(-1, FIELDS)[:, field]
        return numbers

    def read_flags(self) -> tuple[bool, bool]:
        """Wait for the device: is there a fault, did the bracket fail?"""
        fault, failed = self.flags.tolist()
        return bool(fault), bool(failed)


def topk_mask(scores: torch.Tensor, k: int, tuning: Tuning = _DEFAULTS) -> torch.Tensor:
    """Mask of the k best scores; see the public function."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel() == 0:
        return mask
    pair = describe_scores(scores)
    if _select(pair, mask, (k, k), scores.numel(), tuning):
        index = first_fault(pair)
        fail("topk_mask", "scores", "free of NaN", f"nan at linear index {index}")
    return mask


def select_patch(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
    scope: str,
    density: float,
    tuning: Tuning = _DEFAULTS,
) -> torch.Tensor:
    """Mask of the best scores in each unit of scope; see the public function."""
    row_count, cols = base.shape
    mask = torch.empty((row_count, cols), dtype=torch.bool, device=base.device)
    if mask.numel() == 0:
        return mask
    pair = with_moments(describe(base, tuned, column_weight, scoring)).ordered(scope)
    if scope == "row":
        fault = _select_rows(pair, mask, kept_count(cols, density))
    else:
        unit = row_count * (min(BLOCK, cols) if scope == "block" else cols)
        last = row_count * ((cols - 1) % BLOCK + 1) if scope == "block" else unit
        kept = kept_count(unit, density), kept_count(last, density)
        fault = _select(pair, mask, kept, unit, tuning)
    if fault:
        refuse(pair, scoring)
    return mask


def _select(
    pair: Pair, mask: torch.Tensor, kept: tuple[int, int], unit: int, tuning: Tuning
) -> bool:
    """Write the mask; the last unit of scope has its own count. True: a score must be refused."""
    target = mask.view(torch.uint8)
    if unit >= tuning.bracket_from or tuning.bracket is not None:
        fault, failed = _select_listed(pair, target, kept, tuning.bracket)
        if fault or not failed:
            return fault
    return _select_whole(pair, target, kept)


def _select_listed(
    pair: Pair, mask: torch.Tensor, kept: tuple[int, int], bracket: tuple[int, int] | None
) -> tuple[bool, bool]:
    """One pass over the pair, the rest over the candidates. Fault, and failure of the bracket."""
    units, tiles = pair.units, pair.tiles
    work = Work(pair, 1)
    if bracket is None:
        *tensors, row_count, cols, size, _, ws, wv = pair.arguments
        layout = {"ORDER": pair.order, "LANES": SAMPLE_LANES}
        if pair.norm == ROW_BLOCK.value:
            layout["LANES"] = FOLD_LANES
        launch(
            bracket_kernel, (units,), BRACKET_LAUNCH,
            *tensors, row_count, cols, size, ws, wv, work.state, *kept, **pair.terms, **layout,
        )  # fmt: skip
    else:
        work.field(state.LOW.value).fill_(bracket[0])
        work.field(state.HIGH.value).fill_(bracket[1])
    folds_columns = pair.order == BY_COLUMN and pair.norm == ROW_BLOCK.value
    config = COLUMNS_LAUNCH if folds_columns else CLASSIFY_LAUNCH
    room = torch.empty(units * tiles * CAPACITY.value, dtype=torch.int64, device=mask.device)
    launch(
        classify_kernel, (tiles, units), config,
        *pair.arguments, mask, work.state, work.flags, work.counts, room, **pair.constants,
    )  # fmt: skip
    grid = (ceil_div(tiles, lists.GROUP.value), units)
    for level in range(LEVELS):
        launch(
            lists.list_digits_kernel, grid, lists.LISTS_LAUNCH,
            work.counts, room, work.state, work.flags, work.hist, tiles, *kept, level,
        )  # fmt: skip
    launch(
        lists.list_ties_kernel, grid, lists.TIES_LAUNCH,
        work.counts, room, work.state, work.ties, tiles,
    )  # fmt: skip
    launch(
        lists.list_mark_kernel, grid, lists.LISTS_LAUNCH,
        work.counts, room, work.state, mask, tiles, pair.shape[1], pair.blocks,
        ORDER=pair.order, WIDE=pair.wide,
    )  # fmt: skip
    return work.read_flags()


def _select_whole(pair: Pair, mask: torch.Tensor, kept: tuple[int, int]) -> bool:
    """A pass over the pair per level, one for the marks, one over tiles with ties. Fault."""
    copies = max(1, COPIES // pair.units)
    work = Work(pair, copies)
    for level in range(LEVELS):
        launch(
            whole.digits_kernel, (pair.tiles, pair.units), whole.WHOLE_LAUNCH,
            *pair.arguments, work.state, work.flags, work.hist, *kept, level, copies,
            **pair.constants,
        )  # fmt: skip
    return mark(pair, mask, work)


def mark(pair: Pair, mask: torch.Tensor, work: Work) -> bool:
    """Write the mask of a threshold and its ties, which stand in the state. Fault."""
    grid = (pair.tiles, pair.units)
    launch(
        whole.ties_kernel, grid, whole.WHOLE_LAUNCH,
        *pair.arguments, mask, work.state, work.flags, work.ties, **pair.constants,
    )  # fmt: skip
    launch(
        whole.mark_ties_kernel, grid, whole.WHOLE_LAUNCH,
        *pair.arguments, mask, work.state, work.ties, **pair.constants,
    )  # fmt: skip
    return work.read_flags()[0]


def _select_rows(pair: Pair, mask: torch.Tensor, k: int) -> bool:
    """Every row for itself. Fault."""
    flags = torch.zeros(FLAGS, dtype=torch.int64, device=mask.device)
    row_count, cols = mask.shape
    step = max(1, rows.KEPT // cols)
    tile = rows.rows_tile(cols)
    config = rows.rows_launch(tile, tile[1] >= cols)
    for row in range(0, row_count, step):
        part = pair.rows(row, row + step)
        target = mask[row : row + step].view(torch.uint8)
        keys = torch.empty(target.shape, dtype=torch.int32, device=mask.device)
        write_scores(part, keys, flags)
        launch(
            rows.rows_kernel, (ceil_div(len(target), tile[0]),), config,
            keys, target, *target.shape, k, cols.bit_length() + 1,
            ROWS=tile[0], WIDTH=tile[1], ON_CHIP=tile[1] >= cols,
        )  # fmt: skip
    return bool(flags[state.FAULT.value])


def write_scores(
    pair: Pair,
    out: torch.Tensor,
    flags: torch.Tensor,
    counts: torch.Tensor | None = None,
    interval: KeyInterval | None = None,
) -> None:
    """Write all scores, or keys where ``out`` is int32.

    Args:
        pair: not empty.
        out: float32 or int32, of the pair's size.
        flags: int64 ``[2]``; with an interval ``[3]``, whose last is raised by the keys above it.
        counts: int32 ``[copies, 65536]``, raised by the counts of the digits of the keys.
        interval: which digits, see ``KeyInterval``.
    """
    high, prefix, above, copies = 0, 0, None, 0
    if interval is not None and counts is not None:
        high, prefix = interval.high, interval.prefix or 0
        above, copies = flags[FLAGS:], len(counts)
    launch(
        whole.scores_kernel, (pair.tiles,), whole.SCORES_LAUNCH,
        *pair.arguments, out, flags, counts, above, high, prefix, copies,
        **pair.constants, KEYS=out.dtype == torch.int32, COUNTED=interval is not None,
        UPPER=interval is not None and interval.prefix is None,
    )  # fmt: skip


def first_fault(pair: Pair) -> int:
    """Linear index of the first element that must be refused; only where there is one."""
    if pair.order == BY_COLUMN:
        pair = replace(pair, order=BY_ROW)
    first = torch.full((1,), _END, dtype=torch.int64, device=pair.tuned.device)
    base, tuned, weight, _, *sizes = pair.arguments
    constants = {name: value for name, value in pair.constants.items() if name != "MASKED"}
    launch(
        whole.fault_kernel, (pair.tiles,), whole.WHOLE_LAUNCH,
        base, tuned, weight, *sizes, first, **constants,
    )  # fmt: skip
    return int(first)


def refuse(pair: Pair, scoring: Scoring) -> NoReturn:
    """Name the first element without a finite score, and what it has."""
    index = first_fault(pair)
    base, tuned = (x.view(-1)[index].float() for x in pair.tensors)
    salience = (tuned - base).abs()
    squares = {OBS.value: salience * salience, WEIGHT.value: tuned * tuned}
    sensitivity = squares.get(pair.kind, salience)
    if pair.column_weight is not None:
        sensitivity = sensitivity * pair.column_weight[index % pair.tuned.shape[1]]
    values = float(salience), float(sensitivity), math.inf
    got = next(value for value in values if not math.isfinite(value))
    hint = "look there for NaN or infinity in base and tuned, or for overflow of their delta"
    place = f"{got} at linear index {scoring.first_index + index}"
    fail(scoring.op, scoring.describe("scores"), "finite", place, hint)
