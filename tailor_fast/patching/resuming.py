"""Going on from an earlier run: what must be equal for that, and what is known of each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tailor_fast.calibration.data import hash_data
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.statfile import is_statistics
from tailor_fast.checkpoint import (
    Layout,
    Resume,
    StagedCheckpoint,
    TensorSource,
    open_checkpoint,
)
from tailor_fast.checkpoint.files import input_error, open_input
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.records import versions
from tailor_fast.patching.report import LinearReport
from tailor_fast.patching.sources import Sources

# on the bytes of the output, or, the samples, in another part of the fingerprint
_WITHOUT_EFFECT = ("device", "max_ram", "max_shard_bytes", "overwrite", "resume", "samples")


def resume_of(
    options: RunOptions,
    recipe: Recipe,
    sources: Sources,
    layout: Layout,
    data: dict[str, Path | None],
    *,
    processes: int = 1,
) -> Resume:
    """Whether, and from what, a run may go on.

    Args:
        options: how the run is carried out.
        recipe: as it is run.
        sources: the open pair.
        layout: of the output.
        data: calibration and the like, by role; samples or statistics.
        processes: how many do the run together; sums are ordered by it.

    Raises:
        InputError: samples cannot be read.
    """
    if options.resume == "never":
        return Resume("never", {})
    files = {role: _data(path, options) for role, path in data.items() if path is not None}
    whole = hashlib.sha256(layout.index or b"")
    for shard in layout.shards:
        whole.update(shard.header)
    fingerprint = {
        "inputs": {
            "base": _checkpoint(sources.base.checkpoint),
            "tuned": _checkpoint(sources.tuned.checkpoint),
            **files,
        },
        "recipe": recipe.model_dump(),
        "output_files": whole.hexdigest(),
        "options": {
            name: value for name, value in asdict(options).items() if name not in _WITHOUT_EFFECT
        },
        "machine": _machine(options.device),
        "processes": processes,
        "versions": versions(),
    }
    return Resume(options.resume, fingerprint)


def _checkpoint(checkpoint: TensorSource) -> dict[str, Any]:
    """Files by name: what changes when a byte of them does, without reading the weights."""
    weights = {}
    for shard in checkpoint.shards:
        state = shard.snapshot
        try:
            changed = shard.path.stat().st_ctime_ns  # set by the system alone
        except OSError as error:  # taken away since it was opened
            raise input_error(error, shard.path) from error
        weights[shard.file_name] = [shard.header_sha256, state.size, state.mtime_ns, changed]
    beside = (*checkpoint.side_files, *checkpoint.settings)
    return weights | {path.name: _sha256(path) for path in beside}


def _data(path: Path, options: RunOptions) -> object:
    if is_statistics(path):
        with open_checkpoint(path) as statistics:
            return _checkpoint(statistics)
    return hash_data(path, options.samples, options.part)


def _sha256(path: Path) -> str:
    with open(open_input(path), "rb") as file:  # noqa: PTH123  a descriptor, not a path
        return hashlib.file_digest(file, "sha256").hexdigest()


def _machine(device: str) -> dict[str, object]:
    """What the order of sums depends on: another one gives other last bits."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


class Ledger:
    """What is known of each finished tensor, from this run and from an earlier one.

    Args:
        sources: the open pair; digests that the earlier run took are not taken again.
        staged: the output.

    Attributes:
        rows: the lines of the report, by tensor.
        earlier: tensors that the earlier run finished.
    """

    def __init__(self, sources: Sources, staged: StagedCheckpoint) -> None:
        self._inputs = {"base": sources.base, "tuned": sources.tuned}
        self._staged = staged
        self.rows: dict[str, LinearReport] = {}
        self.earlier = frozenset(staged.finished)
        for name, facts in staged.finished.items():
            for role, source in self._inputs.items():
                if facts[role] is not None:
                    source.digests[name] = facts[role]
            if facts["row"] is not None:
                row = LinearReport(**facts["row"])
                row.group = tuple(row.group)
                self.rows[name] = row

    def facts(self, name: str) -> dict[str, Any]:
        """What the journal keeps of a finished tensor."""
        row = self.rows.get(name)
        digests = {role: source.digests.get(name) for role, source in self._inputs.items()}
        return {**digests, "row": None if row is None else asdict(row)}

    def patched_earlier(self, name: str) -> LinearReport | None:
        """The report of a layer that the earlier run patched; None of any other."""
        return self.rows.get(name) if name in self.earlier else None

    def read(self, name: str) -> torch.Tensor:
        """The words of a tensor that the earlier run wrote."""
        tensor = self._inputs["tuned"].checkpoint.empty(name)
        self._staged.read_into(name, tensor)
        return tensor


Facts = Callable[[str], dict[str, Any]]
