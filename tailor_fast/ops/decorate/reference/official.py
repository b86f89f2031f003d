"""The authors' sweep to the letter: own mask per block, and the compensation with their sign.

Operation for operation what ``SparseGPT.fasterprune`` of Model Tailor computes (Zhu et al., ICML
2024, arXiv 2402.12048), without what it computes and drops, and on the transpose, in which a column
is contiguous. Eleven of twelve recorded runs of theirs come out bit for bit on the same CPU with as
many threads; the other one, whose last block is one column wide, to one rounding.
"""

import math

import torch

from tailor_fast.ops.decorate.inputs import OfficialOptions
from tailor_fast.ops.decorate.official import LinAlgError, no_factor, warn_of_undefined
from tailor_fast.ops.decorate.reference.sweep import sweep_columns


def decorate_official_(
    weight: torch.Tensor,
    base: torch.Tensor,
    gram: torch.Tensor,
    tops_mask: torch.Tensor | None,
    options: OfficialOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the tuned ``weight`` into the authors' result; returns what was kept, and their loss.

    Beside the result it holds a float32 copy of the weight, and three matrices of the Gram's size
    while it factorises, one afterwards.
    """
    rows, cols = weight.shape
    upper = _factorize(gram, options.percdamp)
    working = weight.new_empty(cols, rows, dtype=torch.float32).copy_(weight.T)
    kept = torch.empty_like(weight, dtype=torch.bool)
    losses = working.new_zeros(rows)
    undefined = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, cols, options.block_size):
        block = slice(start, start + options.block_size)
        original = base[:, block]
        moving, target = working[block], original.T.float().contiguous()
        factor = upper[block, block]
        errors = torch.empty_like(moving)
        if options.prunen:
            revert = _sweep_groups(moving, target, factor, errors, options)
        else:
            if tops_mask is not None:
                revert = tops_mask[:, block].T.contiguous()
            else:
                salience = (weight[:, block] - original).abs_().float()
                score = _score(moving, salience, factor, options)
                undefined += score.isnan().sum()
                revert = (score <= _threshold(score, options.sparsity)).T.contiguous()
            sweep_columns(moving, target, revert, factor, errors, sign=1)
        drop = revert.T
        kept[:, block] = ~drop
        weight[:, block] = torch.where(drop, original, moving.T.to(weight.dtype))
        losses += errors.square().sum(0) / 2
        working[start + options.block_size :].addmm_(
            upper[block, start + options.block_size :].T, errors
        )
    warn_of_undefined(int(undefined))
    return kept, losses.sum().double()


def _factorize(gram: torch.Tensor, percdamp: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse, by the authors' three factorisations."""
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += percdamp * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    except LinAlgError as error:
        raise no_factor(error, percdamp) from error
    return upper


def _score(
    moving: torch.Tensor, salience: torch.Tensor, factor: torch.Tensor, options: OfficialOptions
) -> torch.Tensor:
    """Fused score ``[rows, block]``: of the weight as it stands now, and of the delta as it was."""
    sensitivity = moving.T.contiguous() ** 2 / factor.diagonal() ** 2
    parts = [_standardize(part, options.reproduce_nan) for part in (salience, sensitivity)]
    return options.score_weights[0] * parts[0] + options.score_weights[1] * parts[1]


def _standardize(values: torch.Tensor, reproduce_nan: bool) -> torch.Tensor:
    """``z`` of each row with the unbiased std, which one column does not have."""
    undefined = values.shape[1] == 1
    std = torch.full_like(values, math.nan) if undefined else values.std(1, keepdim=True)
    z = (values - values.mean(1, keepdim=True)) / std
    return z if reproduce_nan else torch.where(std > 0, z, 0)


def _threshold(score: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The score at position ``int(n * sparsity)`` of all in ascending order, NaN last."""
    position = int(score.numel() * sparsity)
    if score.is_cuda:  # where kthvalue is not deterministic
        return score.flatten().sort().values[position]
    return score.flatten().kthvalue(position + 1).values


def _sweep_groups(
    moving: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    options: OfficialOptions,
) -> torch.Tensor:
    """n:m within a block: a group's mask is chosen when the sweep gets there; ``[block, rows]``."""
    revert = torch.empty_like(moving, dtype=torch.bool)
    for start in range(0, len(moving), options.prunem):
        group = slice(start, start + options.prunem)
        score = moving[group].T.contiguous() ** 2 / factor.diagonal()[group] ** 2
        lowest = score.topk(options.prunen, dim=1, largest=False).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)
        revert[group] = chosen.T
        sweep_columns(moving, target, revert[group], factor, errors, sign=1, first=start)
    return revert
