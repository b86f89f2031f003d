"""The disk itself: power cuts on an ext4 image, disks and inode tables that are too small."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailor_fast.checkpoint import staged
from tests.faults.harness import Action, Fault, Kind, Lab, start, wait

IMAGE_BYTES = 48 << 20
_ROOM = "size=256m,nr_inodes=0"


def can_mount(folder: Path) -> bool:
    """Whether this process may mount file systems."""
    place = folder / "probe"
    place.mkdir(exist_ok=True)
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        return False
    try:
        with mounted(place, "-t", "tmpfs", "-o", "size=1m", "none"):
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def mounted(place: Path, *what: str | Path) -> Iterator[None]:
    subprocess.run(["mount", *what, place], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True, capture_output=True)


def power_cuts(lab: Lab, trials: int, *, synced: bool = True, seed: int = 5) -> dict[str, int]:
    """Cut the power of a disk at random moments; what is on it is all that is left.

    The image is copied while the job stands still: what only the page cache holds is lost. With
    ``synced=False`` every fsync is skipped, and the wait lets the disk catch up with the names but
    not with the data; then a half output must be found, or the test is blind.

    Returns:
        How often OUT was absent, old, complete or half.
    """
    chance, found = random.Random(seed), {"absent": 0, "old": 0, "complete": 0, "half": 0}
    home, image = lab.folder, lab.folder.with_name("disk.img")
    after = lab.folder.with_name("after.img")
    fault = None if synced else Fault([Kind.SYNC], 0, Action.SKIP)
    options = "loop,commit=1,noauto_da_alloc"
    home.mkdir(exist_ok=True)
    try:
        for _ in range(trials):
            _format(image)
            with mounted(home, "-o", options, image):
                if lab.old is not None:
                    shutil.copytree(lab.old, lab.out)
                    os.sync()
                began = time.monotonic()
                child = start(lab.work, lab.said, fault, home.parent)
                time.sleep(chance.uniform(0.1, 1.2) * lab.seconds + (0 if synced else 1.6))
                os.kill(child, signal.SIGSTOP)
                subprocess.run(["cp", "--sparse=always", image, after], check=True)
                os.kill(child, signal.SIGKILL)
                wait(child, lab.said, began)
            with mounted(home, "-o", options, after):
                try:
                    state = lab.state()
                except AssertionError:
                    state = "half"
                found[state] += 1
                if state != "half":
                    counts, lab.counts = lab.counts, {}
                    _without_lost_and_found(lab)
                    lab.recover()
                    lab.counts = counts
    finally:
        image.unlink(missing_ok=True)
        after.unlink(missing_ok=True)
    return found


def _without_lost_and_found(lab: Lab) -> None:
    shutil.rmtree(lab.folder / "lost+found", ignore_errors=True)


def _format(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)


def small_disks(lab: Lab, step: int) -> int:
    """A tmpfs of every size up to what is needed; then room is made, and the run goes on.

    Each size is met twice: with the check of free space and the reservation, and without both.
    """
    trials = 0
    need = sum(len(data) for data in lab.golden.values())
    for size in range(4096, 2 * need, step):
        for checked in (True, False):
            trials += _small(lab, f"size={size},nr_inodes=0", checked=checked)
    return trials


def few_inodes(lab: Lab, stride: int) -> int:
    """Names run out at every one of them in turn; with a large stride, at every fifth."""
    counts = range(2, len(lab.golden) + 8, min(stride, 5))
    return sum(_small(lab, f"size=64m,nr_inodes={count}", checked=True) for count in counts)


def _small(lab: Lab, options: str, *, checked: bool) -> int:
    """One run in too small a place, and one after it was made larger."""
    cannot_reserve = Fault([Kind.ALLOCATE], 0, Action.FAIL_ALWAYS, 95)  # EOPNOTSUPP
    shutil.rmtree(lab.folder, ignore_errors=True)
    lab.folder.mkdir()
    with mounted(lab.folder, "-t", "tmpfs", "-o", options, "none"):
        child = start(
            lab.work if checked else lambda: _unchecked(lab),
            lab.said,
            None if checked else cannot_reserve,
            lab.folder,
        )
        ended = wait(child, lab.said, time.monotonic())
        assert ended.code in (0, 73, 74), ended
        assert ended.code == 0 or "is full" in ended.said or "are free" in ended.said, ended
        assert lab.state() == ("complete" if ended.code == 0 else "absent")
        subprocess.run(["mount", "-o", f"remount,{_ROOM}", lab.folder], check=True)
        lab.recover()
        lab.counts[f"exit {ended.code}"] = lab.counts.get(f"exit {ended.code}", 0) + 1
    return 1


def _unchecked(lab: Lab) -> int:
    staged.check_space = lambda *_: None
    return lab.work()
