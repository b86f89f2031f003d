"""What a checkpoint or an output consists of, from headers and records alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor_fast._core.errors import InputError
from tailor_fast.checkpoint import (
    Checkpoint,
    TensorInfo,
    adapter_files,
    is_adapter,
    local_path,
    open_checkpoint,
    read_adapter_config,
    shown_size,
)
from tailor_fast.models.skeleton import named_classes
from tailor_fast.patching.outputs import Output, is_output, read_output
from tailor_fast.patching.recipe import Recipe


@dataclass(frozen=True)
class DtypeUse:
    """All tensors of one dtype."""

    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class ShardUse:
    """One weight file; size with its header."""

    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        facts: names and values in a few words: what it is and, of an output, what was patched.
        dtypes: the largest first.
        shards: in the files' order.
        tensors: in the files' order.
        warnings: legal but suspicious facts, a sentence each.
    """

    facts: dict[str, Any]
    dtypes: tuple[DtypeUse, ...]
    shards: tuple[ShardUse, ...]
    tensors: tuple[TensorInfo, ...]
    warnings: tuple[str, ...]


def inspect_path(path: Path) -> Inspection:
    """Look at a checkpoint file, a checkpoint directory, an adapter's directory or an output.

    Raises:
        InputError: it cannot be read, or breaks a rule of its format.
    """
    path = local_path(path)
    if is_adapter(path):
        return _inspect_adapter(path)
    with open_checkpoint(path) as checkpoint:
        tensors = tuple(checkpoint.tensors.values())
        found = {
            "path": path,
            "model": _architecture(checkpoint),
            "size": f"{shown_size(checkpoint.total_bytes)} in {len(tensors)} tensors",
            "beside": ", ".join(file.name for file in checkpoint.side_files) or None,
        }
        if is_output(path):
            found |= _patch_facts(read_output(path))
        return _inspection(found, (checkpoint,))


def _inspect_adapter(path: Path) -> Inspection:
    config = read_adapter_config(path)
    kind = "DoRA" if config.dora else "LoRA"
    scale = "alpha / sqrt(rank)" if config.rslora else "alpha / rank"
    patterns = len(config.ranks) + len(config.alphas)
    with ExitStack() as stack:
        files = [stack.enter_context(open_checkpoint(file)) for file in adapter_files(path)]
        found = {
            "path": path,
            "adapter": f"{kind} of rank {config.rank}, alpha {config.alpha:g}, scale {scale}",
            "patterns": f"{patterns} other ranks and alphas" if patterns else None,
            "trained on": config.base_model,
            "size": f"{shown_size(sum(file.total_bytes for file in files))} in"
            f" {sum(len(file.tensors) for file in files)} tensors",
        }
        return _inspection(found, files)


def _inspection(found: dict[str, Any], files: Sequence[Checkpoint]) -> Inspection:
    tensors = tuple(info for file in files for info in file.tensors.values())
    return Inspection(
        found,
        _by_dtype(tensors),
        tuple(
            ShardUse(
                shard.file_name,
                sum(info.shard == shard.file_name for info in tensors),
                shard.snapshot.size,
            )
            for file in files
            for shard in file.shards
        ),
        tensors,
        tuple(warning for file in files for warning in file.warnings),
    )


def _by_dtype(tensors: tuple[TensorInfo, ...]) -> tuple[DtypeUse, ...]:
    uses = []
    for dtype in dict.fromkeys(info.dtype for info in tensors):
        same = [info for info in tensors if info.dtype == dtype]
        elements, nbytes = sum(t.numel for t in same), sum(t.nbytes for t in same)
        uses.append(DtypeUse(dtype, len(same), elements, nbytes))
    return tuple(sorted(uses, key=lambda use: -use.nbytes))


def _architecture(checkpoint: Checkpoint) -> str | None:
    if checkpoint.directory is None:
        return None
    try:
        return ", ".join(named_classes(checkpoint.directory)) or None
    except InputError:
        return None  # what is wrong with it matters to who builds the model


def _patch_facts(output: Output) -> dict[str, Any]:
    """What was patched, and by which choices where they are not the defaults."""
    report, rows = output.report, output.patched.values()
    weights = sum(row["rows"] * row["cols"] for row in rows)
    kept = sum(row["kept"] for row in rows)
    defaults = Recipe().model_dump()
    chosen = {k: v for k, v in report["recipe"].items() if defaults.get(k, v) != v}
    return {
        "made by": f"tailor_fast {output.manifest['versions'].get('tailor_fast', '?')}",
        "base": output.input_path("base"),
        "tuned": output.input_path("tuned"),
        "tasks": _tasks(output),
        "kept": f"{100 * report['density']:.2f}%, {kept:,} of {weights:,} weights in {len(rows)}"
        " tensors",
        "recipe": ", ".join(f"{key} {value}" for key, value in chosen.items()) or "defaults",
        "notes": "\n".join(report.get("notes", ())) or None,
    }


def _tasks(output: Output) -> str | None:
    """The tasks that were stitched; None for a patch."""
    tasks = output.report.get("tasks", {})
    lines = (f"{t}, weight {of['weight']:g}: {output.input_path(t)}" for t, of in tasks.items())
    return "\n".join(lines) or None
