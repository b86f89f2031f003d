"""Several fine-tunes of one base on disk, and what a model answers at its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tailor_fast.calibration import RunOptions, calibrate
from tailor_fast.calibration.statfile import open_statistics
from tests.models.processors import text_tokenizer
from tests.patching.disk import llama, write_texts

OPTIONS = RunOptions(batch_size=4, max_shard_bytes=40_000)


def tuned_by(model: Any, seed: int, scale: float = 0.2) -> Any:
    """A copy whose every parameter has moved, in a direction of its own for each seed."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            step = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * step * parameter.float().std()).to(parameter.dtype))
    return tuned


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="20KB")
    text_tokenizer().save_pretrained(path)
    return path


def family(folder: Path, names: str = "ab", **options: Any) -> tuple[Path, dict[str, Path]]:
    """A LLaMA, and a fine-tune of it with samples ``<name>.jsonl`` for each letter."""
    base = llama(**options)
    tuned = {}
    for index, name in enumerate(names):
        tuned[name] = save(tuned_by(base, 10 + index), folder / f"tuned-{name}")
        write_texts(folder / f"{name}.jsonl", seed=20 + index)
    return save(base, folder / "base"), tuned


def take_statistics(model: Path, data: Path) -> Path:
    """``data`` without its ending names the file."""
    out = data.with_suffix(".safetensors")
    calibrate(model, data, out, options=OPTIONS)
    return out


def words(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor on disk, by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
    return tensors


def layer_errors(
    model: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], statistics: Path
) -> torch.Tensor:
    """Error of each layer on the inputs of the statistics, over their mean square, fp64."""
    errors = []
    with open_statistics(statistics) as sums:
        for group in sums.header.groups:
            gram = sums.moments(group[0], torch.device("cpu")).gram.double()
            for name in group:
                off = (tuned[f"{name}.weight"] - model[f"{name}.weight"]).double()
                errors.append(((off @ gram) * off).sum() / gram.diagonal().mean())
    return torch.stack(errors)
