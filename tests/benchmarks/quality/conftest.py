"""The trained model that several of these tests ask."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import training
from benchmarks.quality.training import Finetuning, Pair, Pretraining, Setting

QUICK = Setting(
    Pretraining(mixture=("what", "parity"), steps=200, per_task=48, seed=3),
    Finetuning("next", steps=100, learning_rate=2e-3, batch=32),
    new_samples=6,
    old_samples_per_task=4,
)
INSTANT = replace(
    QUICK,
    pretraining=replace(QUICK.pretraining, steps=2, per_task=4),
    finetuning=replace(QUICK.finetuning, steps=2, batch=4),
)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the pair."""
    return tmp_path_factory.mktemp("quick")


@pytest.fixture(scope="session")
def pair(work: Path) -> Pair:
    """A base that reads digits and a fine-tuned model that answers the next one."""
    return training.make_pair(work, QUICK, report=lambda line: None)
