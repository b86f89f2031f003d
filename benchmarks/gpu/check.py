"""``check``: every op of a backend on fresh random problems, the GPU tests, the sanitizer."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import IO

import torch

from benchmarks.gpu import holding, overlap
from benchmarks.gpu.run import Run
from benchmarks.gpu.table import Row
from benchmarks.results import ROOT
from tailor_fast.ops import OPS

Hold = Callable[[Run, holding.Shape, torch.dtype, int], str]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WORDS = (torch.int8, torch.bfloat16, torch.float32)

MATRICES = [(1, 1), (7, 3), (64, 128), (130, 257), (300, 96), (513, 130), (1031, 384), (2049, 64)]
LAYERS = [(1, 3), (3, 7), (5, 128), (2, 129), (33, 257), (64, 300), (130, 384), (48, 640)]
PAIRS = [(1, 1), (1, 4097), (37, 1), (5, 127), (64, 128), (33, 300), (128, 1024), (513, 1031)]
FLAT = [(1, 1), (1, 7), (1, 64), (5, 13), (63, 65), (1, 65536), (1, 65537), (401, 499)]
HELD: dict[str, tuple[Hold, list[holding.Shape], tuple[torch.dtype, ...]]] = {
    "accumulate_gram_": (holding.hold_gram, MATRICES, FLOATS),
    "accumulate_cross_gram_": (holding.hold_cross_gram, MATRICES, FLOATS),
    "accumulate_gram_diag_": (holding.hold_gram_diag, MATRICES, FLOATS),
    "select_patch": (holding.hold_select_patch, PAIRS, FLOATS),
    "select_patches": (holding.hold_select_patches, PAIRS, FLOATS),
    "topk_mask": (holding.hold_topk_mask, PAIRS, FLOATS),
    "TopKSelector": (holding.hold_selector, PAIRS, FLOATS),
    "decorate_exact": (holding.hold_exact, LAYERS, FLOATS),
    "decorate_obs": (holding.hold_obs, LAYERS, FLOATS),
    "decorate_official": (holding.hold_official, LAYERS, FLOATS),
    "encode and apply": (holding.hold_codec, FLAT, WORDS),
    "panels": (overlap.hold_panels, MATRICES, FLOATS),
    "arrivals": (overlap.hold_arrivals, PAIRS, FLOATS),
    "outbox": (overlap.hold_outbox, PAIRS, FLOATS),
    "own streams": (overlap.hold_threads, PAIRS, FLOATS),
}
SMALL = slice(1, 4)  # of the shapes: a dry run takes one for each dtype
SANITIZED = slice(3, 4)
FAULT = 86  # exit status of the sanitizer when it finds one; nothing else uses it


def run_part(run: Run, given: argparse.Namespace) -> None:
    """Run the part; each case, tool and test run is a row.

    The tools run beside the cases, in processes of their own: most of the time goes into compiling,
    and nothing is timed here.
    """
    tools = [] if given.sanitized else [*_sanitizers(run), *_gpu_tests(run)]
    # What torch.empty gives is NaN or the largest integer: an element left unwritten shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _hold_all(run, sanitized=given.sanitized)
        if not given.sanitized:
            row = Row("patch without data", "on the CPU and here", "bfloat16", "patch_checkpoint")
            run.attempt(row, partial(_whole_job, run, row))
    finally:
        torch.use_deterministic_algorithms(False)
        for tool in tools:
            tool.finish(run)


def _hold_all(run: Run, *, sanitized: bool) -> None:
    index = 0
    for name, (hold, shapes, dtypes) in HELD.items():
        cases: Iterable[tuple[holding.Shape, torch.dtype]] = product(shapes, dtypes)
        if sanitized:
            cases = product(shapes[SANITIZED], dtypes[:1])
        elif run.dry:
            cases = zip(shapes[SMALL], dtypes, strict=True)
        for shape, dtype in cases:
            index += 1
            kind = str(dtype).removeprefix("torch.")
            row = Row(name, str(list(shape)), kind, run.backend)
            run.attempt(row, partial(_held, hold, run, shape, dtype, index, row))


def _held(
    hold: Hold, run: Run, shape: holding.Shape, dtype: torch.dtype, index: int, row: Row
) -> Iterator[Row]:
    yield replace(row, note=f"held; {hold(run, shape, dtype, index)}".rstrip("; "))


def _whole_job(run: Run, row: Row) -> Iterator[Row]:
    yield replace(row, note=overlap.hold_checkpoint(run))


@dataclass
class Tool:
    """A program that runs beside the cases, or why it does not.

    Attributes:
        row: where its result goes.
        process: None where it was not started.
        log: what it says.
        result: a file that it writes once it has begun its work; None when it needs none.
    """

    row: Row
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    result: Path | None = None

    @classmethod
    def start(
        cls, row: Row, command: list[str], result: Path | None = None, **environment: str
    ) -> "Tool":
        """Start it from the checkout's root."""
        log = tempfile.TemporaryFile()  # noqa: SIM115  closed in finish()
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=ROOT.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        return cls(row, process, log, result)

    def finish(self, run: Run) -> None:
        """Wait for it while there is time, and add its row."""
        if self.process is None or self.log is None:
            run.table.add(self.row)
            return
        try:
            status: int | None = self.process.wait(max(1.0, run.left))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = None
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        self.log.close()
        begun = self.result is None or self.result.is_file()
        if self.result is not None:
            shutil.rmtree(self.result.parent, ignore_errors=True)
        run.table.add(verdict(self.row, status, text, begun=begun))


def verdict(row: Row, status: int | None, text: str, *, begun: bool) -> Row:
    """The row of a tool that ended.

    Args:
        row: where its result goes.
        status: exit status; None where it was stopped.
        text: what it said.
        begun: whether it came as far as its first case.
    """
    lines = [line.strip("= \n") for line in text.splitlines() if line.strip("= \n")]
    last = lines[-1] if lines else ""
    if status == 0:
        return replace(row, note=last)
    if status is None:
        return replace(row, error=f"stopped, no time left: {last}")
    print(text, flush=True)
    if not begun:
        return replace(row, note=f"not run, it does not work on this machine: {last}")
    return replace(row, error=f"exit status {status}: {last}")


def _sanitizers(run: Run) -> Iterator[Tool]:
    """The small cases under each tool, with every allocation made by the driver."""
    sanitizer = shutil.which("compute-sanitizer")
    for name in ("memcheck", "racecheck"):
        row = Row("compute-sanitizer", name)
        if sanitizer is None or run.device.type != "cuda":
            why = "no card" if sanitizer else "compute-sanitizer is not on the path"
            yield Tool(replace(row, note=f"not run: {why}"))
            continue
        folder = run.table.path.parent / f"sanitized-{name}"
        command = [sanitizer, "--tool", name, "--error-exitcode", str(FAULT)]
        command += ["--target-processes", "application-only"]
        command += [sys.executable, "-m", "benchmarks.gpu", "check", "--sanitized"]
        command += ["--out", str(folder), "--seed", str(run.seed), "--backend", run.backend]
        command += ["--seconds", str(run.left)]
        # A caching allocator hides an access beyond the end of a tensor.
        yield Tool.start(row, command, folder / "check.csv", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _gpu_tests(run: Run) -> Iterator[Tool]:
    """The GPU tests, where a skipped one counts as failed; without a card they are only listed."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        note = f"not run: {' and '.join(missing)} not installed"
        yield Tool(Row("pytest -m gpu", note=note))
        return
    cuda = run.device.type == "cuda"
    # One process per op: each compiles its own kernels.
    for folder in [f"tests/ops/{op}" for op in OPS] if cuda else ["tests/ops"]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", folder]
        command += ["--require-gpu", "-p", "no:cacheprovider"] if cuda else ["--collect-only"]
        yield Tool.start(Row("pytest -m gpu", folder), command)
