"""Problems for the ``decorate`` op, and answers in float64 that share no code with it."""

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """One layer: delta, kept set and mean Gram."""

    delta: torch.Tensor
    mask: torch.Tensor
    gram: torch.Tensor

    def damping(self, percdamp: float) -> float:
        return percdamp * self.gram.diagonal().double().mean().item()


def gram_of(x: torch.Tensor) -> torch.Tensor:
    """Mean Gram of inputs ``[tokens, cols]``, exactly symmetric."""
    gram = (x.T @ x / len(x)).float()
    return (gram + gram.T) / 2


def correlated(rows: int, cols: int, density: float = 0.1, seed: int = 3) -> Problem:
    """``x = z A^T + 0.3 eps`` with cols / 4 factors; the largest deltas are kept."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    rank = max(1, cols // 4)
    mixing = normal(cols, rank)
    x = normal(2 * cols, rank) @ mixing.T + 0.3 * normal(2 * cols, cols)
    delta = 2e-3 * normal(rows, cols)
    kept = int(density * delta.numel())
    order = delta.abs().flatten().argsort(descending=True)
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[:kept]] = True
    return Problem(delta, mask.reshape(rows, cols), gram_of(x))


def drawn(rows: int, cols: int, tokens: int, density: float, decades: float, seed: int) -> Problem:
    """Any problem: rank ``tokens``, column sizes over ``decades``, each weight kept by chance."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (decades * (torch.rand(cols, generator=generator) - 0.5))
    x = torch.randn(tokens, cols, generator=generator) * scale
    delta = 1e-3 * torch.randn(rows, cols, generator=generator)
    return Problem(delta, torch.rand(rows, cols, generator=generator) < density, gram_of(x))


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """``gram + damping I`` in float64."""
    return gram.double() + damping * torch.eye(len(gram), dtype=torch.float64)


def objective(problem: Problem, patch: torch.Tensor, damping: float) -> float:
    """``tr((D - P) (G + λI) (D - P)^T)``."""
    error = problem.delta.double() - patch.double()
    return ((error @ damped(problem.gram, damping)) * error).sum().item()


def optimum(
    problem: Problem,
    damping: float,
    rhs: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The minimiser, one dense solve per row in ``dtype``."""
    matrix, delta = damped(problem.gram, damping).to(dtype), problem.delta.to(dtype)
    b = delta @ matrix if rhs is None else rhs.to(dtype) + damping * delta
    patch = torch.zeros_like(delta)
    for row, kept in enumerate(problem.mask):
        index = kept.nonzero()[:, 0]
        patch[row, index] = torch.linalg.solve(matrix[index][:, index], b[row, index])
    return patch


def bare(problem: Problem) -> torch.Tensor:
    """The delta on the mask, undecorated."""
    return torch.where(problem.mask, problem.delta, 0)


def sweep(
    weight: torch.Tensor,
    base: torch.Tensor,
    revert: torch.Tensor,
    hessian: torch.Tensor,
    sign: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One column after the other over the whole matrix, in the dtype of ``hessian``.

    Returns:
        The new weight, and the sum over rows of ``((w - q) / U_jj)^2`` of each column.
    """
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).mH
    w, base = weight.to(hessian.dtype), base.to(hessian.dtype)
    losses = w.new_zeros(w.shape[1])
    for j in range(w.shape[1]):
        error = torch.where(revert[:, j], w[:, j] - base[:, j], 0) / upper[j, j]
        w = w + sign * torch.outer(error, torch.cat([upper.new_zeros(j + 1), upper[j, j + 1 :]]))
        losses[j] = error.square().sum()
    return torch.where(revert, base, w), losses
