"""Several writers, a reader in between, inputs that change under the reader's hands."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from tailor_fast.checkpoint import CheckpointError, open_checkpoint
from tests.faults.harness import Ended, Lab, files, start, wait


def writers(lab: Lab, processes: int, rounds: int) -> int:
    """Several runs of one output at once: one ends with 0, the others with 73; returns the losers.

    A loser does not wait for the winner: it says who has the lock, or that OUT is there.
    """
    losers = 0
    for _ in range(rounds):
        lab.reset()
        began = time.monotonic()
        said = [lab.said.with_suffix(f".{number}") for number in range(processes)]
        children = [start(lab.work, path, None, lab.folder) for path in said]
        ended: list[Ended] = [
            wait(child, path, began) for child, path in zip(children, said, strict=True)
        ]
        codes = sorted(one.code for one in ended if one.code is not None)
        assert codes == [0] + [73] * (processes - 1), [(one.code, one.said) for one in ended]
        for one in ended:
            # By which process, where the winner has written that down already.
            told = ("is being written by", "exists already")
            assert one.code == 0 or any(words in one.said for words in told), one.said
        assert lab.state() == "complete"
        assert lab.leftovers() == []
        losers += processes - 1
        for path in said:
            path.unlink()
    return losers


def reader(lab: Lab, rounds: int) -> dict[str, int]:
    """A reader that opens OUT again and again while it is replaced: it reads the old or the new.

    It opens the directory once for each look, as one that wants files that belong together must;
    the old one may vanish under it, which it is told.
    """
    assert lab.old is not None
    old, found = files(lab.old), {"old": 0, "new": 0, "vanished": 0}
    for _ in range(rounds):
        lab.reset()
        began = time.monotonic()
        child = lab.begin()
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            seen = _look(lab.out)
            if seen is None:
                found["vanished"] += 1
                continue
            assert seen in (old, lab.golden), f"neither old nor new: {sorted(seen)}"
            found["old" if seen == old else "new"] += 1
        assert wait(child, lab.said, began).code == 0
        seen = _look(lab.out)
        assert seen == lab.golden
        found["new"] += 1
    return found


def _names(fd: int) -> list[str]:
    return sorted(path.name for path in Path(f"/proc/self/fd/{fd}").iterdir())


def _look(out: Path) -> dict[str, bytes] | None:
    fd = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = _names(fd)
        seen = files(Path(f"/proc/self/fd/{fd}/."))
        with open_checkpoint(Path(f"/proc/self/fd/{fd}")) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
        return seen if names == _names(fd) else None
    except (FileNotFoundError, CheckpointError):
        return None
    finally:
        os.close(fd)


def changing_inputs(lab: Lab, trials: int, seed: int = 3) -> dict[str, int]:
    """A shard truncated, replaced, written to or unlinked while it is read.

    Returns:
        How often the job refused, and how often it was unaffected.
    """
    chance, found = random.Random(seed), {"refused": 0, "unaffected": 0}
    shards = sorted(lab.inputs.rglob("*.safetensors"))
    for trial in range(trials):
        lab.reset()
        shard = shards[trial % len(shards)]
        content, times = shard.read_bytes(), shard.stat()
        change = CHANGES[chance.randrange(len(CHANGES))]
        began = time.monotonic()
        child = lab.begin()
        while not _has_open(child, shard):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, lab.seconds / 4))
        os.kill(child, signal.SIGSTOP)
        change(shard, content)
        os.kill(child, signal.SIGCONT)
        ended = wait(child, lab.said, began)
        with contextlib.suppress(FileNotFoundError):
            shard.unlink()
        shard.write_bytes(content)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        if ended.code == 0:
            assert lab.state() == "complete"
            found["unaffected"] += 1
        else:
            assert ended.code in (65, 74), ended
            assert lab.state() == "absent"
            found["refused"] += 1
    return found


def _has_open(process: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(fd.readlink() == path for fd in Path(f"/proc/{process}/fd").iterdir())
    return False


def _truncate(path: Path, content: bytes) -> None:
    os.truncate(path, len(content) // 2)


def _replace(path: Path, content: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(content[:-64] + bytes(64))
    other.replace(path)


def _write(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(len(content) * 3 // 4)
        file.write(bytes(64))


def _unlink(path: Path, content: bytes) -> None:
    path.unlink()


CHANGES = (_truncate, _replace, _write, _unlink)
