"""An output as a run leaves it, made by hand, so that every byte of it is known."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tailor_fast.checkpoint import (
    MANIFEST_NAME,
    REPORT_NAME,
    StagedCheckpoint,
    TensorHasher,
    build_manifest,
    input_record,
    open_checkpoint,
    plan_layout,
)
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import LinearReport, Report

Tensors = dict[str, torch.Tensor]
PATCHED = ("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight")
ROWS, COLS = 32, 64
DENSITY = 0.25
KEPT = ROWS * COLS // 4
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def base_tensors() -> Tensors:
    """Two matrices that are patched, and what is not, odd words among it."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(ROWS, COLS, generator=generator).bfloat16()
        for name in (*PATCHED, "model.embed.weight")
    }
    tensors[PATCHED[1]].view(-1)[-1] = 0.0
    tensors["model.norm.weight"] = torch.tensor([-0.0, float("nan"), 1.0, float("inf")])
    tensors["steps"] = torch.tensor(7, dtype=torch.int64)
    return tensors


def tuned_tensors() -> Tensors:
    """Base with every float moved."""
    return {
        name: tensor + 0.5 if tensor.is_floating_point() else tensor
        for name, tensor in base_tensors().items()
    }


def patched_tensors(recipe: Recipe) -> Tensors:
    """Base with the first ``KEPT`` words of each patched matrix taken from tuned."""
    tuned = tuned_tensors()
    tensors = base_tensors() if recipe.untouched == "base" else tuned_tensors()
    for name in PATCHED:
        tensors[name] = base_tensors()[name]
        tensors[name].view(-1)[:KEPT] = tuned[name].view(-1)[:KEPT]
    return tensors


def save(folder: Path, tensors: Tensors) -> Path:
    """Write a base or tuned checkpoint of one file."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def digests(tensors: Mapping[str, torch.Tensor], names: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, info in names.items():
        hasher = TensorHasher(info.dtype, info.shape)
        hasher.update(tensors[name])
        found[name] = hasher.hexdigest()
    return found


def make_output(
    folder: Path,
    *,
    recipe: Recipe | None = None,
    plant: Callable[[Tensors], None] | None = None,
    report_kept: int = KEPT,
) -> Path:
    """Write ``folder/base``, ``folder/tuned`` and ``folder/out``; returns the last.

    Args:
        recipe: what the report says; None is the defaults at ``DENSITY``.
        plant: changes the output's tensors before they are written, as a faulty program would.
        report_kept: k of each patched tensor in the report.
    """
    recipe = recipe or Recipe(density=DENSITY)
    base = save(folder / "base", base_tensors())
    tuned = save(folder / "tuned", tuned_tensors())
    tensors = patched_tensors(recipe)
    if plant is not None:
        plant(tensors)
    report = Report(recipe.model_dump())
    for name in PATCHED:
        module = name.removesuffix(".weight")
        report.linears.append(LinearReport(module, ROWS, COLS, report_kept, tensor=name))
    body = {**report.to_dict(), "inputs": {"base": str(base), "tuned": str(tuned)}}
    with open_checkpoint(base) as ours, open_checkpoint(tuned) as theirs:
        layout = plan_layout(ours.tensors.values(), max_shard_bytes=5000)
        with StagedCheckpoint(folder / "out", layout) as staged:
            for name, tensor in tensors.items():
                staged.write(name, 0, tensor)
            staged.copy_file(base / "config.json")
            staged.add_file(REPORT_NAME, json.dumps(body))
            inputs = {
                "base": input_record(ours, digests(base_tensors(), ours.tensors)),
                "tuned": input_record(theirs, digests(tuned_tensors(), theirs.tensors)),
            }
            manifest = build_manifest(
                inputs=inputs,
                output=staged.record(),
                recipe=recipe.model_dump(),
                versions={"tailor_fast": "0"},
            )
            staged.add_file(MANIFEST_NAME, manifest)
            staged.commit()
    return folder / "out"
