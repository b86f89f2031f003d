"""What stays on the device, and what waits in the memory of the machine that it is part of."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """Choices that trade copies over the bus for memory on the device; none changes a result.

    On a CPU, where both are one memory, only ``solved_at_once`` has an effect.

    Attributes:
        differences_on_host: once they are taken, the matrices of differences between two streams
            lie in the host's memory, and right-hand sides are formed from them panel by panel.
        new_waits: the new task's Gram waits there too while matrices of old tasks are taken.
        solved_at_once: weights of a layer that are solved exactly at once, in whole rows; None
            leaves it to the device's default.
    """

    differences_on_host: bool = False
    new_waits: bool = False
    solved_at_once: int | None = None


ON_DEVICE = Placement()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the host's memory, itself where it is there."""
    return tensor if tensor.device.type == "cpu" else copy_to_host(tensor)


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, page-locked where it comes from a GPU; complete on return."""
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)
