"""``diff``, ``apply`` and ``revert`` on the CPU against ``dd``: ``results/cpu/patchfile.csv``.

The baseline moves the same bytes: for ``diff`` it reads both checkpoints and copies the patch, for
the other two it copies the checkpoint. What it writes is made durable, as ours is. The page cache
is dropped before every call where the system permits that (root on Linux): ``cold``, else ``warm``.
"""

import argparse
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.results import CPU, Figure, write
from tailor_fast.checkpoint import StagedFile, TensorSpec, open_checkpoint, plan_layout
from tailor_fast.patchfile import apply_patch, diff_checkpoints, revert_patch

SIDE = 4096  # of each square bf16 matrix: 33.5 MB
DENSITY = 0.1
FLOOR = 0.85
_DROP = Path("/proc/sys/vm/drop_caches")


def make_pair(folder: Path, tensors: int, side: int = SIDE) -> tuple[Path, Path]:
    """Write two checkpoints whose bf16 words differ in every tenth place, at random."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(side * side, generator=generator).bfloat16().view(torch.int16)
    differs = torch.rand(side * side, generator=generator) < DENSITY
    xor = torch.where(differs, torch.randint(1, 128, base.shape, dtype=torch.int16), 0)
    specs = [TensorSpec(f"layers.{n:03}.weight", "BF16", (side, side)) for n in range(tensors)]
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, words in zip(paths, (base, base ^ xor), strict=True):
        with StagedFile(path, plan_layout(specs, max_shard_bytes=None)) as staged:
            for number, spec in enumerate(specs):  # shifted, so that no two tensors are equal
                staged.write(spec.name, 0, words.roll(4099 * number))
            staged.commit()
    return paths


def check(base: Path, tuned: Path, folder: Path) -> None:
    """The gate: there and back, byte by byte."""
    patch, there, back = (folder / f"{name}.safetensors" for name in ("patch", "there", "back"))
    diff_checkpoints(base, tuned, patch)
    apply_patch(base, patch, there)
    revert_patch(there, patch, back)
    for one, other in ((there, tuned), (back, base)):
        with open_checkpoint(one) as left, open_checkpoint(other) as right:
            for name in left.tensors:
                words = (file.read(name).view(torch.int16) for file in (left, right))
                if not torch.equal(*words):
                    raise AssertionError(f"{one}: {name} is not that of {other}")
    for path in (patch, there, back):
        path.unlink()


def copy(source: Path, to: str) -> None:
    """``dd`` from a file to a file, made durable, or to nowhere."""
    durable = [] if to == os.devnull else ["conv=fsync"]
    command = ["dd", f"if={source}", f"of={to}", "bs=4M", *durable]
    subprocess.run(command, check=True, capture_output=True)


def drops_cache() -> bool:
    """Whether the page cache may be dropped here."""
    return os.access(_DROP, os.W_OK)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taking turns; what comes before a call is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            os.sync()
            if drops_cache():
                _DROP.write_text("3")
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(folder: Path, tensors: int, rounds: int, side: int = SIDE) -> list[Figure]:
    """Figures of one pair, after the gate on a smaller one."""
    small = folder / "small"
    small.mkdir()
    check(*make_pair(small, 2, 512), small)
    base, tuned = make_pair(folder, tensors, side)
    made, patch = folder / "made.safetensors", folder / "patch.tailor.safetensors"
    diff_checkpoints(base, tuned, patch)

    def dd_diff() -> None:
        copy(base, os.devnull)
        copy(tuned, os.devnull)
        copy(patch, str(made))

    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "diff": (dd_diff, lambda: diff_checkpoints(base, tuned, made, overwrite=True)),
        "apply": (
            lambda: copy(base, str(made)),
            lambda: apply_patch(base, patch, made, overwrite=True),
        ),
        "revert": (
            lambda: copy(tuned, str(made)),
            lambda: revert_patch(tuned, patch, made, overwrite=True),
        ),
    }
    shape = f"{base.stat().st_size / 1e9:.2f} GB bfloat16, {DENSITY:.0%}"
    state = "cold" if drops_cache() else "warm"
    figures = []
    for work, (baseline, ours) in works.items():
        made.unlink(missing_ok=True)
        seconds = timed({"dd": baseline, "tailor_fast": ours}, rounds)
        for provider, value in seconds.items():
            floor = math.nan if provider == "dd" else FLOOR
            row = Figure(f"{work} {state}", shape, provider, value, seconds["dd"] / value, floor)
            figures.append(row)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=30, help="matrices of 33.5 MB")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where some 4 GB of files may lie meanwhile")
    parser.add_argument("--out", type=Path, default=CPU / "patchfile.csv")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        figures = measure(Path(folder), options.tensors, options.rounds, options.side)
    write(options.out, figures)


if __name__ == "__main__":
    main()
