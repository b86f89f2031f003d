"""The authors' sweep: scores and columns in C++, the score at the threshold by selection.

The semantics are those of ``reference/official.py``. The inverse's factor comes from one
factorisation in place of the authors' three, which rounds less.
"""

import torch

from tailor_fast import _C
from tailor_fast.ops.decorate.inputs import OfficialOptions
from tailor_fast.ops.decorate.native.sweep import Block, sweep_columns
from tailor_fast.ops.decorate.official import LinAlgError, no_factor, warn_of_undefined

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
    loss = torch.zeros((), dtype=torch.float64)
    undefined = 0
    for start in range(0, cols, options.block_size):
        columns = slice(start, start + options.block_size)
        original = base[:, columns]
        working, target = moving[:, columns], original.float()
        factor = upper[columns, columns]
        block, errors = Block.build(factor, sign=1), torch.empty_like(target)
        if options.prunen:
            keep = _sweep_groups(working, target, block, errors, options)
        else:
            if tops_mask is not None:
                keep = ~tops_mask[:, columns]
            else:
                salience = (weight[:, columns] - original).abs_().float()
                score = _score(working, salience, block, options)
                undefined += int(score.isnan().sum())
                keep = ~(score <= _threshold(score, options.sparsity))
            sweep_columns(working, target, keep, block, errors)
        kept[:, columns] = keep
        weight[:, columns] = torch.where(keep, working.to(weight.dtype), original)
        loss += errors.square().sum(dtype=torch.float64) / 2
        later = slice(start + options.block_size, cols)
        moving[:, later].addmm_(errors, upper[columns, later])
    warn_of_undefined(undefined)
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
    inverse = torch.eye(len(gram))
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def _score(working: Tensor, salience: Tensor, block: Block, options: OfficialOptions) -> Tensor:
    """Fused score ``[rows, block]``: of the weight as it stands now, and of the delta as it was."""
    squares, score = block.diagonal.square(), torch.empty_like(salience)
    rows, width = score.shape
    for_salience, for_sensitivity = options.score_weights
    _C.decorate_score(
        working.data_ptr(),
        working.stride(0),
        salience.data_ptr(),
        squares.data_ptr(),
        score.data_ptr(),
        rows,
        width,
        for_salience,
        for_sensitivity,
        not options.reproduce_nan,
        torch.get_num_threads(),
    )
    return score


def _threshold(score: Tensor, sparsity: float) -> Tensor:
    """The score at position ``int(n * sparsity)`` of all in ascending order, NaN last."""
    position = int(score.numel() * sparsity)
    return score.flatten().kthvalue(position + 1).values


def _sweep_groups(
    working: Tensor, target: Tensor, block: Block, errors: Tensor, options: OfficialOptions
) -> Tensor:
    """n:m within a block: a group's mask is chosen when the sweep gets there; ``[rows, block]``."""
    keep = torch.ones_like(working, dtype=torch.bool, memory_format=torch.contiguous_format)
    width = working.shape[1]
    for start in range(0, width, options.prunem):
        stop = min(start + options.prunem, width)
        score = working[:, start:stop].square() / block.diagonal[start:stop].square()
        lowest = score.topk(options.prunen, dim=1, largest=False).indices
        keep[:, start:stop].scatter_(1, lowest, False)
        sweep_columns(working, target, keep, block, errors, start, stop)
    return keep
