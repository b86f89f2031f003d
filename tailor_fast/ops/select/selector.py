"""``TopKSelector``: one k over many tensors, what the scopes ``layer`` and ``global`` need."""

from dataclasses import dataclass
from typing import Any

import torch

from tailor_fast._core.backend import Backend, implementation
from tailor_fast._core.checks import check_range, describe, fail
from tailor_fast.ops.select.options import (
    Normalize,
    Scoring,
    Sensitivity,
    check_column_weight,
    check_options,
    check_pair,
)
from tailor_fast.ops.select.schema import ORDER
from tailor_fast.ops.select.search import Found, ThresholdSearch

OP = "TopKSelector"
# Elements counted at a time: what can be added to the keys held before a look. Fewer where little
# memory is given, since all of them may have to be held for a moment.
SLICE, LEAST_SLICE = 1 << 22, 1 << 16


@dataclass(slots=True)
class _Marking:
    """How far one tensor has been marked."""

    ties: torch.Tensor  # int64 [1], equal to the threshold and still to be marked
    rows: int = 0
    kept: int = 0


class TopKSelector:
    """Finds the best ``floor(density * n)`` of all elements of many tensors, and their masks.

    ``observe`` every tensor, in any order; ``finish``; while that returns False, observe all of
    them once more and finish again; then ``mask`` any tensor, in any order, any number of times.
    The masks are those of one ranking over all scores, ties to the first tensor in the order of
    sorted names and then to the lowest linear index: independent of the order of observation, of
    chunks, device, backend and threads.

    One round is enough when the keys collected around the estimated threshold still hold it at the
    end: always for up to ``memory / 4`` elements, and for several times as many when the tensors
    observed first resemble the others (mix the depths of the model). Otherwise it takes two, and
    three only where more than ``memory / 4`` elements share the upper 16 bits of the threshold.
    ``memory`` bounds what is kept between calls, a few numbers per tensor apart; ``finish`` lets go
    of it when it returns True.

    A tensor may be given in chunks of rows, first to last, except with ``normalize="tensor"``,
    whose moments need the whole of it. An ``observe`` that meets NaN or infinity has counted a part
    of its tensor: the selector is then spent.

    Args:
        density: fraction kept, in [0, 1], read as the decimal that it prints as.
        sensitivity: as in ``select_patch``.
        salience_weight: as in ``select_patch``.
        normalize: as in ``select_patch``; ``tensor`` is each tensor for itself.
        memory: bytes of keys held at most; ``observe`` takes a quarter as many, or those of one
            row, and some MiB beside them.
        backend: see ``tailor_fast.backends()``.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.
    """

    def __init__(
        self,
        density: float,
        *,
        sensitivity: Sensitivity = "obs",
        salience_weight: float = 0.5,
        normalize: Normalize = "row_block",
        memory: int = 1 << 26,
        backend: Backend = "auto",
    ) -> None:
        check_range(OP, "density", density, 0, 1)
        check_options(OP, sensitivity, salience_weight, normalize)
        check_range(OP, "memory", memory, 0, float("inf"), whole=True)
        self._scoring = Scoring(sensitivity, salience_weight, normalize)
        self._backend = backend
        self._search = ThresholdSearch(density, memory // 4)
        self._shapes: dict[str, tuple[int, int]] = {}
        self._observed: dict[str, int] = {}  # rows, in this round
        self._markings: dict[str, _Marking] = {}
        self._first_round = True
        self._spent = False
        self._found: Found | None = None

    def observe(
        self,
        name: str,
        base: torch.Tensor,
        tuned: torch.Tensor,
        column_weight: torch.Tensor | None = None,
        *,
        first_row: int = 0,
        rows: int | None = None,
    ) -> None:
        """Count the scores of one tensor, or of its next rows.

        Args:
            name: tensor's name; the sorted names are the order of ties.
            base: float32/bfloat16/float16 ``[rows, cols]``, or some rows of it.
            tuned: same shape and dtype.
            column_weight: as in ``select_patch``.
            first_row: where these rows are in the tensor; rows come in order.
            rows: rows of the whole tensor. None: these are all of it.

        Raises:
            TypeError: not a tensor, or another dtype.
            ValueError: wrong shape, device or stride; NaN or infinity in the scores; a tensor
                observed twice in a round, new in a later round, or of another shape than before;
                rows out of order; called after ``finish`` returned True.
        """
        op = f"{OP}.observe"
        self._check_usable(op)
        if self._found is not None:
            fail(op, "the call", "before finish() returned True", "a call after it")
        shape = self._check(op, name, base, tuned, column_weight, first_row, rows)
        if not self._first_round and name not in self._shapes:
            fail(op, "name", "one of the tensors of the first round", repr(name))
        done = self._observed.get(name, 0)
        if name in self._observed and done == shape[0]:
            fail(op, repr(name), "observed once in a round", "a second time")
        _check_order(op, name, done, first_row)
        scoring = self._scoring_of(op, name, first_row * shape[1], column_weight)
        self._spent = True
        self._count(base, tuned, column_weight, scoring, name)
        self._spent = False
        self._shapes[name] = shape
        self._observed[name] = first_row + base.shape[0]

    def finish(self) -> bool:
        """Close a round of observation.

        Returns:
            True: the threshold and its ties are exact, ``mask`` can be called. False: observe every
            tensor once more, then call ``finish`` again.

        Raises:
            ValueError: nothing was observed, a tensor is incomplete or missing in this round, or
                counts show that a tensor is not what it was in the round before.
        """
        op = f"{OP}.finish"
        self._check_usable(op)
        if self._found is not None:
            return True
        if not self._shapes:
            fail(op, "the call", "after observe()", "nothing observed")
        for name, (rows, _) in self._shapes.items():
            done = self._observed.get(name)
            if done != rows:
                got = "not at all" if done is None else f"{done} of {rows} rows"
                fail(op, repr(name), "observed in this round", got)
        self._found = self._search.finish_round()
        if self._found is not None:
            self._search.drop()
        self._first_round = False
        self._observed = {}
        return self._found is not None

    def kept(self, name: str) -> int:
        """Return how many elements of a tensor are kept, once ``finish`` returned True.

        Raises:
            ValueError: called before that, or ``name`` was never observed.
        """
        return self._result(f"{OP}.kept", name).shares[name].kept

    def mask(
        self,
        name: str,
        base: torch.Tensor,
        tuned: torch.Tensor,
        column_weight: torch.Tensor | None = None,
        *,
        first_row: int = 0,
        rows: int | None = None,
    ) -> torch.Tensor:
        """Return the mask of one tensor, or of its next rows, once ``finish`` returned True.

        Args:
            name: tensor's name.
            base: as observed, whole or in chunks of rows that need not be those of ``observe``.
            tuned: as observed.
            column_weight: as observed.
            first_row: where these rows are in the tensor; rows come in order, 0 starts again.
            rows: rows of the whole tensor. None: these are all of it.

        Returns:
            bool, shape of ``base``.

        Raises:
            TypeError: not a tensor, or another dtype.
            ValueError: called too early; an unknown name; wrong shape, device or stride; rows out
                of order; counts show that the tensor is not what was observed.
        """
        op = f"{OP}.mask"
        found = self._result(op, name)
        shape = self._check(op, name, base, tuned, column_weight, first_row, rows)
        share = found.shares[name]
        if first_row == 0 or name not in self._markings:
            self._markings[name] = _Marking(torch.tensor([share.ties]))
        marking = self._markings[name]
        _check_order(op, name, marking.rows, first_row)
        scoring = self._scoring_of(op, name, first_row * shape[1], column_weight)
        threshold = torch.tensor([found.threshold], dtype=torch.int32, device=base.device)
        marking.ties = marking.ties.to(base.device)
        mask: torch.Tensor = self._module(base).mark_pair_(
            base, tuned, column_weight, scoring, threshold, marking.ties
        )
        marking.rows += base.shape[0]
        marking.kept += int(mask.count_nonzero())
        if marking.rows == shape[0] and marking.kept != share.kept:
            got = f"{marking.kept} elements above the threshold instead of {share.kept}"
            fail(op, repr(name), "what was observed", got)
        return mask

    def _check_usable(self, op: str) -> None:
        if self._spent:
            hint = f"start again with a new {OP}"
            fail(op, "the selector", "whole", "one whose observe() failed half way", hint)

    def _result(self, op: str, name: str) -> Found:
        self._check_usable(op)
        if self._found is None:
            fail(op, "the call", "after finish() returned True", "a call before it")
        if name not in self._found.shares:
            fail(op, "name", "one of the observed tensors", repr(name))
        return self._found

    def _check(
        self,
        op: str,
        name: Any,
        base: Any,
        tuned: Any,
        column_weight: Any,
        first_row: Any,
        rows: Any,
    ) -> tuple[int, int]:
        """Check the arguments and return the shape of the whole tensor."""
        if not isinstance(name, str):
            fail(op, "name", "a string", describe(name), error=TypeError)
        check_pair(op, base, tuned, column_weight, self._scoring.salience_weight)
        given, cols = base.shape
        rows = given if rows is None else rows
        check_range(op, "rows", rows, given, float("inf"), whole=True)
        check_range(op, "first_row", first_row, 0, rows - given, whole=True)
        if self._scoring.normalize == "tensor" and given != rows:
            hint = "normalize row_block, row and none take chunks of rows"
            got = f"{given} of {rows} rows"
            fail(op, repr(name), "whole for normalize='tensor'", got, hint)
        known = self._shapes.get(name, (rows, cols))
        if known != (rows, cols):
            fail(op, repr(name), f"{list(known)} as before", str([rows, cols]))
        return known

    def _scoring_of(
        self, op: str, name: str, first_index: int, column_weight: torch.Tensor | None
    ) -> Scoring:
        scoring = self._scoring._replace(op=op, name=name, first_index=first_index)
        check_column_weight(column_weight, scoring)
        return scoring

    def _module(self, base: torch.Tensor) -> Any:
        return implementation("select", ORDER, self._backend, base.device.type)

    def _count(
        self,
        base: torch.Tensor,
        tuned: torch.Tensor,
        column_weight: torch.Tensor | None,
        scoring: Scoring,
        name: str,
    ) -> None:
        """Give the search every slice of rows; the interval it wants may shrink in between."""
        module, search = self._module(base), self._search
        if not base.numel():
            search.add(name, 0, 0)
            return
        if scoring.normalize == "tensor":
            affine = module.tensor_affine(base, tuned, column_weight, scoring)
            scoring = scoring._replace(affine=affine)
        step = max(1, min(SLICE, max(LEAST_SLICE, search.budget // 4)) // base.shape[1])
        for row in range(0, base.shape[0], step):
            part = slice(row, row + step)
            at = scoring._replace(first_index=scoring.first_index + row * base.shape[1])
            room = search.room(base[part].numel())
            found, above = module.count_keys_(
                search.counts, room, base[part], tuned[part], column_weight, at, search.interval
            )
            search.add(name, found, above)


def _check_order(op: str, name: str, done: int, first_row: int) -> None:
    if first_row != done:
        fail(op, "first_row", f"{done}, the next row of {name!r}", str(first_row))
