"""A mixture of experts has tens of thousands of tensors, and its patch names every one."""

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailor_fast.patchfile import Patch
from tailor_fast.patchfile.layout import PatchEntry, PatchPlan, header

EXPERTS = 60_000


def _entry(number: int) -> PatchEntry:
    name = f"model.layers.{number // 768}.mlp.experts.{number % 768}.up_proj.weight"
    base, target, *parts = (hashlib.md5(b"%d.%d" % (number, i)).hexdigest() for i in range(5))
    return PatchEntry(name, "BF16", (64, 2), 1 + number % 128, base, target, tuple(parts))


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No search for cycles: among a million objects that stay it takes most of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("uncollected")
def test_a_patch_of_60000_tensors_that_all_changed(tmp_path: Path) -> None:
    entries = sorted((_entry(number) for number in range(EXPERTS)), key=lambda entry: entry.name)
    plan = PatchPlan("base", "tuned", "xxh3-128", tuple(entries))
    path, front = tmp_path / "p.safetensors", header(plan)
    assert len(front) > 35_000_000
    with path.open("wb") as file:  # the parts are zeros: opening reads none of them
        file.write(front)
        file.truncate(plan.file_bytes)
    with Patch.open(path) as patch:
        assert patch.plan == plan
        assert len(patch) == EXPERTS
