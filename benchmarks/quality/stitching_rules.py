"""Published ways to merge several fine-tunes of one base, as rows beside the joint solve.

All take the base model's state and one state for each fine-tune and return a new one. A task vector
is everything in which a fine-tune differs from the base, norms and biases included; the sparse
rules trim it as a whole, as their authors do.
"""

from collections.abc import Sequence

import torch

from benchmarks.quality.baselines import State
from tailor_fast._core.density import kept_count

_PCB_OUTLIERS = 1e-4  # share of each vector's largest and smallest sizes that PCB clips
_TINY = 1e-12


def task_arithmetic(base: State, tuned: Sequence[State], scale: float) -> dict[str, torch.Tensor]:
    """Add the scaled sum of the task vectors: dense.

    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089.

    Args:
        base: state of the base model.
        tuned: states of the fine-tuned models.
        scale: λ.
    """
    names, vectors = _vectors(base, tuned)
    return _added(base, names, vectors.sum(0), scale)


def magmax(base: State, tuned: Sequence[State], scale: float) -> dict[str, torch.Tensor]:
    """Take each element from the task vector in which it is largest: dense.

    Source: Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322.

    Args:
        base: state of the base model.
        tuned: states of the fine-tuned models.
        scale: λ.
    """
    names, vectors = _vectors(base, tuned)
    largest = vectors.abs().argmax(0, keepdim=True)
    return _added(base, names, vectors.gather(0, largest)[0], scale)


def ties(
    base: State, tuned: Sequence[State], density: float, scale: float
) -> dict[str, torch.Tensor]:
    """Trim each task vector, elect signs, add the mean of those that agree.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708.

    Args:
        base: state of the base model.
        tuned: states of the fine-tuned models.
        density: share kept of each whole task vector, the largest sizes.
        scale: λ.
    """
    names, vectors = _vectors(base, tuned)
    best = vectors.abs().topk(kept_count(vectors.shape[1], density), dim=1).indices
    kept = torch.zeros_like(vectors).scatter_(1, best, vectors.gather(1, best))
    return _added(base, names, _elected(kept), scale)


def dare_ties(
    base: State, tuned: Sequence[State], density: float, scale: float, seed: int
) -> dict[str, torch.Tensor]:
    """TIES with random dropping and rescaling in place of the trim.

    Source: Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099.

    Args:
        base: state of the base model.
        tuned: states of the fine-tuned models.
        density: probability of keeping an element; what is kept is divided by it.
        scale: λ.
        seed: of the draws, which are apart for each task.
    """
    names, vectors = _vectors(base, tuned)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(vectors.shape, generator=generator) < density
    return _added(base, names, _elected(torch.where(kept, vectors / density, 0.0)), scale)


def pcb(
    base: State, tuned: Sequence[State], density: float, scale: float
) -> dict[str, torch.Tensor]:
    """Let elements compete within their task and between tasks; add their weighted mean.

    An element's score is ``exp(n · norm(|D|)²) · tanh(D · ΣD)`` with ``n`` tasks and ``norm`` the
    min-max scaling of a task vector; scores below the best ``density`` of a task count nothing,
    the rest scaled to 0..1 are its weights.

    Source: Du et al., Parameter Competition Balancing, NeurIPS 2024, arXiv 2410.02396.

    Args:
        base: state of the base model.
        tuned: states of the fine-tuned models.
        density: share of each task vector that counts.
        scale: λ.
    """
    names, vectors = _vectors(base, tuned)
    count = vectors.shape[1]
    sizes = vectors.abs()
    edge = int(count * _PCB_OUTLIERS)
    ranked = sizes.sort(dim=1).values
    sizes = sizes.clamp(ranked[:, edge, None], ranked[:, count - 1 - edge, None])
    within = torch.exp(len(tuned) * _scaled(sizes).square())
    scores = within * torch.tanh(vectors * vectors.sum(0))
    least = scores.topk(kept_count(count, density), dim=1).values[:, -1:]
    weights = _scaled(scores.maximum(least))
    mean = (vectors.sign() * sizes * weights).sum(0) / weights.sum(0).clamp_min(_TINY)
    return _added(base, names, mean, scale)


def _vectors(base: State, tuned: Sequence[State]) -> tuple[list[str], torch.Tensor]:
    """Names of the tensors that any fine-tune changed, and the task vectors ``[n, elements]``."""
    names = [name for name in base if any(not torch.equal(base[name], t[name]) for t in tuned)]
    rows = [torch.cat([(t[name] - base[name]).flatten() for name in names]) for t in tuned]
    return names, torch.stack(rows)


def _elected(vectors: torch.Tensor) -> torch.Tensor:
    """Mean of the non-zero elements whose sign is that of the sum over the tasks."""
    sign = vectors.sum(0).sign()
    agree = (vectors.sign() == sign) & (vectors != 0)
    return (vectors * agree).sum(0) / agree.sum(0).clamp_min(1)


def _scaled(rows: torch.Tensor) -> torch.Tensor:
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (rows - low) / (high - low).clamp_min(_TINY)


def _added(
    base: State, names: Sequence[str], vector: torch.Tensor, scale: float
) -> dict[str, torch.Tensor]:
    parts = vector.split([base[name].numel() for name in names])
    merged = dict(base)
    for name, part in zip(names, parts, strict=True):
        merged[name] = base[name] + scale * part.view_as(base[name])
    return merged
