"""The authors' algorithm in eager torch: the baseline that every figure is measured against.

One linear layer, operation by operation in the order of ``SparseGPT.fasterprune`` of Model Tailor
(Zhu et al., ICML 2024, arXiv 2402.12048), with the work that it does and never uses, because the
time of that work is part of what a user of the class waits for. Tests hold it to the recorded
vectors of the class.
"""

from typing import NamedTuple

import torch


class AuthorsOptions(NamedTuple):
    """Keyword arguments of ``fasterprune``; the weights are those of the evaluation class."""

    sparsity: float = 0.9
    prunen: int = 0
    prunem: int = 0
    blocksize: int = 128
    percdamp: float = 0.01
    tops_mask: torch.Tensor | None = None
    score_weights: tuple[float, float] = (0.5, 0.5)


def authors_gram(batches: list[torch.Tensor]) -> torch.Tensor:
    """``H = (2/n) X X^T`` over the ``n`` sequences of ``batches``, as ``add_batch`` keeps it.

    Args:
        batches: layer inputs ``[tokens, cols]`` (one sequence) or ``[sequences, tokens, cols]``.
    """
    cols, count = batches[0].shape[-1], 0
    gram = torch.zeros(cols, cols, device=batches[0].device)
    for batch in batches:
        added = 1 if batch.dim() == 2 else batch.shape[0]
        gram *= count / (count + added)
        count += added
        x = (2 / count) ** 0.5 * batch.reshape(-1, cols).t().float()
        gram += x.matmul(x.t())
    return gram


def _factor(gram: torch.Tensor, percdamp: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Gram, by the authors' three steps."""
    hessian = gram.clone()
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    diag = torch.arange(hessian.shape[0], device=hessian.device)
    hessian[diag, diag] += percdamp * torch.mean(torch.diag(hessian))
    hessian = torch.linalg.cholesky(hessian)
    hessian = torch.cholesky_inverse(hessian)
    factor: torch.Tensor = torch.linalg.cholesky(hessian, upper=True)
    return factor


def _block_mask(
    w1: torch.Tensor, delta1: torch.Tensor, hinv1: torch.Tensor, options: AuthorsOptions
) -> torch.Tensor:
    """Entries of one block that go back to the base weight."""
    sensitivity = w1**2 / torch.diag(hinv1).reshape((1, -1)) ** 2
    salience = (delta1 - delta1.mean(1, keepdim=True)) / delta1.std(1, keepdim=True)
    sensitivity = (sensitivity - sensitivity.mean(1, keepdim=True)) / sensitivity.std(
        1, keepdim=True
    )
    score = options.score_weights[0] * salience + options.score_weights[1] * sensitivity
    threshold = torch.sort(score.flatten())[0][int(score.numel() * options.sparsity)]
    return score <= threshold


def _sweep_block(
    w1: torch.Tensor,
    base1: torch.Tensor,
    mask1: torch.Tensor,
    hinv1: torch.Tensor,
    options: AuthorsOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Column loop of one block; returns the new columns, the errors and the losses."""
    q1, err1, losses1 = torch.zeros_like(w1), torch.zeros_like(w1), torch.zeros_like(w1)
    for i in range(w1.shape[1]):
        w, d = w1[:, i], hinv1[i, i]
        if options.prunen != 0 and i % options.prunem == 0:
            group = slice(i, i + options.prunem)
            score = w1[:, group] ** 2 / torch.diag(hinv1)[group].reshape((1, -1)) ** 2
            lowest = torch.topk(score, options.prunen, dim=1, largest=False)[1]
            mask1.scatter_(1, i + lowest, True)
        q = w.clone()
        q[mask1[:, i]] = base1[:, i][mask1[:, i]]
        q1[:, i] = q
        losses1[:, i] = (w - q) ** 2 / d**2
        err = (w - q) / d
        w1[:, i:] += err.unsqueeze(1).matmul(hinv1[i, i:].unsqueeze(0))
        err1[:, i] = err
    return q1, err1, losses1


def authors_fasterprune(
    base: torch.Tensor, tuned: torch.Tensor, gram: torch.Tensor, options: AuthorsOptions
) -> tuple[torch.Tensor, float]:
    """Patch one layer as the authors do.

    Args:
        base: pre-trained weight, float32/bfloat16/float16 ``[rows, cols]``.
        tuned: fine-tuned weight of the same shape and dtype.
        gram: the authors' H, float32 ``[cols, cols]``.
        options: keyword arguments of the class.

    Returns:
        The new weight in ``tuned``'s dtype, and the error that the class prints.
    """
    delta = (tuned - base).abs().float()
    w, base32 = tuned.clone().float(), base.clone().float()
    rows, cols = w.shape
    torch.sort(delta.flatten())  # the class ranks the whole delta and drops the result
    torch.rand_like(w), torch.rand_like(w)  # and draws these, which advances the global generator
    losses = torch.zeros(rows, device=w.device)
    hinv = _factor(gram, options.percdamp)
    for i1 in range(0, cols, options.blocksize):
        i2 = min(i1 + options.blocksize, cols)
        w1, delta1, hinv1 = w[:, i1:i2].clone(), delta[:, i1:i2], hinv[i1:i2, i1:i2]
        if options.prunen != 0:
            mask1 = torch.zeros_like(w1) == 1
        elif options.tops_mask is not None:
            mask1 = options.tops_mask[:, i1:i2]
        else:
            mask1 = _block_mask(w1, delta1, hinv1, options)
        q1, err1, losses1 = _sweep_block(w1, base32[:, i1:i2], mask1, hinv1, options)
        w[:, i1:i2] = q1
        losses += torch.sum(losses1, 1) / 2
        w[:, i2:] += err1.matmul(hinv[i1:i2, i2:])
    return w.to(tuned.dtype), torch.sum(losses).item()
