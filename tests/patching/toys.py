"""Small models whose every input is known, shared by the tests of this folder."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Block(nn.Module):
    """Two layers on one input, then one on their product: like gate, up and down."""

    def __init__(self, width: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(torch.tanh(self.gate(y)) * self.up(y))


class Toy(nn.Module):
    """Embedding, blocks, head."""

    def __init__(
        self, width: int = 12, hidden: int = 16, blocks: int = 3, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Block(width, hidden, bias=bias) for _ in range(blocks))
        self.head = nn.Linear(width, 20, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def pair(model: nn.Module, scale: float = 0.1, seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """``model`` as base, and a copy whose every parameter has moved."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            step = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * step * (parameter.abs().mean() + 0.05))
    return model, tuned


def token_batches(count: int = 3, seed: int = 2, length: int = 9) -> list[dict[str, torch.Tensor]]:
    """Batches of ids with ragged lengths, padded on the right with id 0."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 20, (4, length), generator=generator)
        lengths = torch.randint(3, length + 1, (4, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches
