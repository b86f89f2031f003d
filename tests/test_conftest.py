"""The test run's own promises: memory is poisoned, dice are fixed, GPU tests cannot vanish."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.source_tree import ROOT

PROBE = """
import pytest

@pytest.mark.gpu
def test_no_device():
    raise AssertionError("must not run")

def test_plain_skip():
    pytest.skip("no such file")

def test_passes():
    pass
"""


def test_require_gpu_turns_skips_of_gpu_tests_into_failures(tmp_path: Path) -> None:
    (tmp_path / "test_probe.py").write_text(PROBE)
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    plugins = ["-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *config, "--require-gpu", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "1 passed, 1 skipped, 1 error" in done.stdout
    assert "test_no_device did not run: Skipped: no CUDA device" in done.stdout


def test_empty_memory_is_poisoned() -> None:
    assert bool(torch.empty(8).isnan().all())
    assert torch.empty(2, dtype=torch.int32).tolist() == [torch.iinfo(torch.int32).max] * 2


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_draws_the_same_numbers(turn: int) -> None:
    expected = torch.rand(2, generator=torch.Generator().manual_seed(20240712))
    assert torch.equal(torch.rand(2), expected)


DRAWN = []


@given(st.integers())
def test_every_example_draws_the_same_numbers(number: int) -> None:
    DRAWN.append(torch.rand(1).item())
    assert len(set(DRAWN)) == 1


def test_golden_vectors_are_files(golden_dir: Path) -> None:
    assert list(golden_dir.glob("*.safetensors"))


@pytest.fixture
def threads_come_back():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_thread_count_is_put_back(threads_come_back, set_num_threads) -> None:
    set_num_threads(torch.get_num_threads() + 1)
