"""What every test runs under: poisoned memory, fixed seeds, and GPU tests that cannot vanish.

``pytest --hypothesis-profile=explore`` draws new examples; the default profile draws the same ones
every time, so that a red run is a change of the code and never of the dice.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# cuBLAS reads it when its first handle is made and is nondeterministic without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined: without a GPU the Triton kernels run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
SEED = 20240712


class _TorchRandom:
    """Torch's generator in the shape of ``random``: hypothesis then seeds it for each example."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_TORCH_RANDOM)
hypothesis.settings.register_profile("explore", deadline=None, database=None)
hypothesis.settings.register_profile("fixed", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="a GPU test that is skipped, for whatever reason, counts as failed",
    )


def pytest_configure() -> None:
    # Fills what torch.empty returns with NaN or the largest integer: a kernel that leaves an
    # element unwritten is then seen at once.
    torch.use_deterministic_algorithms(True)
    # What a shell starts in the background ignores Ctrl-C, and so would the programs under test.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = yield
    required = item.config.getoption("--require-gpu") and item.get_closest_marker("gpu")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"--require-gpu: {item.nodeid} did not run: {reason}"
    return report


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  seeds libraries that draw from the global generator
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Recorded vectors of the authors' class, beside the checkout."""
    path = ROOT.parent / "shared" / "golden"
    if not path.is_dir():
        pytest.skip("no recorded vectors: there is no shared/golden beside the checkout")
    return path


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
