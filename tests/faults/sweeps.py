"""The job killed, and its calls failing, at every moment in turn."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterable

from tests.faults.harness import Action, Ended, Fault, Kind, Lab, wait

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EINTR", "EXDEV", "EMFILE", "EACCES")
# Nobody repeats these after EINTR, with which no local file system answers them: not Python's `os`.
NOT_REPEATED = (Kind.RENAME, Kind.MKDIR, Kind.MODE)


def expected(kind: Kind, error: str) -> tuple[int, ...]:
    """Exit codes that a failing call may lead to.

    0 where the job does not need the call: a name that cannot be removed, the descriptor that
    writes past the page cache, a call that is repeated.
    """
    if kind is Kind.UNLINK:
        return (0,)
    if error == "EINTR":
        return (0, 74) if kind in NOT_REPEATED else (0,)
    if kind is Kind.LOCK or (kind is Kind.ALLOCATE and error in ("ENOSPC", "EDQUOT")):
        return (73,)
    if error == "EACCES" and kind in (Kind.OPEN, Kind.READ):
        return (0, 65, 73, 74) if kind is Kind.OPEN else (74,)
    if error == "EACCES":  # of a place as a rule, whichever call it comes from
        return (73, 74)
    return (0, 74) if kind is Kind.OPEN else (74,)


def moments(total: int, stride: int) -> Iterable[int]:
    """Every ``stride``-th call, and the last: the commit is there."""
    return sorted({*range(1, total + 1, stride), total})


def kill_sweep(lab: Lab, stride: int) -> int:
    """Kill -9 before and after each call; the next run must make the output whole."""
    trials = 0
    total = lab.calls()
    for action in (Action.KILL_BEFORE, Action.KILL_AFTER):
        for moment in moments(total, stride):
            lab.reset()
            ended = lab.run(Fault(moment=moment, action=action))
            assert ended.code is None or moment > total - 12, f"call {moment}: {ended}"
            lab.recover()
            trials += 1
    return trials


def kill_resumed(lab: Lab, stride: int) -> int:
    """Kill -9 at each call of the run that goes on from a killed one."""
    total, trials = lab.calls(), 0
    for moment in moments(total // 2, stride):
        lab.reset()
        lab.run(Fault(moment=total * 2 // 3, action=Action.KILL_AFTER))
        lab.run(Fault(moment=moment, action=Action.KILL_AFTER))
        lab.recover()
        trials += 1
    return trials


def random_kills(lab: Lab, trials: int, seed: int = 11) -> int:
    """Kill -9 after a random time, up to three times, then let it finish."""
    chance, kills = random.Random(seed), 0
    for _ in range(trials):
        lab.reset()
        for _ in range(chance.randint(1, 3)):
            began = time.monotonic()
            child = lab.begin()
            time.sleep(chance.uniform(0, 1.1 * lab.seconds))
            os.kill(child, signal.SIGKILL)
            kills += wait(child, lab.said, began).code is None
        lab.recover()
    return kills


def check_sentence(lab: Lab, ended: Ended, codes: tuple[int, ...]) -> None:
    """One sentence that says where; the exit code as specified."""
    assert ended.code in codes, f"{ended}; expected one of {codes}"
    if ended.code:
        assert ended.said.startswith("tailor-fast: error: "), ended.said
        lines = [line for line in ended.said.splitlines() if "removing" not in line]
        assert len(lines) == 1, ended.said
        assert str(lab.folder) in ended.said or str(lab.inputs) in ended.said, ended.said
        assert "unexpected" not in ended.said, ended.said


def error_sweep(lab: Lab, stride: int, errors: Iterable[tuple[Kind, str]]) -> int:
    """Each call failing with each error: sentence and code, nothing half-written, old intact."""
    trials = 0
    for kind, name in errors:
        total = lab.calls([kind])
        step = 4 * stride if kind is Kind.READ else stride  # most are alike, and change nothing
        for moment in moments(total, step) if total else ():
            lab.reset()
            ended = lab.run(Fault([kind], moment, Action.FAIL, getattr(errno, name)))
            try:
                check_sentence(lab, ended, expected(kind, name))
                lab.recover()
            except AssertionError as error:
                raise AssertionError(f"{name} at {kind.name} {moment}: {error}") from error
            lab.counts[f"exit {ended.code}"] = lab.counts.get(f"exit {ended.code}", 0) + 1
            trials += 1
    return trials


def short_sweep(lab: Lab, stride: int) -> int:
    """Each write, and each read, that takes only half: the job goes on as if nothing had been."""
    trials = 0
    for kind in (Kind.WRITE, Kind.READ):
        for moment in moments(lab.calls([kind]), stride):
            lab.reset()
            ended = lab.run(Fault([kind], moment, Action.SHORTEN))
            assert ended.code == 0, ended
            assert lab.state() == "complete"
            trials += 1
    return trials
