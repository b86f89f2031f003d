"""The minimiser on a fixed mask, for one tile of rows.

A row's matrix ``A_KK`` is gathered for all of its iterations. Rows that keep nearly everything, or
whose matrix would be large, go the way of the reference instead: GEMMs with the whole Gram.
"""

from typing import NamedTuple

import torch

from tailor_fast import _C
from tailor_fast._core.backend import implementation
from tailor_fast.ops.decorate.tiles import Solved
from tailor_fast.ops.gemm import add_product_, product

Tensor = torch.Tensor

# A row is gathered that keeps at most this share of the columns and whose packed matrix takes at
# most 64 MiB, or that is small. On rows of lognormal size (sigma 0.7, 4096 columns, density 0.1,
# the fullest row at 0.86) a share of 0.5 took 2.4 times as long as one that gathers them all: the
# fuller a row, the more iterations it takes, and the last of them in float64.
GATHER_SHARE = 0.9
LARGEST = 5792
SMALL = 256
# Multiplications from which the rounding errors of a float32 energy average out, to below 1e-9 of
# it. Smaller problems are computed in float64, which costs nothing there.
FLOAT32_FROM = 1 << 30
_PANEL = 512  # columns of the Gram that one GEMM of an energy takes


class Problem(NamedTuple):
    """What all tiles of a layer share."""

    gram: Tensor
    damping: float
    tol: float
    max_iterations: int


def solve_rows(problem: Problem, delta: Tensor, keep: Tensor, rhs: Tensor | None) -> Solved:
    """Minimise the objective of each row of a tile on its support.

    Args:
        problem: Gram and options.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``, the supports.
        rhs: undamped right-hand side, float32 ``[rows, cols]``; None stands for ``delta @ gram``.
    """
    limit = max(SMALL, min(LARGEST, int(GATHER_SHARE * keep.shape[1])))
    dense = keep.sum(1) > limit
    if not bool(dense.any()):
        return _gathered(problem, delta, keep, rhs)
    patch = torch.empty_like(delta)
    parts = []
    for solve, rows in ((_gathered, (~dense).nonzero()[:, 0]), (_whole, dense.nonzero()[:, 0])):
        right = None if rhs is None else rhs[rows]
        part = solve(problem, delta[rows], keep[rows], right)
        patch[rows] = part.patch
        parts.append(part)
    return Solved(
        patch,
        parts[0].losses + parts[1].losses,
        max(part.iterations for part in parts),
        sum(part.unproved for part in parts),
    )


def _gathered(problem: Problem, delta: Tensor, keep: Tensor, rhs: Tensor | None) -> Solved:
    """In C++, row by row."""
    rows, cols = delta.shape
    patch, stats = torch.empty_like(delta), torch.empty(rows, 4, dtype=torch.float64)
    _C.decorate_exact(
        delta.data_ptr(),
        keep.data_ptr(),
        0 if rhs is None else rhs.data_ptr(),
        problem.gram.data_ptr(),
        rows,
        cols,
        problem.damping,
        problem.tol,
        problem.max_iterations,
        patch.data_ptr(),
        stats.data_ptr(),
        torch.get_num_threads(),
    )
    gain, bare, _, unproved = stats.sum(0)
    if rhs is None:
        undecorated = energy(delta.masked_fill(keep, 0), problem.gram, problem.damping)
        reverted = undecorated + bare
    else:
        reverted = delta.double().square().sum() * problem.damping
    losses = torch.stack([reverted - gain, reverted - bare, reverted])
    iterations = int(stats[:, 2].max()) if rows else 0
    return Solved(patch, losses, iterations, int(unproved))


def _whole(problem: Problem, delta: Tensor, keep: Tensor, rhs: Tensor | None) -> Solved:
    """By the reference; it counts and reports its own rows without proof."""
    from tailor_fast.ops.decorate.schema import ORDER  # which imports nothing of a backend

    solve = implementation("decorate", ORDER, "reference", "cpu").decorate_exact
    zero = torch.zeros((), dtype=torch.float64)
    options = (problem.damping, problem.tol, problem.max_iterations)
    patch, *losses, iterations = solve(
        delta, keep, problem.gram, rhs, None if rhs is None else zero, *options
    )
    return Solved(patch, torch.stack(losses), int(iterations), 0)


def energy(error: Tensor, gram: Tensor, damping: float) -> Tensor:
    """``tr(E (gram + damping I) E^T)`` of ``E [rows, cols]``, 0-d float64.

    The Gram is symmetric, so each panel multiplies what lies left of it once and counts it twice.
    """
    rows, cols = error.shape
    dtype = torch.float32 if rows * cols * cols >= FLOAT32_FROM else torch.float64
    error = error.to(dtype)
    total = error.square().sum(dtype=torch.float64) * damping
    for start in range(0, cols, _PANEL):
        columns = slice(start, start + _PANEL)
        panel = error[:, columns]
        answer = product(panel, gram[columns, columns].to(dtype))
        add_product_(answer, error[:, :start], gram[:start, columns].to(dtype), scale=2.0)
        total += answer.mul_(panel).sum(dtype=torch.float64)
    return total
