"""Mixture-of-experts layers taken apart: one linear layer per expert and projection.

transformers keeps the experts of a block as three-dimensional parameters of one module and computes
them together. Patching needs them one by one, each with the tokens routed to it, and checkpoints
hold them one by one as a rule. ``SplitExperts`` takes the place of such a module: the same numbers
from ordinary linear layers, whose weights are views of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from tailor_fast.models.linears import Target, TransposedLinear

# What transformers' ``use_experts_implementation`` sets on every class of experts that it knows how
# to compute; with them, the layout of the parameters is known.
_DECLARED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
# On a tensor: which of the block's tokens its rows are.
_ROWS = "_tailor_rows"


class SplitExperts(nn.Module):
    """Stands for a module of fused experts, and computes one expert after the other.

    Every expert is called in every pass, with no token if none was routed to it: passes then have
    one order of calls, whatever the routing.

    Children are named by number and projection: ``3.gate_proj``, ``3.up_proj``, ``3.down_proj``, or
    ``3.gate_up_proj`` where gate and up do not lie one behind the other. Weights and biases share
    the memory of the fused parameters.

    Args:
        fused: a module for which ``is_fused`` holds.

    Attributes:
        parts: for each fused parameter, its parts along the projection's outputs in order, each a
            projection's name.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self._fused = (fused,)  # in a tuple, so that its parameters are not this module's
        self.parts = _parts(fused)
        self._count = len(fused.get_parameter("down_proj"))
        for name in self.parts:
            for number, matrices in enumerate(_slices(fused, name, self.parts[name])):
                if not hasattr(self, str(number)):
                    self.add_module(str(number), nn.Module())
                expert = self.get_submodule(str(number))
                for part, layer in matrices.items():
                    expert.add_module(part, layer)
        taken = {*self.parts, *(f"{name}_bias" for name in self.parts)}
        for name, parameter in fused._parameters.items():
            if name not in taken:
                self._parameters[name] = parameter
        for name, child in fused._modules.items():
            self._modules[name] = child
        self.train(fused.training)

    def __getattr__(self, name: str) -> Any:
        """What the fused module has besides."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_fused"][0], name)

    @property
    def fused(self) -> nn.Module:
        """The module that this one stands for."""
        return self._fused[0]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute what the fused module does.

        Args:
            hidden_states: ``[tokens, cols]``.
            top_k_index: int64 ``[tokens, k]``, experts of each token.
            top_k_weights: ``[tokens, k]``, the weights of their answers.

        Returns:
            ``[tokens, cols]``.
        """
        output = torch.zeros_like(hidden_states)
        for number in range(self._count):
            rows, slots = torch.where(top_k_index == number)
            answer = self._answer(number, hidden_states[rows], rows)
            answer = answer * top_k_weights[rows, slots, None]
            output.index_add_(0, rows, answer.to(output.dtype))
        return output

    def _answer(self, number: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        expert, fused = self.get_submodule(str(number)), cast("Any", self.fused)
        first, down = self.parts
        setattr(x, _ROWS, rows)
        outputs = [expert.get_submodule(part)(x) for part in self.parts[first]]
        hidden = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        hidden = fused._apply_gate(hidden) if fused.has_gate else fused.act_fn(hidden)
        setattr(hidden, _ROWS, rows)
        answer: torch.Tensor = expert.get_submodule(down)(hidden)
        return fused.post_expert_norm(answer) if fused.has_post_expert_norm else answer


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` holds all experts of a block in a form that ``SplitExperts`` knows."""
    if not all(hasattr(module, name) for name in _DECLARED):
        return False
    weights = [module._parameters.get(name) for name in _fused_names(module)]
    return all(weight is not None and weight.dim() == 3 for weight in weights)


def split_(model: nn.Module) -> list[tuple[nn.Module, str, SplitExperts]]:
    """Put ``SplitExperts`` in the place of all fused experts of ``model``.

    Returns:
        For each, the module that holds it, its name there, and itself.
    """
    places = [
        (parent, name, SplitExperts(child))
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and is_fused(child)
    ]
    for parent, name, experts in places:
        parent._modules[name] = experts
    return places


def fused_targets(model: nn.Module) -> list[Target]:
    """List the parameters that hold one projection of all experts, by transformers' names."""
    return [
        Target(f"{name}.{parameter}", bool(module.fused.is_transposed))
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for parameter in module.parts
    ]


@contextmanager
def split_experts(*models: nn.Module) -> Iterator[None]:
    """Have ``SplitExperts`` in the place of all fused experts while the context lasts."""
    places = []
    try:
        for model in models:
            places += split_(model)
        yield
    finally:
        for parent, name, experts in places:
            parent._modules[name] = experts.fused


def routed_rows(x: torch.Tensor) -> torch.Tensor | None:
    """Which of the block's tokens are the rows of an expert's input, int64 ``[tokens]``.

    None for any other layer's input.
    """
    rows: torch.Tensor | None = getattr(x, _ROWS, None)
    return rows


def aligned(target: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """``target``'s tokens in the place of ``actual``'s, for two inputs of one layer.

    An expert may see other tokens in one model than in the other. A token of ``actual`` that
    ``target`` lacks stands for itself: nothing is known that it should be instead.
    """
    ours, theirs = routed_rows(actual), routed_rows(target)
    if ours is None or theirs is None or torch.equal(ours, theirs):
        return target
    both = torch.isin(ours, theirs, assume_unique=True)
    paired = actual.clone()
    paired[both] = target[torch.isin(theirs, ours, assume_unique=True)]  # both in rising order
    return paired


def _fused_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _parts(fused: nn.Module) -> dict[str, tuple[str, ...]]:
    first, down = _fused_names(fused)
    apart = fused.has_gate and fused.is_concatenated and not fused.is_transposed
    return {first: ("gate_proj", "up_proj") if apart else (first,), down: (down,)}


def _slices(
    fused: nn.Module, name: str, parts: tuple[str, ...]
) -> Iterator[dict[str, nn.Linear | TransposedLinear]]:
    """The layers of each expert, as views."""
    weights, transposed = fused.get_parameter(name).detach(), bool(fused.is_transposed)
    biases = fused.get_parameter(f"{name}_bias").detach() if fused.has_bias else None
    for number, matrix in enumerate(weights):
        pieces = matrix.chunk(len(parts))
        vectors = [None] * len(parts) if biases is None else biases[number].chunk(len(parts))
        yield {
            part: _linear(piece, vector, transposed)
            for part, piece, vector in zip(parts, pieces, vectors, strict=True)
        }


def _linear(
    weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> nn.Linear | TransposedLinear:
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    kind = TransposedLinear if transposed else nn.Linear
    layer = kind(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
