"""``torch.library`` registration of the ``select`` op. Imports no backend until one is called."""

from collections.abc import Sequence

import torch

from tailor_fast._core.backend import Order, implementation
from tailor_fast._core.library import register
from tailor_fast.ops.select.options import (
    Scoring,
    check_column_weight,
    check_column_weights,
    ranking_normalize,
)

ORDER: Order = {"cpu": ("native", "reference", "triton"), "cuda": ("triton", "reference")}


def _topk_mask(scores: torch.Tensor, k: int, backend: str) -> torch.Tensor:
    mask: torch.Tensor = implementation("select", ORDER, backend, scores.device.type).topk_mask(
        scores, k
    )
    return mask


def _bool_like_first(first: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(first, dtype=torch.bool)


def _select_patch(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    sensitivity: str,
    density: float,
    salience_weight: float,
    normalize: str,
    scope: str,
    name: str | None,
    backend: str,
) -> torch.Tensor:
    normalize = ranking_normalize(normalize, scope, salience_weight)
    scoring = Scoring(sensitivity, salience_weight, normalize, name=name)
    check_column_weight(column_weight, scoring)
    module = implementation("select", ORDER, backend, base.device.type)
    mask: torch.Tensor = module.select_patch(base, tuned, column_weight, scoring, scope, density)
    return mask


def _select_patches(
    bases: list[torch.Tensor],
    tuneds: list[torch.Tensor],
    column_weights: list[torch.Tensor],
    sensitivity: str,
    density: float,
    salience_weight: float,
    normalize: str,
    scope: str,
    names: Sequence[str] | None,
    backend: str,
) -> list[torch.Tensor]:
    normalize = ranking_normalize(normalize, scope, salience_weight)
    plain = Scoring(sensitivity, salience_weight, normalize, op="select_patches")
    unnamed: list[str | None] = [None] * len(bases)
    scorings = [plain._replace(name=name) for name in names or unnamed]
    check_column_weights(column_weights, scorings)
    unweighted: list[torch.Tensor | None] = [None] * len(bases)
    weights: Sequence[torch.Tensor | None] = column_weights or unweighted
    pairs = list(zip(bases, tuneds, weights, strict=True))
    module = implementation("select", ORDER, backend, bases[0].device.type)
    masks: list[torch.Tensor] = module.select_patches(pairs, scorings, scope, density)
    return masks


def _bools_like_bases(bases: list[torch.Tensor], *_: object) -> list[torch.Tensor]:
    return [_bool_like_first(base) for base in bases]


register("topk_mask(Tensor scores, SymInt k, str backend) -> Tensor", _topk_mask, _bool_like_first)
register(
    "select_patch(Tensor base, Tensor tuned, Tensor? column_weight, str sensitivity, "
    "float density, float salience_weight, str normalize, str scope, str? name, str backend) "
    "-> Tensor",
    _select_patch,
    _bool_like_first,
)
register(
    "select_patches(Tensor[] bases, Tensor[] tuneds, Tensor[] column_weights, str sensitivity, "
    "float density, float salience_weight, str normalize, str scope, str[]? names, str backend) "
    "-> Tensor[]",
    _select_patches,
    _bools_like_bases,
)
