"""The small parts: environment, extension, error classes, registration."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tailor_fast._core import env
from tailor_fast._core.errors import (
    InputError,
    OutputError,
    StoppedError,
    StorageError,
    TailorError,
    UsageError,
)
from tailor_fast._core.extension import load_extension
from tailor_fast._core.library import NAMESPACE, on_its_card, register


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), (None, False)])
def test_triton_interpreted(value, expected: bool, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert env.triton_interpreted() is expected


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TailorError, 1),
        (UsageError, 2),
        (InputError, 65),
        (OutputError, 73),
        (StorageError, 74),
        (StoppedError, 75),
    ],
)
def test_exit_codes(error, code: int) -> None:
    assert issubclass(error, TailorError)
    assert error("where: what").exit_code == code


@pytest.fixture
def fresh_loader():
    load_extension.cache_clear()
    yield
    load_extension.cache_clear()


def test_extension_that_cannot_load_is_remembered(fresh_loader, monkeypatch) -> None:
    tried = []

    def fail(name: str):
        tried.append(name)
        raise ImportError("built for another Python")

    monkeypatch.setattr(importlib, "import_module", fail)
    for _ in range(2):
        assert str(load_extension()) == "built for another Python"
    assert tried == ["tailor_fast._C"]


def test_only_import_errors_count_as_absent(fresh_loader, monkeypatch) -> None:
    def crash(name: str):
        raise RuntimeError("initialisation failed")

    monkeypatch.setattr(importlib, "import_module", crash)
    with pytest.raises(RuntimeError, match="initialisation failed"):
        load_extension()


def test_register_gives_an_op_with_a_fake() -> None:
    def run(x: torch.Tensor, backend: str) -> torch.Tensor:
        return x + 1 if backend == "plus" else x - 1

    register("_probe(Tensor x, str backend) -> Tensor", run, lambda x, backend: torch.empty_like(x))
    op = getattr(torch.ops, NAMESPACE)._probe
    assert op(torch.zeros(2), "plus").tolist() == [1, 1]
    assert op(torch.zeros(2), "minus").tolist() == [-1, -1]
    assert op(torch.zeros(2, device="meta"), "plus").is_meta
    torch.library.opcheck(op.default, (torch.zeros(2), "plus"))


def test_an_op_runs_on_the_card_of_its_tensors(monkeypatch) -> None:
    """Kernels are launched on the current card: the first one in a thread that chose none."""
    current = [0]

    class Card:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Card)
    launch = on_its_card(lambda *_: current[-1])
    with FakeTensorMode():
        one, three = (torch.empty(2, device=f"cuda:{card}") for card in (1, 3))
    assert launch(one, three, "auto") == 1
    assert launch(None, [three, one], 0.5) == 3
    assert current == [0]
    with pytest.raises(RuntimeError, match="an op without a tensor"):
        launch([], 0.5)
