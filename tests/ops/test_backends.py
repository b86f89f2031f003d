"""``ops.backends()``: every op, every device, and a reason where something cannot run."""

import pytest
import torch

from tailor_fast._core.extension import load_extension
from tailor_fast.ops import OPS, backends


def test_every_op_has_its_backends_in_order() -> None:
    table = backends()
    assert tuple(table) == OPS
    assert list(table["codec"]["cpu"]) == ["native", "reference", "triton"]
    assert list(table["codec"]["cuda"]) == ["triton", "reference"]
    for devices in table.values():
        assert list(devices) == ["cpu", "cuda"]
        assert devices["cpu"]["reference"] is None


def test_reasons_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for devices in backends().values():
        assert set(devices["cuda"].values()) == {"torch sees no CUDA device"}


def test_reasons_with_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends()["codec"]["cuda"]["reference"] is None


def test_the_extension_is_here_or_says_why() -> None:
    extension, reason = load_extension(), backends()["codec"]["cpu"]["native"]
    if isinstance(extension, ImportError):
        assert str(extension) in str(reason)
        pytest.skip(f"the C++ extension did not load: {extension}")
    assert reason is None
