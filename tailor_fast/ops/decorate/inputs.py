"""Checks of the arguments of the ``decorate`` op that need no data."""

from typing import Any, NamedTuple, cast

import torch

from tailor_fast._core.backend import Backend
from tailor_fast._core.checks import BOOL, FLOAT32, FLOATS, check_range, check_tensor, fail
from tailor_fast.ops.decorate.factors import BLOCK
from tailor_fast.ops.decorate.results import ObsFactor

_MAX_SCALE = 1e30  # of a damping or an energy; float32 holds its products with a Gram
_SMALLEST_TOL = 1e-12  # below it the proof would ask for more than float64 residuals give


class OfficialOptions(NamedTuple):
    """Options of ``decorate_official``, which documents them."""

    sparsity: float
    score_weights: tuple[float, float]
    block_size: int
    percdamp: float
    prunen: int
    prunem: int
    reproduce_nan: bool


def check_weights(
    op: str, first: tuple[str, Any], second: tuple[str, Any], dims: dict[str, int]
) -> None:
    """Two weights ``[rows, cols]`` of one dtype, each given as (name, tensor)."""
    (name, weight), (other, like) = first, second
    check_tensor(op, name, weight, ("rows", "cols"), FLOATS, dims)
    check_tensor(op, other, like, ("rows", "cols"), FLOATS, dims, like=weight)
    if like.dtype != weight.dtype:
        dtypes = (str(tensor.dtype).removeprefix("torch.") for tensor in (weight, like))
        expected, got = dtypes
        fail(op, other, f"{expected} like {name}", got, error=TypeError)


def check_problem(
    op: str, weight: torch.Tensor, mask: Any, gram: Any, dims: dict[str, int]
) -> None:
    """Mask and Gram of a weight ``[rows, cols]``."""
    check_tensor(op, "mask", mask, ("rows", "cols"), BOOL, dims, like=weight)
    check_tensor(op, "gram", gram, ("cols", "cols"), FLOAT32, dims, like=weight)


def check_factor(
    op: str, factor: Any, gram: torch.Tensor, backend: Backend
) -> tuple[list[torch.Tensor] | None, Backend]:
    """A factor of ``gram [cols, cols]``; returns its tensors, and the backend that takes them."""
    if factor is None:
        return None, backend
    if not isinstance(factor, ObsFactor):
        fail(op, "factor", "what factor_obs returns", type(factor).__name__, error=TypeError)
    cols = len(gram)
    blocks = (-(-cols // BLOCK), BLOCK, BLOCK)
    check_tensor(op, "factor.upper", factor.upper, (cols, cols), FLOAT32, like=gram)
    check_tensor(op, "factor.inverses", factor.inverses, blocks, FLOAT32, like=gram)
    check_tensor(op, "factor.damping", factor.damping, (), (torch.float64,), like=gram)
    if backend not in ("auto", factor.backend):
        hint = f"factor_obs(gram, backend={backend!r})"
        fail(op, "factor", f"made by backend {backend!r}", f"one by {factor.backend!r}", hint)
    return [*factor[:3]], cast(Backend, factor.backend)


def check_right_side(
    op: str, weight: torch.Tensor, rhs: Any, target_energy: Any, dims: dict[str, int]
) -> torch.Tensor | None:
    """The right-hand side and its energy; returns the energy as a tensor."""
    if rhs is not None:
        check_tensor(op, "rhs", rhs, ("rows", "cols"), FLOAT32, dims, like=weight)
    if target_energy is None:
        return None
    if rhs is None:
        fail(op, "target_energy", "None without rhs", repr(target_energy))
    if isinstance(target_energy, torch.Tensor):
        check_tensor(op, "target_energy", target_energy, (), (torch.float64,), like=weight)
        return target_energy
    check_scale(op, "target_energy", target_energy)
    return torch.tensor(target_energy, dtype=torch.float64, device=weight.device)


def check_scale(op: str, name: str, value: Any) -> None:
    """A number that is not negative, not NaN and not so large that products overflow."""
    check_range(op, name, value, 0.0, _MAX_SCALE)


def check_solver(op: str, percdamp: Any, damping: Any, tol: Any, max_iterations: Any) -> None:
    """Options of the exact solve."""
    check_scale(op, "percdamp", percdamp)
    if damping is not None:
        check_scale(op, "damping", damping)
    check_range(op, "tol", tol, _SMALLEST_TOL, 1.0)
    check_range(op, "max_iterations", max_iterations, 1, 10**6, whole=True)


def check_official(
    op: str,
    weight: torch.Tensor,
    gram: Any,
    tops_mask: Any,
    options: OfficialOptions,
    dims: dict[str, int],
) -> None:
    """Gram, mask and options of ``decorate_official``."""
    check_tensor(op, "gram", gram, ("cols", "cols"), FLOAT32, dims, like=weight)
    if tops_mask is not None:
        check_tensor(op, "tops_mask", tops_mask, ("rows", "cols"), BOOL, dims, like=weight)
    check_range(op, "sparsity", options.sparsity, 0.0, 1.0)
    if options.sparsity == 1.0:  # where the authors' index is out of range
        fail(op, "sparsity", "less than 1", "1.0")
    weights: Any = options.score_weights
    if not isinstance(weights, tuple | list) or len(weights) != 2:
        fail(op, "score_weights", "two numbers", repr(weights), error=TypeError)
    for value in weights:
        check_range(op, "score_weights", value, 0.0, 1.0)
    check_range(op, "block_size", options.block_size, 1, 2**31 - 1, whole=True)
    check_scale(op, "percdamp", options.percdamp)
    check_range(op, "prunem", options.prunem, 0, 2**31 - 1, whole=True)
    check_range(op, "prunen", options.prunen, 0, options.prunem, whole=True)
    flag: Any = options.reproduce_nan
    if not isinstance(flag, bool):
        fail(op, "reproduce_nan", "a bool", repr(flag), error=TypeError)
    if options.prunen:
        _check_groups(op, weight.shape[1], tops_mask, options)


def _check_groups(op: str, cols: int, tops_mask: Any, options: OfficialOptions) -> None:
    """n:m takes ``prunen`` columns of every group, of the narrowest one too, and no other mask."""
    if tops_mask is not None:
        fail(op, "tops_mask", "None with prunen", "a mask", "prunen makes its own")
    for width in {min(options.block_size, cols), cols % options.block_size}:
        narrowest = width % options.prunem
        if 0 < narrowest < options.prunen:
            fail(
                op,
                "prunen",
                f"at most {narrowest}, the columns of the last group of a block of {width}",
                str(options.prunen),
                "a block_size and a number of columns that prunem divides",
            )
