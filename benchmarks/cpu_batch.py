"""A batch against one program per model: ``python -m benchmarks.cpu_batch DIR``.

Eight tuned models on one base of 0.4 billion parameters, each with files of its own, patched
without data by ``tailor-fast batch``, by a batch whose ``max_ram`` does not let it keep the base,
and by eight runs of ``patch``; the outputs must be the same bytes. Once with all inputs in the page
cache; once with a cache that keeps nothing, as where models are larger than the memory. Makes the
models in DIR and checks the outputs, unless ``--prepare`` has done so before; removes DIR.
"""

import argparse
import filecmp
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, Figure, interleaved, write

SIZE = "0.4B"
MODELS = 8
FLOOR = 1.4
NARROW = "1GiB"  # room for the run, not for the base beside it
_ROUNDS = 2
_CLEARING_SECONDS = 0.2
_BLOCK = 512  # bytes, of rusage


class Setting:
    """The models, and the three ways to patch them.

    Args:
        folder: of everything.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.base = folder / "base"
        self.models = [folder / "tuned"]
        self.models += [folder / f"tuned-{number}" for number in range(1, MODELS)]
        self.ways: dict[str, Callable[[], None]] = {
            "one by one": self._one_by_one,
            "batch, base not kept": partial(self._batch, "narrow", NARROW),
            "batch": partial(self._batch, "batch", "null"),
        }

    def make(self) -> None:
        """Write the models."""
        self._folder.mkdir(parents=True)
        write_pair(self._folder, SHAPES[SIZE])
        for model in self.models[1:]:
            shutil.copytree(self.models[0], model)

    def check(self) -> None:
        """Refuse to time outputs that differ."""
        for call in self.ways.values():
            call()
        for model in self.models:
            alone = model.with_name(f"alone-{model.name}")
            shards = [path.name for path in alone.glob("*.safetensors")]
            for kind in ("batch", "narrow"):
                ours = model.with_name(f"{kind}-{model.name}")
                _, differing, missing = filecmp.cmpfiles(ours, alone, shards, shallow=False)
                if differing or missing or not shards:
                    raise SystemExit(f"{ours} and {alone} differ")
        self.clear()

    def clear(self) -> None:
        """Remove all outputs."""
        for kind in ("alone", "batch", "narrow"):
            for path in self._folder.glob(f"{kind}-*"):
                shutil.rmtree(path)

    def _one_by_one(self) -> None:
        for model in self.models:
            _run("patch", self.base, model, "-o", model.with_name(f"alone-{model.name}"))

    def _batch(self, kind: str, max_ram: str) -> None:
        lines = [f"  - {{tuned: {model}, out: {kind}-{model.name}}}" for model in self.models]
        head = f"defaults: {{base: {self.base}, max_ram: {max_ram}}}"
        jobs = self._folder / f"{kind}.yaml"
        jobs.write_text("\n".join([head, "jobs:", *lines]) + "\n")
        _run("batch", jobs)

    @contextmanager
    def cache_kept_empty(self) -> Iterator[None]:
        """The system forgets what is read of the models, a fifth of a second later at most."""
        over = threading.Event()
        files = [path for model in (self.base, *self.models) for path in model.iterdir()]

        def clear() -> None:
            while not over.wait(_CLEARING_SECONDS):
                for path in files:
                    forget(path)

        thread = threading.Thread(target=clear)
        for path in files:
            forget(path)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # a page that is not on disk yet stays
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _run(*arguments: object) -> None:
    command = [sys.executable, "-m", "tailor_fast", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def from_disk(call: Callable[[], None]) -> float:
    """Gigabytes that programs which ``call`` starts read from disk, not from the page cache."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
    call()
    return (resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before) * _BLOCK / 1e9


def measure(setting: Setting) -> tuple[list[Figure], list[float]]:
    """Figures, and the gigabytes from disk behind each."""
    figures: list[Figure] = []
    traffic: list[float] = []
    for inputs, rounds in (("warm", _ROUNDS), ("cache kept empty", 1)):
        read: dict[str, float] = {}

        def counted(way: str, read: dict[str, float] = read) -> None:
            read[way] = from_disk(setting.ways[way])
            setting.clear()  # outputs must not push inputs out of the cache

        calls: dict[str, Callable[[], object]] = {
            way: partial(counted, way) for way in setting.ways
        }
        if inputs == "warm":
            seconds = interleaved(calls, rounds)
        else:
            with setting.cache_kept_empty():
                seconds = interleaved(calls, rounds)
        shape = f"{MODELS} x {SIZE}, bfloat16, no data, {inputs}"
        alone = seconds["one by one"]
        for way, value in seconds.items():
            floor = FLOOR if way == "batch" else math.nan
            figures.append(Figure("batch", shape, way, value, alone / value, floor))
            traffic.append(read[way])
    return figures, traffic


def main() -> None:
    """Make, check, measure, remove, write, print."""
    parser = argparse.ArgumentParser(description="Times a batch against single runs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="has room for 30 GB")
    parser.add_argument("--prepare", action="store_true", help="only make the models and check")
    options = parser.parse_args()
    folder = options.folder.absolute()
    setting = Setting(folder)
    if not folder.exists():
        setting.make()
        setting.check()
    if options.prepare:
        return
    figures, traffic = measure(setting)
    write(CPU / "batch.csv", figures, {"gb_from_disk": traffic})
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
