"""Backend choice: what can run, why not, and that nobody is given something else than asked."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch

from tailor_fast._core import backend as choice
from tailor_fast._core.backend import BackendUnavailableError, implementation, why_unavailable
from tailor_fast.ops.codec import encode_patch
from tailor_fast.ops.codec import reference as codec_reference
from tests.backends import needs_native

ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}


@pytest.fixture(autouse=True)
def _forget_choices():
    choice._select.cache_clear()
    yield
    choice._select.cache_clear()


@pytest.fixture
def no_extension(monkeypatch) -> None:
    monkeypatch.setattr(choice, "load_extension", lambda: ImportError("no such file"))


@pytest.fixture
def no_triton(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def with_triton(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_reference_runs_everywhere() -> None:
    assert why_unavailable("reference", "cpu") is None
    assert why_unavailable("reference", "cuda") is None


def test_why_native_cannot_run(no_extension) -> None:
    assert why_unavailable("native", "cuda") == "native kernels run on cpu tensors, not on cuda"
    assert why_unavailable("native", "cpu") == "the C++ extension did not load (no such file)"


def test_native_can_run(monkeypatch) -> None:
    monkeypatch.setattr(choice, "load_extension", SimpleNamespace)
    assert why_unavailable("native", "cpu") is None


def test_why_triton_cannot_run(no_triton) -> None:
    reason = "triton is not installed (pip install 'tailor_fast[gpu]')"
    assert why_unavailable("triton", "cuda") == reason
    assert why_unavailable("triton", "cpu") == reason


def test_triton_needs_cuda_or_its_interpreter(with_triton, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_unavailable("triton", "cuda") is None
    assert why_unavailable("triton", "cpu") == "triton kernels run on cuda tensors, not on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_unavailable("triton", "cpu") is None


def test_why_cuda_kernels_cannot_run(monkeypatch) -> None:
    assert why_unavailable("cuda", "cpu") == "cuda kernels run on cuda tensors, not on cpu"
    monkeypatch.setattr(choice, "load_extension", SimpleNamespace)
    assert why_unavailable("cuda", "cuda") == "the extension was built without CUDA kernels"
    monkeypatch.setattr(choice, "load_extension", lambda: SimpleNamespace(cuda=object()))
    assert why_unavailable("cuda", "cuda") is None


def test_why_cuda_kernels_cannot_run_without_extension(no_extension) -> None:
    assert why_unavailable("cuda", "cuda") == "the C++ extension did not load (no such file)"


@needs_native
def test_auto_takes_the_first_that_can_run() -> None:
    chosen = implementation("codec", ORDER, "auto", "cpu")
    assert chosen.__name__ == "tailor_fast.ops.codec.native"
    assert implementation("codec", ORDER, "native", "cpu") is chosen


def test_auto_goes_on_to_the_next(no_extension, no_triton) -> None:
    assert implementation("codec", ORDER, "auto", "cpu") is codec_reference
    assert implementation("codec", ORDER, "auto", "cuda") is codec_reference


def test_auto_logs_its_choice_once(no_extension, caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="tailor_fast"):
        for _ in range(3):
            implementation("codec", ORDER, "auto", "cpu")
    assert [record.getMessage() for record in caplog.records] == ["codec on cpu: backend reference"]


def test_auto_with_nothing_left(no_extension) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        implementation("codec", {"cpu": ("native", "cuda")}, "auto", "cpu")
    assert str(caught.value) == (
        "codec: no backend runs on cpu; native: the C++ extension did not load (no such file); "
        "cuda: cuda kernels run on cuda tensors, not on cpu"
    )


def test_explicit_never_falls_back(no_extension, no_triton) -> None:
    base = torch.ones(3)
    with pytest.raises(BackendUnavailableError) as caught:
        encode_patch(base, base, backend="native")
    assert str(caught.value) == (
        "codec: backend 'native' is not available: the C++ extension did not load (no such file)"
    )
    with pytest.raises(BackendUnavailableError) as caught:
        implementation("codec", ORDER, "triton", "cuda")
    assert str(caught.value) == (
        "codec: backend 'triton' is not available: "
        "triton is not installed (pip install 'tailor_fast[gpu]')"
    )
    assert encode_patch(base, base, backend="auto").words.numel() == 0


def test_backend_that_the_op_does_not_have() -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        implementation("codec", ORDER, "triton", "cpu")
    assert str(caught.value) == (
        "codec: backend 'triton' is not implemented on cpu; it has native, reference"
    )


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend") as caught:
        implementation("codec", ORDER, "fast", "cpu")
    assert str(caught.value) == (
        "codec: backend must be one of auto, reference, native, triton, cuda; got 'fast'"
    )


def test_unsupported_device() -> None:
    with pytest.raises(ValueError, match="device") as caught:
        implementation("codec", ORDER, "auto", "mps")
    assert str(caught.value) == "codec: device must be one of cpu, cuda; got mps"


def test_explicit_reference_is_the_reference() -> None:
    assert implementation("codec", ORDER, "reference", "cpu") is codec_reference
