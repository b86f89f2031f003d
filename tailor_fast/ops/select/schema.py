"""``torch.library`` registration of the ``select`` op. Imports no backend until one is called."""

import torch

from tailor_fast._core.backend import Order, implementation
from tailor_fast._core.library import register
from tailor_fast.ops.select.options import Scoring, check_column_weight, ranking_normalize

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


register("topk_mask(Tensor scores, SymInt k, str backend) -> Tensor", _topk_mask, _bool_like_first)
register(
    "select_patch(Tensor base, Tensor tuned, Tensor? column_weight, str sensitivity, "
    "float density, float salience_weight, str normalize, str scope, str? name, str backend) "
    "-> Tensor",
    _select_patch,
    _bool_like_first,
)
