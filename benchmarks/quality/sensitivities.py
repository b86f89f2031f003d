"""What data says about single weights, for the published rules that ask it: one matrix a tensor.

The rules keep the best scores of ``baselines.keep_best``; every function leaves the models alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from benchmarks.quality.baselines import State
from benchmarks.quality.families import Family
from benchmarks.quality.tinyllava import Batch
from tailor_fast._core.density import kept_count

# Of grafting: a weight outside the base patch starts at sigmoid(-10), one inside at the complement.
_GRAFT_BIAS = -10.0


@torch.inference_mode()
def input_norms(
    model: Any, family: Family, batch: Batch, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the Euclidean norm of each input column over all tokens, ``[cols]`` by weight name.

    Source: Sun et al., Wanda, ICLR 2024, arXiv 2306.11695, which scores ``|W| * norm`` within a
    row; here the delta stands for ``W``.
    """
    squares: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:

        def add(_module: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            total = args[0].flatten(0, -2).square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        module = model.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(add))
    try:
        family.answer_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: squares[name].sqrt() for name in names}


def fisher(
    model: Any, family: Family, batch: Batch, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the empirical Fisher diagonal: mean squared gradient of one answer's log-likelihood.

    Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv
    2111.09832.
    """
    parameters = [model.get_parameter(name) for name in names]
    flags = [parameter.requires_grad for parameter in parameters]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    count = len(batch.answer_ids)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for row in range(count):
            one = Batch(*(part[row : row + 1] for part in batch))
            loss = _loss(family.answer_logits(model, one), one)
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total.addcmul_(gradient, gradient)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
    return {name: total / count for name, total in zip(names, sums, strict=True)}


def graft(
    model: Any,
    family: Family,
    batch: Batch,
    states: tuple[State, State],
    names: Sequence[str],
    *,
    density: float,
    rate: float,
    steps: int,
) -> dict[str, torch.Tensor]:
    """Learn which deltas to graft: returns the relaxed mask, 0 to 1, of each tensor.

    Source: Panigrahi et al., Task-Specific Skill Localization, ICML 2023, arXiv 2302.06600. The
    mask starts as the largest deltas, ``p``, relaxed by a sigmoid, ``p (1 - s) + (1 - p) s`` with
    ``s = sigmoid(S - 10)``; ``S`` follows the gradient of the new task's loss, full batch.

    Args:
        model: called with the grafted weights in place of its own; left as it is.
        family: how it is called.
        batch: scenes of the new task.
        states: of the base and of the fine-tuned model.
        names: tensors that may change.
        density: share of each tensor in the starting patch.
        rate: step size of plain gradient descent.
        steps: its steps.
    """
    base, tuned = states
    deltas = {name: tuned[name] - base[name] for name in names}
    patches, learned = {}, {}
    for name, delta in deltas.items():
        size = delta.abs().flatten()
        best = size.topk(kept_count(size.numel(), density)).indices
        patches[name] = torch.zeros_like(size).scatter_(0, best, 1.0).view_as(delta)
        learned[name] = torch.zeros_like(delta, requires_grad=True)

    def relaxed(name: str) -> torch.Tensor:
        moved = torch.sigmoid(learned[name] + _GRAFT_BIAS)
        patch = patches[name]
        return patch * (1 - moved) + (1 - patch) * moved

    inputs = family.inputs(batch)
    kept = batch.answer_ids.shape[1]
    for _ in range(steps):
        weights = {name: base[name] + relaxed(name) * deltas[name] for name in names}
        called = functional_call(
            model, weights, kwargs={**inputs, "use_cache": False, "logits_to_keep": kept}
        )
        loss = _loss(called.logits, batch)
        gradients = torch.autograd.grad(loss, list(learned.values()))
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                learned[name].sub_(gradient, alpha=rate)
    with torch.no_grad():
        return {name: relaxed(name) for name in names}


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    total = F.cross_entropy(logits.flatten(0, 1), batch.answer_ids.flatten(), reduction="sum")
    return total / len(batch.answer_ids)
