"""Changed headers and indexes: never a crash, and nothing that the format's library refuses.

``python -m tests.checkpoint.hostile`` judges all 100,000 mutants, of which these are the first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.fuzz_header import Target
from tests.checkpoint.hostile.cases import Case
from tests.checkpoint.hostile.mutants import INDEX_SEEDS, SEED, SEEDS, mutant, mutants
from tests.checkpoint.hostile.oracle import (
    BOTH,
    NEITHER,
    STRICTER_HERE,
    judge_file,
    memory_file,
)
from tests.checkpoint.hostile.test_corpus import CASES

SMALL = 1 << 20


@pytest.fixture
def judged() -> Iterator[Path]:
    with memory_file() as path:
        yield path


def test_the_seeds_are_good(judged: Path) -> None:
    assert [judge_file(seed, judged) for seed in SEEDS] == [BOTH] * len(SEEDS)


def test_some_thousand_mutants(judged: Path) -> None:
    found = Counter(judge_file(blob, judged) for blob in mutants(5_000))
    assert found.keys() == {BOTH, NEITHER, STRICTER_HERE}
    assert found[BOTH] > 100
    assert found[NEITHER] > 4_000


@pytest.mark.parametrize("seed", INDEX_SEEDS, ids=["plain", "spaced"])
def test_mutants_of_an_index(seed: bytes, tmp_path: Path, judged: Path) -> None:
    target, dice = Target(tmp_path, judged), random.Random(SEED)
    found = Counter(target(mutant(seed, dice)) for _ in range(1_000))
    assert found[NEITHER] > 500
    assert found[BOTH] > 10


def test_every_lone_file_of_the_corpus_is_judged_alike(tmp_path: Path, judged: Path) -> None:
    """The library refuses it too, or this reader is stricter for a reason on the list."""
    target = Target(tmp_path, judged)
    count = 0
    for case in CASES:
        folder = tmp_path / "case"
        folder.mkdir()
        if (blob := _small_file(case, folder)) is not None:
            target(blob)
            count += 1
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert count > 150


def _small_file(case: Case, folder: Path) -> bytes | None:
    if case.name.startswith(
        ("95 MB", "40 MB", "60 MB", "30 MB", "17 MB", "16 MB", "a million", "150,")
    ):
        return None
    if case.write.__module__ != "tests.checkpoint.hostile.cases":  # `single` is there
        return None
    path = case.write(folder)
    return path.read_bytes() if path.stat().st_size < SMALL else None
