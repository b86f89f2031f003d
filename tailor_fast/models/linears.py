"""The weights of a model that can be patched: Linear and Conv1D, without embeddings and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tailor_fast._core.errors import InputError


@dataclass(frozen=True)
class Target:
    """One patchable layer: its module name and whether its weight is stored ``[in, out]``."""

    name: str
    transposed: bool


class TransposedLinear(nn.Module):
    """A linear layer stored ``[in, out]``, as some models hold their experts."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, device=device)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight + bias`` for ``x`` ``[..., in]``."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, a linear layer stored ``[in, out]``.

    Known by its name, so that a model without transformers does not import it.
    """
    kinds = type(module).__mro__
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        for kind in kinds
    )


def weight_view(module: nn.Module, transposed: bool) -> torch.Tensor:
    """Return the weight as ``[rows=out, cols=in]``; a view, not contiguous when transposed."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[operator]  # untyped attribute
    return weight.T if transposed else weight


def find_targets(
    model: nn.Module,
    selects: Callable[[str], bool] = lambda _name: True,
) -> list[Target]:
    """List the patchable layers in module order.

    Args:
        model: any module tree.
        selects: whether the layer of that module name is wanted.

    Output heads are left out: the module that ``get_output_embeddings`` names, and any layer that
    shares its weight with an embedding.
    """
    excluded = _embedding_weights(model)
    found = []
    for name, module in model.named_modules():
        transposed = isinstance(module, TransposedLinear) or is_conv1d(module)
        if not (transposed or isinstance(module, nn.Linear)):
            continue
        if id(module.weight) in excluded:
            continue
        if selects(name):
            found.append(Target(name, transposed))
    return found


def _embedding_weights(model: nn.Module) -> set[int]:
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module) and hasattr(head, "weight"):
            weights.add(id(head.weight))
    return weights


def pair_parameters(
    base: nn.Module, tuned: nn.Module
) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield ``(name, base parameter, tuned parameter)``; the two trees must match.

    Raises:
        InputError: a parameter is in one model only, or differs in shape or dtype.
    """
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    for kind, names in (("base", ours.keys() - theirs), ("tuned", theirs.keys() - ours)):
        if names:
            listed = ", ".join(sorted(names)[:5])
            raise InputError(
                f"the two models differ: {len(names)} parameters are in the {kind} model only"
                f" ({listed}); expected the same architecture"
            )
    for name, parameter in ours.items():
        other = theirs[name]
        if parameter.shape != other.shape or parameter.dtype != other.dtype:
            raise InputError(
                f"{name} differs: {list(parameter.shape)} {parameter.dtype} in the base model,"
                f" {list(other.shape)} {other.dtype} in the tuned one; expected the same shape and"
                " dtype"
            )
        yield name, parameter, other
