"""Training of the larger pair on its device: bf16 autocast, float32 weights, shifted noisy scenes.

A finished folder records what made it and is used again as long as that still matches.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from benchmarks.quality import families, sources, tinyllava
from benchmarks.quality import scenes as small_scenes
from benchmarks.quality.families import Family
from benchmarks.quality.large import model as models
from benchmarks.quality.large import scenes
from benchmarks.quality.large.model import Size, encode, family_of
from benchmarks.quality.protocols import Protocol
from benchmarks.quality.scenes import Scenes
from benchmarks.quality.tinyllava import Batch
from benchmarks.quality.training import (
    MARKER,
    REPORT_EVERY,
    Finetuning,
    Made,
    Pretraining,
    Report,
)

_WARM_UP = 50  # steps
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class LargeProtocol(Protocol):
    """A protocol of the larger variant.

    Attributes:
        size: of the model.
        device: where it is trained, asked and tailored.
    """

    size: Size
    device: torch.device

    @property
    def family(self) -> Family:
        """The kind of model."""
        return family_of(self.size)

    def make(
        self, work: Path, pretraining_seed: int, finetuning_seed: int, report: Report
    ) -> tuple[Made, Made]:
        """Train the base and the fine-tuned model, or find them again under ``work``."""
        family = self.family
        pretraining = replace(self.pretraining, seed=pretraining_seed)
        finetuning = replace(self.finetuning, seed=finetuning_seed)

        def new_base() -> Any:
            model = family.new_model(pretraining.seed).to(self.device)
            mixture = pretraining.mixture
            batches = self._batches(
                mixture, pretraining.per_task, pretraining.steps, pretraining.seed
            )
            _train(family, model, list(model.parameters()), batches, pretraining, report)
            return model

        shared = {"size": asdict(self.size), "device": self.device.type}
        folder = work / f"{pretraining.family}-{pretraining_seed}"
        base = _make(folder, family, {**shared, "pretraining": asdict(pretraining)}, new_base)

        def new_tuned() -> Any:
            model = family.load(base.folder).to(self.device)
            model.requires_grad_(False)
            parameters = family.tuned(model, finetuning.layers)
            for parameter in parameters:
                parameter.requires_grad_(True)
            batches = self._batches(
                (finetuning.task,), finetuning.batch, finetuning.steps, finetuning.seed
            )
            _train(family, model, parameters, batches, finetuning, report)
            return model

        folder = work / f"{self.name}-{pretraining_seed}-{finetuning_seed}"
        made_of = {**shared, "finetuning": asdict(finetuning), "base": base.fingerprint}
        return base, _make(folder, family, made_of, new_tuned)

    def _batches(
        self, mixture: Sequence[str], per_task: int, steps: int, seed: int
    ) -> Iterator[list[Batch]]:
        """Yield the scenes of each step, those with answers of one length together."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for step in range(steps):
            groups: dict[int, list[Scenes]] = {}
            for slot, task in enumerate(mixture):
                stream = (seed * 1_000_000 + step) * len(mixture) + slot
                drawn = scenes.draw(task, "train", per_task, stream)
                groups.setdefault(len(drawn.answers[0].split()), []).append(drawn)
            yield [
                augmented(encode(group, self.device), self.pretraining.noise, generator)
                for group in groups.values()
            ]


def augmented(batch: Batch, noise: float, generator: torch.Generator) -> Batch:
    """Shift each scene by up to one pixel either way and add Gaussian noise to its pixels.

    Args:
        batch: float32 pixels ``[n, 3, side, side]``, the channels equal.
        noise: standard deviation.
        generator: on the device of the batch.
    """
    count, _, side, _ = batch.pixel_values.shape
    device = batch.pixel_values.device
    padded = F.pad(batch.pixel_values[:, :1], (1, 1, 1, 1), mode="replicate")[:, 0]
    shifts = torch.randint(3, (2, count, 1), generator=generator, device=device)
    down, right = torch.arange(side, device=device) + shifts
    scene = torch.arange(count, device=device)[:, None, None]
    shifted = padded[scene, down[:, :, None], right[:, None, :]]
    added = torch.randn(shifted.shape, generator=generator, device=device)
    pixels = (shifted + noise * added)[:, None].expand(-1, 3, -1, -1)
    return batch._replace(pixel_values=pixels.contiguous())


def _make(folder: Path, family: Family, made_of: dict[str, Any], build: Callable[[], Any]) -> Made:
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    modules = (small_scenes, scenes, tinyllava, families, models, sys.modules[__name__])
    digest.update(sources.digest(modules).encode())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    fingerprint, marker = digest.hexdigest(), folder / MARKER
    if marker.exists():
        record = json.loads(marker.read_text(encoding="utf-8"))
        if record["fingerprint"] == fingerprint:
            return Made(folder, record["seconds"], fingerprint)
    elif folder.exists():
        raise FileExistsError(f"{folder} exists and was not made here; name another work folder")
    began = time.perf_counter()
    model = build().cpu()
    seconds = time.perf_counter() - began
    # Staged beside and renamed last, so that a folder with a marker is complete.
    staged = folder.with_name(f"{folder.name}.partial")
    for stale in (staged, folder):
        shutil.rmtree(stale, ignore_errors=True)
    family.save(model, staged)
    record = {"fingerprint": fingerprint, "seconds": seconds, **made_of}
    (staged / MARKER).write_text(json.dumps(record, indent=2), encoding="utf-8")
    staged.rename(folder)
    return Made(folder, seconds, fingerprint)


def _train(
    family: Family,
    model: Any,
    parameters: list[torch.nn.Parameter],
    steps: Iterator[list[Batch]],
    setting: Pretraining | Finetuning,
    report: Report,
) -> None:
    """Adam with warm-up and a cosine, in place."""
    count = setting.steps
    optimizer = torch.optim.AdamW(
        parameters, lr=setting.learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / count))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    device = parameters[0].device.type
    model.train()
    for step, batches in enumerate(steps, 1):
        tokens = sum(batch.answer_ids.numel() for batch in batches)
        for batch in batches:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = family.answer_logits(model, batch)
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), batch.answer_ids.flatten(), reduction="sum"
            )
            (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % REPORT_EVERY == 0:
            report(f"  step {step}/{count}, loss {loss.item() / batch.answer_ids.numel():.3f}")
    model.eval()
