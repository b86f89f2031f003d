import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailor_fast.patchfile import diff_checkpoints
from tests.patchfile.pairs import save_pair

_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where making a file durable costs nothing, if the system has one."""
    if not os.access(_MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("disk")
        return
    folder = Path(tempfile.mkdtemp(prefix="tailor_fast-", dir=_MEMORY))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, target and their patch, beside each other in a folder of their own."""
    base, target = save_pair(tmp_path)
    patch = tmp_path / "p.tailor.safetensors"
    diff_checkpoints(base, target, patch)
    return base, target, patch
