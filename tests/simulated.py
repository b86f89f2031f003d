"""A device that is not there: every tensor of a run over checkpoints is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tailor_fast._core.errors import UsageError
from tailor_fast._core.meter import Meter
from tailor_fast.calibration import moments, spill
from tailor_fast.calibration.streamed import StreamedModel


class Device(Meter):
    """Counts what the walk makes, but for what waits on the host."""

    def copy_to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.forget(tensor.clone())


def simulated(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """Peak of a whole run in bytes, between the first lane and the last."""
    device = Device()
    monkeypatch.setattr(spill, "copy_to_host", device.copy_to_host)
    monkeypatch.setattr(moments, "to_host", device.copy_to_host)
    read = StreamedModel._load

    def load(self: StreamedModel, name: str) -> torch.Tensor | None:
        tensor = read(self, name)
        if tensor is not None:
            device._note(tensor.untyped_storage())  # read by the file's code, not by an op
        return tensor

    monkeypatch.setattr(StreamedModel, "_load", load)
    with device:
        run()
    return device.peak


def least(planned: Callable[[int], object]) -> int:
    """Bytes without which no placement fits: what the refusal names."""
    with pytest.raises(UsageError) as refused:
        planned(1)
    return int(str(refused.value).split(" take")[1].removeprefix("s").split(";")[0])
