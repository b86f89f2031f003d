"""Published ways to merge a base and a fine-tuned model, as a row beside Model Tailor.

All work on state dicts and return a new one; the inputs are left alone. The sparse ones change the
tensors in ``names`` only, the same weights that a patch of equal density may change.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from tailor_fast._core.density import kept_count

State = Mapping[str, torch.Tensor]
WISE_FT_GRID = tuple(step / 10 for step in range(1, 11))


def dare(
    base: State,
    tuned: State,
    names: Sequence[str],
    density: float,
    seed: int,
    *,
    scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Drop each delta with probability ``1 - density`` and divide the rest by ``density``.

    Source: Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        names: tensors that may change.
        density: probability of keeping an element, in (0, 1].
        seed: of the Bernoulli draws; one generator runs through ``names`` in order.
        scale: further factor of the kept deltas.

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    _check_density("dare", density)
    generator = torch.Generator().manual_seed(seed)
    merged = dict(base)
    for name in names:
        kept = torch.rand(base[name].shape, generator=generator) < density
        delta = tuned[name] - base[name]
        merged[name] = torch.where(kept, base[name] + delta * (scale / density), base[name])
    return merged


def magnitude(
    base: State, tuned: State, names: Sequence[str], density: float, *, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Keep the ``floor(density * n)`` largest deltas of each tensor.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        names: tensors that may change.
        density: share kept of each tensor, in (0, 1].
        scale: factor of the kept deltas; 1 keeps the tuned values.

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    _check_density("magnitude", density)
    sizes = {name: (tuned[name] - base[name]).abs() for name in names}
    return keep_best(base, tuned, sizes, density, scale=scale)


def keep_best(
    base: State,
    tuned: State,
    scores: State,
    density: float,
    *,
    scale: float = 1.0,
    per_row: bool = False,
) -> dict[str, torch.Tensor]:
    """Keep the deltas with the ``floor(density * n)`` best scores of each tensor, or of each row.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model.
        scores: by name, in the shape of the weight; no other tensor changes.
        density: share kept, in (0, 1].
        scale: factor of the kept deltas; 1 keeps the tuned values to the bit.
        per_row: compare within a row, not within the tensor.
    """
    merged = dict(base)
    for name, score in scores.items():
        units = score if per_row else score.reshape(1, -1)
        best = units.topk(kept_count(units.shape[1], density), dim=1).indices
        kept = torch.zeros_like(units, dtype=torch.bool).scatter_(1, best, True).view_as(score)
        merged[name] = torch.where(kept, _scaled(base[name], tuned[name], scale), base[name])
    return merged


def ties_trim(
    base: State, tuned: State, names: Sequence[str], density: float, *, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Keep the largest deltas of the whole task vector: what TIES does with one task.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708; ``scale`` is its λ.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        names: tensors that may change, one task vector together.
        density: share kept of all of them, in (0, 1].
        scale: factor of the kept deltas.

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    _check_density("ties_trim", density)
    sizes = torch.cat([(tuned[name] - base[name]).abs().flatten() for name in names])
    best = sizes.topk(kept_count(sizes.numel(), density)).indices
    kept = torch.zeros_like(sizes, dtype=torch.bool).scatter_(0, best, True)
    parts = kept.split([base[name].numel() for name in names])
    merged = dict(base)
    for name, part in zip(names, parts, strict=True):
        mask = part.view_as(base[name])
        merged[name] = torch.where(mask, _scaled(base[name], tuned[name], scale), base[name])
    return merged


def breadcrumbs(
    base: State,
    tuned: State,
    names: Sequence[str],
    density: float,
    *,
    outliers: float,
    scale: float,
) -> dict[str, torch.Tensor]:
    """Drop each tensor's largest deltas as well as its small ones.

    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        names: tensors that may change.
        density: share kept of each tensor, in (0, 1].
        outliers: share of the largest deltas that is dropped first (γ).
        scale: factor of the kept deltas (α).

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    _check_density("breadcrumbs", density)
    scores = {}
    for name in names:
        size = (tuned[name] - base[name]).abs()
        largest = size.flatten().topk(kept_count(size.numel(), outliers)).indices
        scores[name] = size.flatten().scatter(0, largest, -1.0).view_as(size)
    return keep_best(base, tuned, scores, density, scale=scale)


def della(
    base: State,
    tuned: State,
    names: Sequence[str],
    density: float,
    seed: int,
    *,
    window: float,
    scale: float,
) -> dict[str, torch.Tensor]:
    """Drop at random, the small deltas of a row more often, and divide by the chance of staying.

    Source: Deep et al., DELLA-Merging, 2024, arXiv 2406.11617. Within a row the chance of staying
    rises with the rank of the size, evenly from ``density - window`` to ``density + window``.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        names: matrices that may change.
        density: mean chance of staying, in (0, 1].
        seed: of the draws; one generator runs through ``names`` in order.
        window: half of the spread of the chances (ε); less than ``density``.
        scale: further factor of the kept deltas (λ).

    Raises:
        ValueError: ``density`` is outside (0, 1], or ``window`` outside [0, density).
    """
    _check_density("della", density)
    if not 0 <= window < density:
        raise ValueError(f"della: window must be in [0, {density}); got {window}")
    generator = torch.Generator().manual_seed(seed)
    merged = dict(base)
    for name in names:
        delta = tuned[name] - base[name]
        cols = delta.shape[1]
        rank = delta.abs().argsort(dim=1).argsort(dim=1)
        chance = density - window + 2 * window * rank / max(1, cols - 1)
        chance.clamp_(max=1.0)
        kept = torch.rand(delta.shape, generator=generator) < chance
        merged[name] = torch.where(kept, base[name] + delta * (scale / chance), base[name])
    return merged


def lines(base: State, tuned: State, alpha: float, blocks: int) -> dict[str, torch.Tensor]:
    """Scale each block's delta by its depth, from ``alpha`` in the first to 1 in the last: dense.

    Source: Wang et al., LiNeS, ICLR 2025, arXiv 2410.17146. What lies in no block is scaled by
    ``alpha``.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model.
        alpha: factor of the first block.
        blocks: number of blocks; a tensor's own is the number in its name.
    """
    merged = {}
    for name, weight in base.items():
        number = re.search(r"\.(\d+)\.", name)
        depth = 0.0 if number is None else int(number[1]) / max(1, blocks - 1)
        merged[name] = torch.lerp(weight, tuned[name], alpha + (1 - alpha) * depth)
    return merged


def wise_ft(base: State, tuned: State, alpha: float) -> dict[str, torch.Tensor]:
    """Return ``base + alpha * (tuned - base)`` for every tensor: a dense merge.

    Source: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv 2109.01903.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        alpha: 0 gives the base model, 1 the fine-tuned one.
    """
    return {name: torch.lerp(weight, tuned[name], alpha) for name, weight in base.items()}


def _scaled(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    return tuned if scale == 1.0 else torch.lerp(base, tuned, scale)


def _check_density(rule: str, density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"{rule}: density must be in (0, 1]; got {density}")
