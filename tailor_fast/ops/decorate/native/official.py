"""The authors' sweep: scores and columns in C++, the score at the threshold by selection.

The semantics are those of ``reference/official.py``. There the errors E of the columns before a
block move it by ``E_before U_before,block``. Here ``X = E U`` is kept, for which ``X R = E`` with
``R = U^-1``: the move is ``-X_before R_before,block U_block``. So R, from one factorisation in
place of the authors' three, is not inverted; that also rounds less.
"""

import torch

from tailor_fast import _C
from tailor_fast.ops.decorate.inputs import OfficialOptions
from tailor_fast.ops.decorate.native.root import Carry
from tailor_fast.ops.decorate.native.sweep import Block, sweep_columns
from tailor_fast.ops.decorate.official import no_factor, warn_of_undefined
from tailor_fast.ops.gemm import add_product_, product
from tailor_fast.ops.roots import factorize_, invert

Tensor = torch.Tensor


def decorate_official_(
    weight: Tensor, base: Tensor, gram: Tensor, tops_mask: Tensor | None, options: OfficialOptions
) -> tuple[Tensor, Tensor]:
    """Turn the tuned ``weight`` into the authors' result; returns what was kept, and their loss.

    Beside the result it holds a float32 matrix of the weight's size and one of the Gram's.
    """
    cols = weight.shape[1]
    upper = _factorize(gram, options.percdamp)
    moves = torch.empty_like(weight, dtype=torch.float32)  # X
    carry = Carry(moves, upper, options.block_size)
    kept = torch.empty_like(weight, dtype=torch.bool)
    loss = torch.zeros((), dtype=torch.float64)
    undefined = 0
    for start in range(0, cols, options.block_size):
        columns = slice(start, min(start + options.block_size, cols))
        original = base[:, columns]
        target = original.float()
        factor = invert(upper[columns, columns].triu()).float()
        carried = carry.to(start, columns.stop)
        working = weight[:, columns].to(torch.float32, copy=True)
        working = add_product_(working.contiguous(), carried, factor, scale=-1.0)
        block, errors = Block.build(factor, sign=1), torch.empty_like(working)
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
        moves[:, columns] = product(errors.sub_(carried), factor)
    warn_of_undefined(undefined)
    return kept, loss


def _factorize(gram: Tensor, percdamp: float) -> Tensor:
    """R with ``R R^T`` the damped Gram, dead columns at 1; see ``Root.upper``."""
    upper = gram.clone()
    diagonal = upper.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += percdamp * diagonal.mean()
    if factorize_(upper) is None:
        raise no_factor("a block without a Cholesky factor", percdamp)
    return upper


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
