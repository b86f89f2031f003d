"""The authors' sweep: torch's own means and deviations for the scores, columns in one kernel.

The semantics are those of the reference, whose scores these are operation for operation: what the
authors' code keeps hangs on the last bit of a score. The inverse's factor comes from one
factorisation in place of the authors' three, which rounds less.
"""

import math

import torch

from tailor_fast.ops.decorate.inputs import OfficialOptions
from tailor_fast.ops.decorate.official import LinAlgError, no_factor, warn_of_undefined
from tailor_fast.ops.decorate.triton.sweep import sweep_block

Tensor = torch.Tensor


def decorate_official_(
    weight: Tensor, base: Tensor, gram: Tensor, tops_mask: Tensor | None, options: OfficialOptions
) -> tuple[Tensor, Tensor]:
    """Turn the tuned ``weight`` into the authors' result; returns what was kept, and their loss.

    Beside the result it holds a float32 copy of the weight, and three matrices of the Gram's size
    while it factorises, one afterwards.
    """
    cols = weight.shape[1]
    upper = _factorize(gram, options.percdamp)
    moving = weight.to(torch.float32, copy=True)
    kept = torch.empty_like(weight, dtype=torch.bool)
    loss = gram.new_zeros((), dtype=torch.float64)
    undefined = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, cols, options.block_size):
        columns = slice(start, min(start + options.block_size, cols))
        original = base[:, columns]
        working, target = moving[:, columns], original.float()
        factor, errors = upper[columns, columns], torch.empty_like(target)
        if options.prunen:
            keep = _sweep_groups(working, target, factor, errors, options)
        else:
            if tops_mask is not None:
                keep = ~tops_mask[:, columns]
            else:
                salience = (weight[:, columns] - original).abs_().float()
                score = _score(working, salience, factor, options)
                undefined += score.isnan().sum()
                keep = ~(score <= _threshold(score, options.sparsity))
            sweep_block(working, target, keep, factor, errors)
        kept[:, columns] = keep
        weight[:, columns] = torch.where(keep, working.to(weight.dtype), original)
        loss += errors.square().sum(dtype=torch.float64) / 2
        later = slice(columns.stop, cols)
        moving[:, later].addmm_(errors, upper[columns, later])
    warn_of_undefined(int(undefined))
    return kept, loss


def _factorize(gram: Tensor, percdamp: float) -> Tensor:
    """``U`` with ``U^T U`` the inverse of the damped Gram, dead columns at 1."""
    reverse = gram.flip(0, 1)
    diagonal = reverse.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += percdamp * diagonal.mean()
    try:
        lower = torch.linalg.cholesky(reverse)
    except LinAlgError as error:
        raise no_factor(error, percdamp) from error
    del reverse
    inverse = torch.eye(len(gram), device=gram.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def _score(working: Tensor, salience: Tensor, factor: Tensor, options: OfficialOptions) -> Tensor:
    """Fused score ``[rows, block]``: of the weight as it stands now, and of the delta as it was."""
    sensitivity = working**2 / factor.diagonal() ** 2
    parts = [_standardize(part, options.reproduce_nan) for part in (salience, sensitivity)]
    return options.score_weights[0] * parts[0] + options.score_weights[1] * parts[1]


def _standardize(values: Tensor, reproduce_nan: bool) -> Tensor:
    """``z`` of each row with the unbiased std, which one column does not have."""
    undefined = values.shape[1] == 1
    std = torch.full_like(values, math.nan) if undefined else values.std(1, keepdim=True)
    z = (values - values.mean(1, keepdim=True)) / std
    return z if reproduce_nan else torch.where(std > 0, z, 0)


def _threshold(score: Tensor, sparsity: float) -> Tensor:
    """The score at position ``int(n * sparsity)`` of all in ascending order, NaN last."""
    # kthvalue is not deterministic on a GPU.
    return score.flatten().sort().values[int(score.numel() * sparsity)]


def _sweep_groups(
    working: Tensor, target: Tensor, factor: Tensor, errors: Tensor, options: OfficialOptions
) -> Tensor:
    """n:m within a block: a group's mask is chosen when the sweep gets there; ``[rows, block]``."""
    keep = torch.ones_like(target, dtype=torch.bool)
    width = working.shape[1]
    for start in range(0, width, options.prunem):
        group = slice(start, min(start + options.prunem, width))
        score = working[:, group] ** 2 / factor.diagonal()[group] ** 2
        lowest = score.topk(options.prunen, dim=1, largest=False).indices
        keep[:, group].scatter_(1, lowest, False)
        sweep_block(working, target, keep, factor, errors, group.start, group.stop)
    return keep
