"""Changed headers and indexes: never a crash, and nothing that the format's library refuses.

``python -m tests.checkpoint.hostile`` judges all 100,000 mutants, of which these are the first.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.checkpoint.fuzz_header import SHARDS, Target
from tests.checkpoint.hostile.cases import Case
from tests.checkpoint.hostile.mutants import INDEX_SEEDS, SEED, SEEDS, mutant, mutants
from tests.checkpoint.hostile.oracle import (
    BOTH,
    NEITHER,
    STRICTER_HERE,
    judge_file,
    judge_index,
)
from tests.checkpoint.hostile.test_corpus import CASES

SMALL = 1 << 20


def test_the_seeds_are_good(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert [judge_file(seed, path) for seed in SEEDS] == [BOTH] * len(SEEDS)


def test_some_thousand_mutants(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    found = Counter(judge_file(blob, path) for blob in mutants(5_000))
    assert found.keys() == {BOTH, NEITHER, STRICTER_HERE}
    assert found[BOTH] > 100
    assert found[NEITHER] > 4_000


@pytest.mark.parametrize("seed", INDEX_SEEDS, ids=["plain", "spaced"])
def test_mutants_of_an_index(seed: bytes, tmp_path: Path) -> None:
    for name in SHARDS:
        (tmp_path / name).touch()
    dice = random.Random(SEED)
    found = Counter(judge_index(mutant(seed, dice), tmp_path) for _ in range(1_000))
    assert found[NEITHER] > 500
    assert found[BOTH] > 10


def test_every_lone_file_of_the_corpus_is_judged_alike(tmp_path: Path) -> None:
    """The library refuses it too, or this reader is stricter for a reason on the list."""
    target = Target(tmp_path)
    judged = 0
    for case in CASES:
        folder = tmp_path / "case"
        folder.mkdir()
        if (blob := _small_file(case, folder)) is not None:
            target(blob)
            judged += 1
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert judged > 150


def _small_file(case: Case, folder: Path) -> bytes | None:
    if case.name.startswith(("95 MB", "60 MB", "30 MB", "17 MB", "16 MB", "a million", "200,")):
        return None
    if case.write.__module__ != "tests.checkpoint.hostile.cases":  # `single` is there
        return None
    path = case.write(folder)
    return path.read_bytes() if path.stat().st_size < SMALL else None
