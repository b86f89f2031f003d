"""BASE and TUNED side by side: the same tensors, or what the output holds where they differ.

A tensor that only one of them has goes by a policy that must be named; of a vocabulary that grew in
fine-tuning the new rows are TUNED's. Nothing is left out or cropped unasked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from tailor_fast.checkpoint.errors import MismatchError, listed, shown_path
from tailor_fast.checkpoint.reader import TensorInfo
from tailor_fast.checkpoint.source import TensorSource

Side = Literal["base", "tuned"]

_POLICY = "; or say whose tensors the output is to have: missing 'base' or 'tuned'"


@dataclass(frozen=True, slots=True)
class Origin:
    """Bytes ``[begin, end)`` of a tensor of the output, and of the input that they come from."""

    side: Side
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Joined:
    """The tensors of an output.

    Attributes:
        tensors: by name; the order of TUNED's files, then what BASE alone has.
        origins: where the words of a tensor come from when it is not patched.
        resized: tensors that have more rows in TUNED than in BASE.
        only: tensors of the output that one input alone has.
        dropped: tensors of an input that the output does not have.
    """

    tensors: Mapping[str, TensorInfo]
    origins: Mapping[str, tuple[Origin, ...]]
    resized: frozenset[str]
    only: frozenset[str]
    dropped: frozenset[str]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided, a sentence each."""
        found = []
        if self.resized:
            rows = {self.tensors[name].shape[0] for name in self.resized}
            found.append(
                f"the vocabulary has {max(rows)} rows in TUNED and fewer in BASE: new rows of"
                f" {listed(sorted(self.resized))} are TUNED's"
            )
        if self.only:
            found.append(f"in one input only, and kept: {listed(sorted(self.only))}")
        if self.dropped:
            found.append(f"in one input only, and left out: {listed(sorted(self.dropped))}")
        return tuple(found)


def match_pair(base: TensorSource, tuned: TensorSource) -> None:
    """Check that two checkpoints have the same tensors.

    Args:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.

    Raises:
        MismatchError: a tensor is in one of them only, or differs in shape or dtype.
    """
    for one, other in ((base, tuned), (tuned, base)):
        only = [name for name in one.tensors if name not in other.tensors]
        if only:
            _refuse_names(one, other, only, "")
    for name, info in tuned.tensors.items():
        if info.shape != base.tensors[name].shape:
            _differ(base, tuned, name, "shape", "a resized vocabulary must be made equal first")
        _checked(base, tuned, name)


def join_pair(
    base: TensorSource,
    tuned: TensorSource,
    *,
    untouched: Side,
    missing: Side | None,
    without: Collection[str] = (),
) -> Joined:
    """Join the tensors of two checkpoints.

    Args:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.
        untouched: where the words of tensors that are not patched come from.
        missing: whose set of tensors the output has; None when both must have the same.
        without: tensors that are left out whatever ``missing`` says.

    Raises:
        MismatchError: a tensor is in one of them only and ``missing`` is None, or differs in dtype,
            or in shape in another way than by new rows in TUNED.
    """
    alone = [name for name in tuned.tensors if name not in base.tensors and name not in without]
    others = [name for name in base.tensors if name not in tuned.tensors and name not in without]
    if missing is None:
        for one, other, names in ((base, tuned, others), (tuned, base, alone)):
            if names:
                _refuse_names(one, other, names, _POLICY)
    tensors: dict[str, TensorInfo] = {}
    origins: dict[str, tuple[Origin, ...]] = {}
    resized = []
    for name, info in tuned.tensors.items():
        if name in base.tensors:
            tensors[name] = info
            if info.shape != _checked(base, tuned, name).shape:
                resized.append(name)
                origins[name] = _grown(base.tensors[name].nbytes, info.nbytes, untouched)
            else:
                origins[name] = (Origin(untouched, 0, info.nbytes),)
    kept: Sequence[tuple[Side, str, TensorInfo]] = (
        [("base", name, base.tensors[name]) for name in others]
        if missing == "base"
        else [("tuned", name, tuned.tensors[name]) for name in alone]
    )
    for side, name, info in kept:
        tensors[name] = info
        origins[name] = (Origin(side, 0, info.nbytes),)
    only = frozenset(name for _, name, _ in kept)
    return Joined(tensors, origins, frozenset(resized), only, frozenset({*alone, *others} - only))


def _grown(before: int, after: int, untouched: Side) -> tuple[Origin, ...]:
    if untouched == "tuned":
        return (Origin("tuned", 0, after),)
    return Origin("base", 0, before), Origin("tuned", before, after)


def _checked(base: TensorSource, tuned: TensorSource, name: str) -> TensorInfo:
    """What BASE has under ``name``, if it is what TUNED has, or that with fewer rows."""
    ours, theirs = base.tensors[name], tuned.tensors[name]
    if ours.dtype != theirs.dtype:
        _differ(base, tuned, name, "dtype", "save both checkpoints in one dtype")
    if ours.shape == theirs.shape:
        return ours
    if not ours.shape or ours.shape[1:] != theirs.shape[1:]:
        _differ(base, tuned, name, "shape", "both must be the same architecture")
    if ours.shape[0] > theirs.shape[0]:
        remedy = "give TUNED the rows that BASE has (resize_token_embeddings): none is cropped here"
        _differ(base, tuned, name, "shape", remedy)
    return ours


def refuse_shape(base: TensorSource, tuned: TensorSource, name: str) -> NoReturn:
    """Raise ``MismatchError`` for a layer that has other rows in TUNED than in BASE."""
    _differ(base, tuned, name, "shape", "only embeddings and heads may have new rows")


def _refuse_names(
    one: TensorSource, other: TensorSource, names: list[str], or_else: str
) -> NoReturn:
    problem = f"has {len(names)} tensors that {shown_path(other.path)} lacks: {listed(names)}"
    remedy = f"both must be the same architecture, saved with the same key names{or_else}"
    raise MismatchError(problem, path=one.path, remedy=remedy)


def _differ(base: TensorSource, tuned: TensorSource, name: str, what: str, remedy: str) -> NoReturn:
    ours, theirs = base.tensors[name], tuned.tensors[name]
    problem = (
        f"{what} must equal that of BASE, {ours.dtype} {list(ours.shape)} in"
        f" {shown_path(base.path_of(name))}; got {theirs.dtype} {list(theirs.shape)}"
    )
    raise MismatchError(problem, path=tuned.path_of(name), tensor=name, remedy=remedy)
