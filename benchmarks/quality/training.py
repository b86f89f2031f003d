"""The base model, trained on the old tasks, and the fine-tuned one that forgets them.

Both are written by ``save_pretrained`` and kept: a folder records what made it, settings and
source, and is used again as long as that still matches.
"""

import contextlib
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from benchmarks.quality import families, scenes, sources, tinyblip, tinyllava
from benchmarks.quality.families import FAMILIES, Family

Report = Callable[[str], None]

MARKER = "made_by_demo.json"
_WARM_UP = 50  # steps
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0
REPORT_EVERY = 100  # steps


@dataclass(frozen=True)
class Pretraining:
    """How the base model is made; all of its parameters are trained.

    Attributes:
        mixture: tasks of one batch. ``exists`` stands in it twice: it is learned last, after a
            plateau of many hundred steps, which twice the scenes make shorter.
        steps: batches.
        per_task: scenes for each name in ``mixture``.
        learning_rate: its peak.
        noise: standard deviation of what is added to the normalised pixels.
        seed: of weights, scenes and noise.
        family: kind of model, a key of ``FAMILIES``.
    """

    mixture: tuple[str, ...] = (*scenes.OLD_TASKS, "exists")
    steps: int = 1500
    per_task: int = 24
    learning_rate: float = 2e-3
    noise: float = 0.3
    seed: int = 0
    family: str = "llava"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The old tasks, each once."""
        return tuple(dict.fromkeys(self.mixture))


@dataclass(frozen=True)
class Finetuning:
    """How it is fine-tuned: its family's last layers and the projection, on one new task."""

    task: str
    steps: int
    learning_rate: float
    batch: int = 64
    layers: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """A pair of models and the size of its calibration data."""

    pretraining: Pretraining
    finetuning: Finetuning
    new_samples: int = 128
    old_samples_per_task: int = 25


# Steps and rates at which the new task has just been learned: longer only forgets more.
FINETUNING = {
    "code": Finetuning("code", steps=400, learning_rate=1e-3),
    "next": Finetuning("next", steps=150, learning_rate=5e-4),
}
DEMO = Setting(Pretraining(), FINETUNING["code"])
# Seconds of training, for tests: two old tasks, and the same order of the methods as in the demo.
SMALL = Setting(
    Pretraining(mixture=("what", "parity"), steps=300, per_task=48, seed=3),
    Finetuning("code", steps=150, learning_rate=1e-3),
    old_samples_per_task=64,
)


@dataclass(frozen=True)
class Made:
    """A checkpoint folder and the seconds that its training took, in this run or an earlier one."""

    folder: Path
    seconds: float
    fingerprint: str


@dataclass(frozen=True)
class Pair:
    """What ``make_pair`` leaves on disk.

    Attributes:
        base: checkpoint that knows the old tasks.
        tuned: the same, fine-tuned on the new task.
        new_data: calibration data of the new task, JSONL with images.
        old_data: the same of the old tasks, for retention.
    """

    base: Made
    tuned: Made
    new_data: Path
    old_data: Path


def make_pair(work: Path, setting: Setting, report: Report = print) -> Pair:
    """Make, or find again, a base and a fine-tuned checkpoint and calibration data under ``work``.

    Writes ``base/``, ``tuned/``, ``new.jsonl``, ``old.jsonl`` and ``img/``.

    Args:
        work: folder, made when missing.
        setting: what to train and for how long.
        report: called with one line of progress at a time.

    Raises:
        FileExistsError: ``base`` or ``tuned`` exists and is not a folder of an earlier run.
    """
    base = make_base(work / "base", setting.pretraining, report)
    tuned = make_tuned(base, work / "tuned", setting.finetuning, report)
    pair = Pair(base, tuned, work / "new.jsonl", work / "old.jsonl")
    seed = setting.finetuning.seed
    new = scenes.draw(setting.finetuning.task, "train", setting.new_samples, seed)
    per_task = setting.old_samples_per_task
    old = [scenes.draw(task, "train", per_task, seed) for task in setting.pretraining.tasks]
    scenes.write([new], pair.new_data)
    scenes.write(old, pair.old_data)
    return pair


def make_base(folder: Path, setting: Pretraining, report: Report = print) -> Made:
    """Train a new model on the old tasks and write it to ``folder``, unless it is there."""

    family = FAMILIES[setting.family]

    def build() -> Any:
        model = family.new_model(setting.seed)
        parameters = list(model.parameters())
        batches = _batches(setting.mixture, setting.per_task, setting.steps, setting.seed)
        batches = _noisy(batches, setting.noise, setting.seed)
        loop = _Loop(family, setting.steps, setting.learning_rate, report)
        loop.train(model, parameters, batches)
        return model

    return _make(folder, family, {"pretraining": asdict(setting)}, build, report)


def make_tuned(
    base: Made,
    folder: Path,
    setting: Finetuning,
    report: Report = print,
    *,
    family: Family = FAMILIES["llava"],
) -> Made:
    """Fine-tune ``base`` on one new task and write the result to ``folder``, unless it is there."""

    def build() -> Any:
        model = family.load(base.folder)
        parameters = family.tuned(model, setting.layers)
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        batches = _batches((setting.task,), setting.batch, setting.steps, setting.seed)
        loop = _Loop(family, setting.steps, setting.learning_rate, report)
        loop.train(model, parameters, batches)
        return model

    made_of = {"finetuning": asdict(setting), "base": base.fingerprint}
    return _make(folder, family, made_of, build, report)


def _make(
    folder: Path, family: Family, made_of: dict[str, Any], build: Callable[[], Any], report: Report
) -> Made:
    fingerprint = _fingerprint(made_of)
    what = "base" if "pretraining" in made_of else "tuned"
    marker = folder / MARKER
    if marker.exists():
        record = json.loads(marker.read_text(encoding="utf-8"))
        if record["fingerprint"] == fingerprint:
            report(f"{what}: using {folder}")
            return Made(folder, record["seconds"], fingerprint)
    elif folder.exists():
        raise FileExistsError(f"{folder} exists and was not made here; name another work folder")
    began = time.perf_counter()
    with _one_thread():
        model = build()
    seconds = time.perf_counter() - began
    # Staged beside and renamed last, so that a folder with a marker is complete.
    staged = folder.with_name(f"{folder.name}.partial")
    for stale in (staged, folder):
        if stale.exists():
            shutil.rmtree(stale)
    family.save(model, staged)
    record = {"fingerprint": fingerprint, "seconds": seconds, **made_of}
    (staged / MARKER).write_text(json.dumps(record, indent=2), encoding="utf-8")
    staged.rename(folder)
    report(f"{what}: {folder} trained in {seconds:.0f} s")
    return Made(folder, seconds, fingerprint)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: the same weights on any machine size, and steady when cores are shared.

    A step takes 60 ms so, 46 ms on two idle cores, and over a second on two busy ones, where the
    threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fingerprint(made_of: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    digest.update(
        sources.digest((scenes, tinyllava, tinyblip, families, sys.modules[__name__])).encode()
    )
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    return digest.hexdigest()


def _batches(
    mixture: Sequence[str], per_task: int, steps: int, seed: int
) -> Iterator[list[tinyllava.Batch]]:
    """Yield the scenes of each step, those with answers of one length together: no padding."""
    for step in range(steps):
        groups: dict[int, list[scenes.Scenes]] = {}
        for slot, task in enumerate(mixture):
            stream = (seed * 1_000_000 + step) * len(mixture) + slot
            drawn = scenes.draw(task, "train", per_task, stream)
            groups.setdefault(len(drawn.answers[0].split()), []).append(drawn)
        yield [tinyllava.encode(group) for group in groups.values()]


def _noisy(
    steps: Iterator[list[tinyllava.Batch]], deviation: float, seed: int
) -> Iterator[list[tinyllava.Batch]]:
    """Add Gaussian noise to the pixels, so that a thousand digits are not learned by heart."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(batch: tinyllava.Batch) -> tinyllava.Batch:
        pixels = batch.pixel_values
        noise = torch.randn(len(pixels), 1, *pixels.shape[2:], generator=generator)
        return batch._replace(pixel_values=pixels + deviation * noise)

    for batches in steps:
        yield [noisy(batch) for batch in batches]


@dataclass(frozen=True)
class _Loop:
    """Adam with warm-up and a cosine, for a given family, number of steps and peak rate."""

    family: Family
    count: int
    learning_rate: float
    report: Report

    def rate(self, step: int) -> float:
        """The learning rate's share of its peak."""
        return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.count))

    def train(
        self,
        model: Any,
        parameters: list[torch.nn.Parameter],
        steps: Iterator[list[tinyllava.Batch]],
    ) -> None:
        """Train ``parameters`` in place."""
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        model.train()
        for step, batches in enumerate(steps, 1):
            tokens = sum(batch.answer_ids.numel() for batch in batches)
            loss = (
                torch.stack([self._answer_loss(model, batch) for batch in batches]).sum() / tokens
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % REPORT_EVERY == 0:
                self.report(f"  step {step}/{self.count}, loss {loss.item():.3f}")
        model.eval()

    def _answer_loss(self, model: Any, batch: tinyllava.Batch) -> torch.Tensor:
        """Cross-entropy summed over the answers' tokens, each after the true ones before."""
        logits = self.family.answer_logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch.answer_ids.flatten(), reduction="sum")
