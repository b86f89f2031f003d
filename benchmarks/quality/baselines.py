"""Published ways to merge a base and a fine-tuned model, as a row beside Model Tailor.

All work on state dicts and return a new one; the inputs are left alone. The sparse ones change the
tensors in ``names`` only, the same weights that a patch of equal density may change.
"""

from collections.abc import Mapping, Sequence

import torch

from tailor_fast._core.density import kept_count

State = Mapping[str, torch.Tensor]
WISE_FT_GRID = tuple(step / 10 for step in range(1, 11))


def dare(
    base: State, tuned: State, names: Sequence[str], density: float, seed: int
) -> dict[str, torch.Tensor]:
    """Drop each delta with probability ``1 - density`` and divide the rest by ``density``.

    Source: Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        names: tensors that may change.
        density: probability of keeping an element, in (0, 1].
        seed: of the Bernoulli draws; one generator runs through ``names`` in order.

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    _check_density("dare", density)
    generator = torch.Generator().manual_seed(seed)
    merged = dict(base)
    for name in names:
        kept = torch.rand(base[name].shape, generator=generator) < density
        delta = tuned[name] - base[name]
        merged[name] = torch.where(kept, base[name] + delta / density, base[name])
    return merged


def magnitude(
    base: State, tuned: State, names: Sequence[str], density: float
) -> dict[str, torch.Tensor]:
    """Keep the ``floor(density * n)`` largest deltas of each tensor at their tuned value.

    This is the trimming step of Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708.

    Args:
        base: state of the base model.
        tuned: state of the fine-tuned model, same keys, shapes and dtypes.
        names: tensors that may change.
        density: share kept of each tensor, in (0, 1].

    Raises:
        ValueError: ``density`` is outside (0, 1].
    """
    _check_density("magnitude", density)
    merged = dict(base)
    for name in names:
        size = (tuned[name] - base[name]).abs().flatten()
        kept = size.topk(kept_count(size.numel(), density)).indices
        weight = base[name].flatten().clone()
        weight[kept] = tuned[name].flatten()[kept]
        merged[name] = weight.view_as(base[name])
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


def _check_density(rule: str, density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"{rule}: density must be in (0, 1]; got {density}")
