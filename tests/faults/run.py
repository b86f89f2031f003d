"""Every fault in turn, and a table of what was met: ``python -m tests.faults.run --out faults.md``.

Sections may be run apart: the rows of each take the place of its own in the file.
``--smoke`` takes a few of each and ends within a minute; without it, all of them, about two
hours. A finding ends the run with its sentence.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tests.faults.harness import Kind, Lab, build_shim
from tests.faults.saved import SavedLab
from tests.patching.disk import llama_pair, write_texts

_PRELOADED = "TAILOR_FAULTS"
Row = tuple[str, str, str]  # what was done, how often, what was met


@dataclass(frozen=True)
class Effort:
    """How much of each is done."""

    stride: int
    random_kills: int
    cuts: int
    disk_step: int
    rounds: int
    flips: int
    changes: int
    cases: int
    runs: int
    gigabytes: float


PAGE = """# Faults

Made by `python -m tests.faults.run --out benchmarks/results/faults.md` ({machine}), which takes
`--sections` too, on a pair of two-layer LLaMA models in three files, as root. A trial is a fork of
a process in which everything is imported; a preloaded shim counts the calls by which it changes its
folder and makes one of them go wrong. After each trial OUT must be absent, its old self, or
complete to the last byte; the next run of the same command must end with the bytes of a run without
a break (all files but the report and the picture), inputs unchanged, nothing left beside OUT.
That the shim misses no call is checked with strace, which counts below it: section `shim`. That the
power cuts would find a missing fsync is checked by skipping all of them: section `power-new`.

| section | what | trials | met | seconds |
|---|---|---|---|---|
{table}
{missing}"""
SMOKE = Effort(500, 2, 1, 800_000, 1, 16, 4, 6, 3, 0.0)
FULL = Effort(1, 500, 200, 8192, 20, 2000, 100, 2000, 1000, 1.0)


class Labs:
    """One lab per command, on one pair of small models."""

    def __init__(self, root: Path) -> None:
        self.root = root
        inputs = root / "inputs"
        inputs.mkdir()
        base, tuned = llama_pair(inputs)
        data = write_texts(root / "inputs" / "new.jsonl", 4)
        shards = ("--out-shard-size", "60000")
        patch = ("patch", str(base), str(tuned), "-o", "OUT", "--device", "cpu", *shards)
        self.fresh = self._lab(inputs, patch)
        old = root / "old"
        other = Lab(inputs, root / "other", (*patch, "--density", "0.4"))
        other.out.rename(old)
        self.over = self._lab(inputs, patch, old)
        self.fitted = self._lab(inputs, (*patch, "--calibration", str(data)))
        self.diff = self._lab(inputs, ("diff", str(base), str(tuned), "-o", "OUT"))
        saving = (*patch, "--save-patch", "PATCH")
        self.saved = SavedLab(inputs, root / "trial", saving)
        self.base, self.tuned = base, tuned

    def _lab(self, inputs: Path, arguments: tuple[str, ...], old: Path | None = None) -> Lab:
        return Lab(inputs, self.root / "trial", arguments, old)


def _lab(labs: Labs, name: str) -> tuple[str, Lab]:
    return {
        "new": ("a new OUT", labs.fresh),
        "overwrite": ("with `--overwrite`", labs.over),
        "fitted": ("with calibration", labs.fitted),
        "diff": ("`diff`", labs.diff),
        "saved": ("with `--save-patch`", labs.saved),
    }[name]


def seen(labs: Labs, _effort: Effort) -> Iterator[Row]:
    from tests.faults import seen

    found = seen.compare(labs.root, labs.base, labs.tuned)
    what = "calls that change the folder, counted by the shim and by strace"
    if found is None:
        yield what, "0", "not done: strace is not here, or may not trace"
    else:
        yield what, str(sum(found.values())), f"equal: {_counted(found)}"


def kills(labs: Labs, effort: Effort, name: str) -> Iterator[Row]:
    from tests.faults import sweeps

    what, lab = _lab(labs, name)
    count = sweeps.kill_sweep(lab, effort.stride)
    yield f"kill -9 before and after each call, {what}", str(count), _met(lab)


def resumed(labs: Labs, effort: Effort) -> Iterator[Row]:
    from tests.faults import sweeps

    count = sweeps.kill_resumed(labs.fresh, effort.stride)
    yield "kill -9 at each call of a resumed run", str(count), _met(labs.fresh)


def random(labs: Labs, effort: Effort) -> Iterator[Row]:
    from tests.faults import sweeps

    killed = sweeps.random_kills(labs.fitted, effort.random_kills)
    what = f"{effort.random_kills} ({killed} kills)"
    yield "kill -9 after random times, with calibration", what, _met(labs.fitted)


def errors(labs: Labs, effort: Effort, name: str) -> Iterator[Row]:
    from tests.faults import sweeps

    what, lab = _lab(labs, name)
    if effort.stride > 1:  # one error for each kind of call
        shift, names = 3 * (name == "overwrite"), sweeps.ERRORS
        pairs = [(kind, names[(kind + shift) % len(names)]) for kind in Kind]
        count = sweeps.error_sweep(lab, effort.stride, pairs)
        yield f"a call fails with {', '.join(names)}; {what}", str(count), _met(lab)
        return
    for error in sweeps.ERRORS:
        count = sweeps.error_sweep(lab, 1, [(kind, error) for kind in Kind])
        yield f"each call in turn fails with {error}; {what}", str(count), _met(lab)


def short(labs: Labs, effort: Effort) -> Iterator[Row]:
    from tests.faults import sweeps

    count = sweeps.short_sweep(labs.fresh, effort.stride)
    yield "each write and each read takes half", str(count), "complete every time"


def power(labs: Labs, effort: Effort, name: str) -> Iterator[Row]:
    from tests.faults import disks

    if not disks.can_mount(labs.root):
        yield "power cuts", "0", "not done: this process may not mount"
        return
    what, lab = _lab(labs, name)
    found = disks.power_cuts(lab, effort.cuts)
    half = found["half"]
    assert not half, f"{half} of {effort.cuts} power cuts left half an output"
    yield f"power cut, ext4 image, {what}", str(effort.cuts), _counted(found)
    if name != "new":
        return
    blind, trials = disks.power_cuts(labs.fresh, 1, synced=False), 1
    while not blind["half"] and trials < 6:  # a cut may come before anything, or after all
        blind = disks.power_cuts(labs.fresh, 1, synced=False, seed=trials)
        trials += 1
    assert blind["half"], f"without an fsync every output was whole: the test is blind; {blind}"
    yield "the same with every fsync skipped", str(trials), f"{_counted(blind)}: the test sees it"


def room(labs: Labs, effort: Effort) -> Iterator[Row]:
    from tests.faults import disks

    if not disks.can_mount(labs.root):
        yield "small disks", "0", "not done: this process may not mount"
        return
    count = disks.small_disks(labs.fresh, effort.disk_step)
    what = f"tmpfs of every size in steps of {effort.disk_step >> 10} KiB, then room is made"
    yield what, str(count), _met(labs.fresh)
    yield "inodes run out", str(disks.few_inodes(labs.fresh, effort.stride)), _met(labs.fresh)


def races(labs: Labs, effort: Effort) -> Iterator[Row]:
    from tests.faults import races

    for processes in (2, 8):
        losers = races.writers(labs.fresh, processes, effort.rounds)
        met = f"{effort.rounds} ended with 0, {losers} with 73"
        yield f"{processes} processes on one OUT", str(effort.rounds), met
    found = races.reader(labs.over, effort.rounds)
    yield "a reader opens OUT while it is replaced", str(sum(found.values())), _counted(found)
    found = races.changing_inputs(labs.fresh, effort.changes)
    what = "an input truncated, replaced, overwritten or unlinked while it is read"
    yield what, str(effort.changes), _counted(found)


def damage(labs: Labs, effort: Effort) -> Iterator[Row]:
    from tests.faults import exactness

    labs.fresh.reset()
    assert labs.fresh.run().code == 0
    found = exactness.bit_flips(labs.base, labs.fresh.out, effort.flips)
    assert found == effort.flips, f"{effort.flips - found} of {effort.flips} flips were not found"
    yield "single-bit flips in files with a manifest", str(effort.flips), f"{found} found"
    with tempfile.TemporaryDirectory(dir=labs.root) as folder:
        count = exactness.patches(Path(folder), effort.cases)
    yield "patch files: apply gives target, revert gives base", str(count), "bytewise equal"


def memory(labs: Labs, effort: Effort) -> Iterator[Row]:
    from tests.faults import exactness

    kib, fds = exactness.leaks(labs.fresh, effort.runs)
    assert fds == 0, f"{fds} files stayed open"
    assert kib < 4096, f"{kib} KiB more are resident after {effort.runs} runs"
    yield "runs in one process", str(effort.runs), f"{kib} KiB more resident, {fds} files more open"
    if effort.gigabytes:
        with tempfile.TemporaryDirectory(dir=labs.root) as folder:
            peaks = exactness.big_tensors(Path(folder), effort.gigabytes)
        assert max(peaks.values()) <= 700, f"peak resident MiB: {peaks}"
        met = ", ".join(f"{name} {peak} MiB" for name, peak in peaks.items())
        what = f"two tensors of {effort.gigabytes:.0f} GiB each streamed, peak resident"
        yield what, "1", met


SECTIONS: dict[str, Callable[[Labs, Effort], Iterator[Row]]] = {
    "shim": seen,
    **{
        f"kills-{name}": partial(kills, name=name)
        for name in ("new", "overwrite", "fitted", "diff", "saved")
    },
    "kills-resumed": resumed,
    "kills-random": random,
    **{f"errors-{name}": partial(errors, name=name) for name in ("new", "overwrite")},
    "short": short,
    **{f"power-{name}": partial(power, name=name) for name in ("new", "overwrite")},
    "room": room,
    "races": races,
    "damage": damage,
    "memory": memory,
}


def _met(lab: Lab) -> str:
    counts, lab.counts = lab.counts, {}
    return f"{_counted(counts)}; after the next run golden"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if count)


def run(effort: Effort, sections: list[str], write: Callable[[str, list[str]], None]) -> None:
    """Run sections and write the rows of each."""
    torch.set_num_threads(1)  # forks: no threads may run beside the one that forks
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        labs = Labs(Path(folder))
        for name in sections:
            began, rows = time.monotonic(), []
            for row in SECTIONS[name](labs, effort):
                rows.append(f"| {' | '.join((name, *row))} | {time.monotonic() - began:.0f} |")
                began = time.monotonic()
            write(name, rows)


def merge(path: Path, section: str, rows: list[str]) -> None:
    """Put the rows of a section into the page ``path``, and say which sections it lacks."""
    found: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for line in path.read_text().splitlines() if path.exists() else ():
        name = line.removeprefix("| ").partition(" | ")[0]
        if line.startswith("| ") and name in found:
            found[name].append(line)
    found[section] = rows
    absent = ", ".join(f"`{name}`" for name, lines in found.items() if not lines)
    table = "\n".join(line for lines in found.values() for line in lines)
    missing = f"\nNot run in full: {absent}; `make test` runs a few of each.\n" if absent else ""
    machine = f"Linux {platform.release()}, torch {torch.__version__}, {os.cpu_count()} cores"
    path.write_text(PAGE.format(machine=machine, table=table, missing=missing))


def main() -> int:
    """Compile the shim, start again with it preloaded, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="page that the rows are put into")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    given = parser.parse_args()
    if _PRELOADED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = build_shim(Path(folder))
            if library is None:
                sys.stderr.write("no C compiler\n")
                return 77
            environment = {**os.environ, _PRELOADED: "1", "LD_PRELOAD": str(library)}
            command = [sys.executable, "-m", "tests.faults.run", *sys.argv[1:]]
            return subprocess.run(command, env=environment, check=False).returncode
    if given.smoke and given.out is not None:
        parser.error("--out is for full runs; leave it or --smoke out")

    def write(name: str, rows: list[str]) -> None:
        sys.stdout.write("\n".join(rows) + "\n")
        sys.stdout.flush()
        if given.out is not None:
            merge(given.out, name, rows)

    run(SMOKE if given.smoke else FULL, given.sections, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
