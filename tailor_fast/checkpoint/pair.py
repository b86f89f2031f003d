"""BASE and TUNED side by side: the same names, shapes and dtypes, or one clear sentence."""

from dataclasses import dataclass
from typing import NoReturn

from tailor_fast.checkpoint.errors import MismatchError, listed, shown_path
from tailor_fast.checkpoint.reader import Checkpoint, TensorInfo


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor in both checkpoints: equal name, shape and dtype."""

    base: TensorInfo
    tuned: TensorInfo


def match_pair(base: Checkpoint, tuned: Checkpoint) -> tuple[TensorPair, ...]:
    """Pair the tensors of two checkpoints.

    Args:
        base: checkpoint before fine-tuning.
        tuned: checkpoint after it.

    Returns:
        One pair per tensor, in the order of TUNED's files.

    Raises:
        MismatchError: a tensor is in one of them only, or differs in shape or dtype.
    """
    _check_names(base, tuned)
    _check_names(tuned, base)
    pairs = []
    for name, info in tuned.tensors.items():
        other = base.tensors[name]
        if other.shape != info.shape:
            remedy = "a resized vocabulary must be made equal first"
            _differ(base, other, tuned, info, "shape", remedy)
        if other.dtype != info.dtype:
            remedy = "save both checkpoints in one dtype"
            _differ(base, other, tuned, info, "dtype", remedy)
        pairs.append(TensorPair(other, info))
    return tuple(pairs)


def _check_names(one: Checkpoint, other: Checkpoint) -> None:
    only = [name for name in one.tensors if name not in other.tensors]
    if only:
        problem = f"has {len(only)} tensors that {shown_path(other.path)} lacks: {listed(only)}"
        remedy = "both must be the same architecture, saved with the same key names"
        raise MismatchError(problem, path=one.path, remedy=remedy)


def _differ(
    base: Checkpoint,
    base_info: TensorInfo,
    tuned: Checkpoint,
    tuned_info: TensorInfo,
    what: str,
    remedy: str,
) -> NoReturn:
    def described(info: TensorInfo) -> str:
        return f"{info.dtype} {list(info.shape)}"

    problem = (
        f"{what} must equal that of BASE, {described(base_info)} in"
        f" {shown_path(_file(base, base_info))}; got {described(tuned_info)}"
    )
    path = _file(tuned, tuned_info)
    raise MismatchError(problem, path=path, tensor=tuned_info.name, remedy=remedy)


def _file(checkpoint: Checkpoint, info: TensorInfo) -> str:
    shard = next(shard for shard in checkpoint.shards if shard.file_name == info.shard)
    return str(shard.path)
