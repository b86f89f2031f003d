"""Masks of one tensor or pair: which kernels run, in which order, and what is read back.

Nothing is read back before the end: two flags then say whether a score must be refused and whether
the counts prove the bracket. Where they do not, the descent over all elements follows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch

from tailor_fast._core.checks import fail
from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.options import BLOCK, Scoring
from tailor_fast.ops.select.radix import KeyInterval
from tailor_fast.ops.select.triton import lists as candidates
from tailor_fast.ops.select.triton import rows, state, whole
from tailor_fast.ops.select.triton.bracket import (
    BRACKET_LAUNCH,
    CAPACITY,
    bracket_kernel,
    classify_kernel,
    classify_launch,
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
from tailor_fast.ops.select.triton.table import GROUP, Member, Table, member

FIELDS, FLAGS, LEVELS, BINS, PARTS = (
    value.value for value in (state.FIELDS, state.FLAGS, state.LEVELS, state.BINS, state.PARTS)
)
SAMPLE_LANES = 2  # chunks of 16 elements: a sector of 16-bit words
COPIES = 32  # of a histogram over all elements, whose bins are as uneven as floats are
# Elements of the tensors that one grid takes: lists of candidates take half a byte for each, and
# 14 grids take a 7B model, which the host fills in half the time that a card needs for them.
AT_ONCE = 1 << 29
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
        sizes = FLAGS, units * FIELDS, units * LEVELS * copies * BINS
        memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.flags, self.state, self.hist = memory.split(sizes)
        self.ties = torch.empty(units * tiles, dtype=torch.int32, device=device)

    def field(self, field: int) -> torch.Tensor:
        """One number of every unit, int64 ``[units]``."""
        numbers: torch.Tensor = self.state.view(-1, FIELDS)[:, field]
        return numbers


def topk_mask(scores: torch.Tensor, k: int, tuning: Tuning = _DEFAULTS) -> torch.Tensor:
    """Mask of the k best scores; see the public function."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel() == 0:
        return mask
    one = Member(describe_scores(scores), mask.view(torch.uint8), (k, k))
    if _select([one], [scores.numel()], tuning)[0]:
        index = first_fault(one.pair)
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
    pairs = [(base, tuned, column_weight)]
    return select_patches(pairs, [scoring], scope, density, tuning)[0]


def select_patches(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    scorings: Sequence[Scoring],
    scope: str,
    density: float,
    tuning: Tuning = _DEFAULTS,
) -> list[torch.Tensor]:
    """Masks of several pairs, whose options are the same: as many as fit share each grid.

    The device is waited for once, at the end.
    """
    masks = [torch.empty(pair[0].shape, dtype=torch.bool, device=pair[0].device) for pair in pairs]
    members, units, refusable = [], [], []
    for tensors, scoring, mask in zip(pairs, scorings, masks, strict=True):
        if mask.numel() == 0:
            continue
        pair = with_moments(describe(*tensors, scoring)).ordered(scope)
        refusable.append((pair, scoring))
        members.append(member(pair, mask, scope, density))
        units.append(len(mask) * (min(BLOCK, mask.shape[1]) if scope == "block" else mask.shape[1]))
    if scope == "row":
        faults = [_select_rows(one.pair, one.mask, density) for one in members]
    else:
        faults = _select(members, units, tuning)
    for fault, (pair, scoring) in zip(faults, refusable, strict=True):
        if fault:
            refuse(pair, scoring)
    return masks


def _select(members: Sequence[Member], units: Sequence[int], tuning: Tuning) -> list[bool]:
    """Write the masks. For each member, whether a score must be refused.

    Args:
        members: not empty.
        units: elements of each one's units of scope.
        tuning: what tests turn.
    """
    listed = [
        one
        for one, unit in zip(members, units, strict=True)
        if unit >= tuning.bracket_from or tuning.bracket is not None
    ]
    settled: dict[int, bool] = {}
    batches = list(_batches(listed))
    flags = [_select_listed(batch, tuning.bracket) for batch in batches]
    if flags:
        found = iter(torch.cat(flags).tolist())  # waits for the device
        for batch in batches:
            for one, (fault, failed) in zip(batch, found, strict=False):
                if fault or not failed:
                    settled[id(one)] = bool(fault)
    for one in members:
        if id(one) not in settled:
            settled[id(one)] = _select_whole(one)
    return [settled[id(one)] for one in members]


def _batches(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members that one grid takes: of equal constants, about ``AT_ONCE`` elements."""
    by_key: dict[object, list[Member]] = {}
    for one in members:
        by_key.setdefault(one.key, []).append(one)
    for alike in by_key.values():
        batch: list[Member] = []
        elements = 0
        for one in alike:
            if batch and elements + one.mask.numel() > AT_ONCE:
                yield batch
                batch, elements = [], 0
            batch.append(one)
            elements += one.mask.numel()
        yield batch


def _select_listed(members: Sequence[Member], bracket: tuple[int, int] | None) -> torch.Tensor:
    """One pass over the pairs, the rest over the candidates; ``FLAGS`` of each, on the device."""
    table, pair, constants = Table(members), members[0].pair, members[0].constants
    device, units, groups = members[0].mask.device, table.units, table.groups
    tiles = groups * GROUP.value
    sizes = len(members) * FLAGS, units * FIELDS, units * LEVELS * BINS, tiles // 2
    memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    flags, states, hist, counts = memory.split(sizes)
    counts = counts.view(torch.int32)
    lists = torch.empty(tiles * CAPACITY.value, dtype=torch.int64, device=device)
    ties = torch.empty(tiles, dtype=torch.int32, device=device)
    if bracket is None:
        layout = {name: constants[name] for name in ("DTYPE", "ORDER", "ALIGNED")}
        layout["LANES"] = FOLD_LANES if pair.norm == ROW_BLOCK.value else SAMPLE_LANES
        launch(
            bracket_kernel, (PARTS, units), BRACKET_LAUNCH,
            table.lines, *pair.weight_bits, states, **pair.terms, **layout,
        )  # fmt: skip
    else:
        for start, key in zip((state.LOWS.value, state.HIGHS.value), bracket, strict=True):
            states.view(-1, FIELDS)[:, start : start + PARTS] = key
    where = table.lines, table.map
    config = classify_launch(pair.kind, pair.order, pair.norm, constants["ALIGNED"])
    launch(
        classify_kernel, (tiles,), config,
        *where, *pair.weight_bits, states, flags, counts, lists, **constants,
    )  # fmt: skip
    for level in range(LEVELS):
        launch(
            candidates.list_digits_kernel, (groups,), candidates.LISTS_LAUNCH,
            *where, counts, lists, states, flags, hist, level,
        )  # fmt: skip
    launch(
        candidates.list_ties_kernel, (groups,), candidates.TIES_LAUNCH,
        *where, counts, lists, states, ties,
    )  # fmt: skip
    launch(
        candidates.list_mark_kernel, (groups,), candidates.LISTS_LAUNCH,
        *where, counts, lists, states, ORDER=pair.order, WIDE=pair.wide,
    )  # fmt: skip
    found: torch.Tensor = flags.view(-1, FLAGS)
    return found


def _select_whole(one: Member) -> bool:
    """A pass over the pair per level, one for the marks, one over tiles with ties. Fault."""
    pair, mask, kept = one
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
    return bool(work.flags[state.FAULT.value])


def _select_rows(pair: Pair, mask: torch.Tensor, density: float) -> bool:
    """Every row for itself. Fault."""
    k = kept_count(mask.shape[1], density)
    flags = torch.zeros(FLAGS, dtype=torch.int64, device=mask.device)
    row_count, cols = mask.shape
    step = max(1, rows.KEPT // cols)
    tile = rows.rows_tile(cols)
    config = rows.rows_launch(tile, tile[1] >= cols)
    for row in range(0, row_count, step):
        part = pair.rows(row, row + step)
        target = mask[row : row + step]
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
