"""``e2e``: whole checkpoints through ``tailor_fast.patch_checkpoint``, block by block on the card.

Random weights of LLaVA-1.5's language model, random text. What the authors' pipeline would take is
extrapolated from one of its blocks, measured in the same run, and said to be.
"""

import argparse
import importlib.util
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import plan
from benchmarks.gpu.pipeline import authors_block
from benchmarks.gpu.plan import DATA, DATA_DRY, MODEL_7B, MODEL_13B, MODEL_DRY, Data, Model
from benchmarks.gpu.run import Run
from benchmarks.gpu.table import Row

if TYPE_CHECKING:
    from tailor_fast import Recipe, Report, RunOptions

NEEDED = ("pydantic", "greenlet", "transformers", "tokenizers")
WORDS = 1000  # of the random text
BATCH = 8
SHARD = 2 * 10**9
PAIR_AND_OUTPUT = 3  # checkpoints on disk at once
MEMORY = 15 * 2**29  # 7.5 GiB: what is left of 8 GiB are the library's own workspaces
WITHIN = {"statistics": "with the forward passes", "other": "reading, hashing, copying"}
FEW = 4  # blocks, where not all of a model's are run


@dataclass(frozen=True)
class Job:
    """One run over one pair.

    Attributes:
        model: its shapes.
        blocks: how many blocks the pair has.
        propagate: as in the recipe.
        layers: blocks that are patched, from the first; the others stay at base, unread.
    """

    model: Model
    blocks: int
    propagate: str
    layers: int

    @property
    def shape(self) -> str:
        """``7B, 32 of 32 blocks``."""
        return f"{self.model.name}, {self.layers} of {self.model.layers} blocks"


def run_part(run: Run, given: argparse.Namespace) -> None:
    """The authors' block, the whole model, then the other jobs on a few blocks."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"patch_checkpoint needs {' and '.join(missing)}, not installed here"
        run.table.add(Row("patch_checkpoint", error=reason))
        return
    data = DATA_DRY if run.dry else DATA
    folder = Path(tempfile.mkdtemp(prefix="tailor_fast-", dir=given.work))
    try:
        _run_jobs(run, data, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_jobs(run: Run, data: Data, folder: Path) -> None:
    models = (MODEL_DRY, MODEL_DRY) if run.dry else (MODEL_7B, MODEL_13B)
    authors: dict[str, float] = {}
    first, second = models
    few = min(FEW, first.layers)
    jobs = [
        Job(first, first.layers, "none", first.layers),
        Job(first, first.layers, "asymmetric", few),
        Job(second, few, "none", few),
    ]
    for job in jobs:
        name = job.model.name
        if name not in authors:
            row = Row("authors block", f"{name} block, {data}")
            run.attempt(row, partial(_authors, run, job.model, data, authors))
        row = Row(f"patch {job.propagate}", job.shape, "bfloat16", "patch_checkpoint")
        run.attempt(row, partial(_patch, run, job, data, folder, authors.get(name)))


def _authors(run: Run, model: Model, data: Data, found: dict[str, float]) -> Iterator[Row]:
    for row in authors_block(run, model, data):
        yield row
        found[model.name] = row.seconds  # the last one is the whole block


class Watch:
    """Progress as rows: one per block, written when the next one begins.

    Raises:
        TimeoutError: from ``group``, when the part's time is used up; the job then cleans up.
    """

    def __init__(self, run: Run, row: Row) -> None:
        self._run, self._row = run, row
        self._block, self._since = "", time.perf_counter()

    def start(self, total_groups: int) -> None:  # noqa: ARG002  the protocol's argument
        """The walk begins."""
        self._since = time.perf_counter()

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:  # noqa: ARG002
        """A group is solved; the last one closes its block too."""
        found = re.search(r"layers\.(\d+)\b", name)
        block = found[1] if found else ""
        if block != self._block:
            self._close(self._block)
            self._block = block
        if done == total:
            self._close(block)
        if self._run.left <= 0:
            raise TimeoutError(f"stopped at {name}, group {done} of {total}: no time left")

    def note(self, text: str) -> None:
        """A decision of the run."""
        print(f"  {text}", flush=True)

    def finish(self) -> None:
        """Nothing to add."""

    def _close(self, block: str) -> None:
        now = time.perf_counter()
        if block:
            row = replace(self._row, work="block", note=f"block {block}")
            self._run.table.add(replace(row, seconds=now - self._since))
        self._since = now


def _patch(run: Run, job: Job, data: Data, folder: Path, authors: float | None) -> Iterator[Row]:
    """One job: the pair, the data, the run; rows by block, by stage, and the whole."""
    from tailor_fast import Recipe, patch_checkpoint

    base, tuned, seconds = _pair(job, folder, run.seed)
    row = Row(f"patch {job.propagate}", job.shape, "bfloat16", "patch_checkpoint")
    yield replace(row, work="make pair", seconds=seconds)
    calibration = _write_data(tuned, data, job.model.vocabulary, run.seed)
    recipe = Recipe(
        decorate="exact",
        propagate=job.propagate,
        layers=f"0-{job.layers - 1}",
    )
    out = folder / "out"

    def patch() -> "Report":
        return patch_checkpoint(
            base,
            tuned,
            out,
            recipe,
            calibration=calibration,
            options=_options(run, data),
            progress=Watch(run, row),
        )

    try:
        report, peak = _with_peak(run, patch)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    yield from _figures(run, job, replace(row, peak_bytes=peak), report, recipe, authors)


def _figures(
    run: Run, job: Job, row: Row, report: "Report", recipe: "Recipe", authors: float | None
) -> Iterator[Row]:
    seconds = dict(report.seconds)
    total = seconds.pop("total")
    known = sum(seconds.values())
    stages = {**seconds, "other": total - known}
    for stage, spent in stages.items():
        note = f"per block; {WITHIN[stage]}" if stage in WITHIN else "per block"
        yield replace(
            row, work=f"stage {stage}", seconds=spent / job.layers, peak_bytes=0, note=note
        )
    patched = len(report.linears)
    expected = job.layers * len(job.model.linears)
    if patched != expected:
        raise AssertionError(f"{patched} layers patched, expected {expected}")
    kept = f"density {report.kept / max(1, report.targeted):.4f}"
    note = f"{kept}; propagate {report.recipe['propagate']}"
    if authors is None:
        yield replace(row, seconds=total, note=f"{note}; the authors' block has no figure")
        return
    theirs = authors * job.layers
    note += f"; authors extrapolated from one measured block: {theirs:.4g} s"
    whole = job.layers == job.model.layers and recipe.propagate == "none"
    bars = plan.END_TO_END_BARS if whole else plan.END_TO_END_BARS[1:]
    yield run.figure(replace(row, note=note), total, ratio=theirs / total, bars=bars)


def _options(run: Run, data: Data) -> "RunOptions":
    from tailor_fast import RunOptions

    return RunOptions(
        device=str(run.device),
        max_ram=None if run.dry else MEMORY,
        batch_size=BATCH,
        samples=data.sequences,
        max_length=data.tokens,
    )


def _with_peak(run: Run, call: Callable[[], "Report"]) -> tuple["Report", int]:
    """What ``call`` returns, and the most device memory that was allocated meanwhile."""
    if run.device.type != "cuda":
        return call(), 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(run.device)
    held = torch.cuda.memory_allocated(run.device)  # the clock's buffer
    result = call()
    return result, torch.cuda.max_memory_allocated(run.device) - held


def _pair(job: Job, folder: Path, seed: int) -> tuple[Path, Path, float]:
    """Base and tuned checkpoint of these shapes; kept for the next job if that shares them."""
    from benchmarks.pairs import Shape, write_pair

    model = job.model
    home = folder / f"{model.name}-{job.blocks}"
    if home.is_dir():
        return home / "base", home / "tuned", 0.0
    for other in folder.iterdir():
        shutil.rmtree(other)
    needed, free = PAIR_AND_OUTPUT * model.weights(job.blocks) * 2, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder} has {free} bytes free, {needed} are needed; --work names another")
    home.mkdir()
    shape = Shape(
        job.blocks, model.hidden, model.intermediate, model.heads, model.heads, SHARD,
        model.vocabulary,
    )  # fmt: skip
    start = time.perf_counter()
    base, tuned = write_pair(home, shape, seed % 2**31)
    return base, tuned, time.perf_counter() - start


def _write_data(tuned: Path, data: Data, vocabulary: int, seed: int) -> Path:
    """Random text of full length, and a tokenizer of whole words beside the weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    spoken = [f"w{i}" for i in range(min(WORDS, vocabulary - len(special)))]
    names = [*special, *spoken]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(tuned)
    drawn = random.Random(seed)
    path = tuned.parent / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(data.sequences):
            text = drawn.choices(spoken, k=data.tokens - 2)
            sample = {"prompt": " ".join(text), "answer": "w0"}  # and the end token
            file.write(json.dumps(sample) + "\n")
    return path
