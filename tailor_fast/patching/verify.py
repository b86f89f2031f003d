"""Proof, from the files alone, that an output is what it claims to be.

Every byte of the output is read once, beside the same byte of the base: what was not patched equals
base bit for bit, a patched tensor differs in at most its k words, no changed word is NaN or
infinite, and files, headers, index and digests are those of the manifest. Where transformers has
the model's class, it reads the configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.checkpoint import (
    Checkpoint,
    CheckpointError,
    Hashed,
    TensorInfo,
    join_pair,
    open_checkpoint,
)
from tailor_fast.models.skeleton import check_config
from tailor_fast.ops.select import kept_count
from tailor_fast.patching.outputs import Output, read_output
from tailor_fast.patching.recipe import Recipe

BLOCK_BYTES = 8 << 20
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PatchedTensor:
    """One patched tensor as counted: words in all, words allowed to differ, words that do."""

    name: str
    size: int
    allowed: int
    changed: int


@dataclass
class VerifyResult:
    """What was found.

    Attributes:
        violations: one sentence each; empty when everything holds.
        checked: counts of what was looked at: ``files``, ``tensors``, ``untouched``, ``weights``,
            ``allowed`` and ``changed`` words of the patched tensors, ``bytes`` read.
        patched: the patched tensors, in the report's order.
    """

    violations: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    patched: list[PatchedTensor] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was violated."""
        return not self.violations

    def count(self, what: str, amount: int = 1) -> None:
        """Add to a count."""
        self.checked[what] = self.checked.get(what, 0) + amount


def verify_output(
    out: Path,
    *,
    base: Path | None = None,
    deep: bool = True,
    progress: Progress | None = None,
) -> VerifyResult:
    """Check an output directory against its manifest, its report and its base.

    Args:
        out: directory that ``patch_checkpoint`` made.
        base: the base checkpoint; None takes the place that the report names.
        deep: read the weights; False looks at files and headers only, and needs no base.
        progress: told about each tensor.

    Returns:
        What was checked, and every violation.

    Raises:
        InputError: ``out`` has no manifest or report, or ``base`` is not the one that it was made
            from.
        UsageError: the base is not where it was, and none is given.
        StorageError: reading failed.
    """
    output = read_output(out)
    result = VerifyResult()
    _check_files(output, result)
    _check_budget(output, result)
    _check_config(output, result)
    with ExitStack() as stack:
        try:
            ours = stack.enter_context(open_checkpoint(out))
        except CheckpointError as error:
            result.violations.append(str(error))
            return result
        if _check_headers(ours, output, result) and deep:
            theirs = stack.enter_context(open_checkpoint(_base_path(output, base)))
            try:
                joined = join_pair(theirs, ours, untouched="base", missing="tuned")
            except CheckpointError as error:
                result.violations.append(str(error))
                return result
            if joined.only and output.report["recipe"].get("missing") is None:
                found = ", ".join(sorted(joined.only))
                result.violations.append(f"{out}: has tensors that its base lacks: {found}")
            new = joined.resized | joined.only
            _Comparison(output, theirs, ours, new, result).run(progress or Silent())
    return result


def _base_path(output: Output, given: Path | None) -> Path:
    if given is not None:
        return given
    recorded = output.input_path("base")
    if recorded is None or not recorded.exists():
        where = "it does not say" if recorded is None else f"no longer at {recorded}"
        raise UsageError(f"{output.path}: where is its base? {where}; give --base")
    return recorded


def _check_config(output: Output, result: VerifyResult) -> None:
    path = output.path / "config.json"
    told = any(violation.startswith(str(path)) for violation in result.violations)
    if path.exists() and not told:
        try:
            check_config(output.path)
        except InputError as error:
            result.violations.append(str(error))


def _check_files(output: Output, result: VerifyResult) -> None:
    for name, record in output.manifest["output"]["files"].items():
        path = output.path / name
        result.count("files")
        try:
            size = path.stat().st_size
        except OSError as error:
            result.violations.append(f"{path}: {error.strerror}; the manifest lists it")
            continue
        if size != record["bytes"]:
            result.violations.append(
                f"{path}: has {size} bytes; the manifest says {record['bytes']}"
            )
        elif "sha256" in record and _sha256(path) != record["sha256"]:
            result.violations.append(f"{path}: its SHA-256 is not the manifest's")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_budget(output: Output, result: VerifyResult) -> None:
    """The report's own k must keep to the recipe's density.

    Not asked of the authors' code, which has its own count, nor of a union of patches.
    """
    recipe, rows = output.report["recipe"], output.patched.values()
    if recipe["decorate"] == "official" or recipe.get("surrogates"):
        return
    tasks = len(recipe["weights"]) if recipe.get("support") == "union" else 1
    own = Recipe(density=recipe["density"], densities=recipe.get("densities"))
    allowances: dict[float, list[int]] = {}  # density -> weights and kept ones of its layers
    for row in rows:
        sums = allowances.setdefault(own.of(row["name"]).density, [0, 0])
        sums[0] += row["rows"] * row["cols"]
        sums[1] += row["kept"]
    for density, (weights, kept) in allowances.items():
        allowed = tasks * kept_count(weights, density)
        if kept > allowed:
            result.violations.append(
                f"{output.path}: the report keeps {kept} of {weights} weights; density {density}"
                f" allows {allowed}"
            )


def _check_headers(ours: Checkpoint, output: Output, result: VerifyResult) -> bool:
    """Return whether the tensors are those of the manifest, so that they can be compared."""
    result.violations += ours.warnings  # a size in the index that the tensors do not have
    records = output.manifest["output"]["files"]
    for shard in ours.shards:
        recorded = records.get(shard.file_name, {}).get("header_sha256")
        if recorded != shard.header_sha256:
            result.violations.append(f"{shard.path}: its header is not the manifest's")
    expected = output.manifest["output"]["tensors"].keys() | output.patched.keys()
    differ = sorted(expected ^ ours.tensors.keys())
    for name in differ:
        what = "is missing from the files" if name in expected else "is not in the manifest"
        result.violations.append(f"{output.path}: tensor {name!r} {what}")
    return not differ


class _Comparison:
    """Output and base side by side, block by block."""

    def __init__(
        self,
        output: Output,
        base: Checkpoint,
        ours: Checkpoint,
        new: Collection[str],
        result: VerifyResult,
    ) -> None:
        self._new = new  # of which the base has nothing, or the first rows
        self._output = output
        self._base = Hashed(base)
        self._ours = Hashed(ours)
        self._result = result
        self._from_tuned = output.report["recipe"]["untouched"] == "tuned"
        self._buffers = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)

    def run(self, progress: Progress) -> None:
        tensors = self._ours.checkpoint.tensors
        patched = self._output.patched
        counted: dict[str, PatchedTensor] = {}
        done_bytes = 0
        progress.start(len(tensors))
        for done, (name, info) in enumerate(tensors.items()):
            self._result.count("tensors")
            self._result.count("bytes", info.nbytes + self._in_base(name))
            if name in self._new and name not in patched:
                self._result.count("untouched")
                self._grown(info)
            elif name in patched:
                counted[name] = self._patched(info, patched[name])
            else:
                self._result.count("untouched")
                self._untouched(info)
            done_bytes += info.nbytes
            progress.group(name, done + 1, len(tensors), done_bytes)
        self._result.patched = [counted[name] for name in patched]
        for tensor in self._result.patched:
            self._result.count("weights", tensor.size)
            self._result.count("allowed", tensor.allowed)
            self._result.count("changed", tensor.changed)
        progress.finish()

    def _patched(self, info: TensorInfo, row: Mapping[str, Any]) -> PatchedTensor:
        word = _WORDS[info.nbytes // info.numel] if info.numel else torch.int8
        changed = bad = 0
        for ours, theirs in self._blocks(info):
            differs = ours.view(word) != theirs.view(word)
            changed += int(torch.count_nonzero(differs))
            if info.torch_dtype is not None and info.torch_dtype.is_floating_point:
                bad += _not_finite(ours.view(info.torch_dtype), differs)
        if changed > row["kept"]:
            self._violated(
                info, f"{changed} of {info.numel} words differ from base; k is {row['kept']}"
            )
        if bad:
            self._violated(info, f"{bad} changed words are NaN or infinite")
        return PatchedTensor(info.name, info.numel, row["kept"], changed)

    def _untouched(self, info: TensorInfo) -> None:
        differ = 0
        for ours, theirs in self._blocks(info):
            if not torch.equal(ours, theirs):
                differ += int(torch.count_nonzero(ours != theirs))
        if self._from_tuned and info.name in self._output.manifest["inputs"]["tuned"]["tensors"]:
            self._check_tuned(info)
        elif differ:
            self._violated(info, f"was not patched, but {differ} bytes differ from base")

    def _in_base(self, name: str) -> int:
        """How many bytes of a tensor the base has."""
        found = self._base.checkpoint.tensors.get(name)
        return 0 if found is None else found.nbytes

    def _grown(self, info: TensorInfo) -> None:
        """A tensor that the base does not have, or not all of: as base where that is asked for."""
        end = 0 if self._from_tuned else self._in_base(info.name)
        differ = 0
        for begin, view in self._ours.blocks(info.name, self._buffers[0]):
            count = max(0, min(len(view), end - begin))
            if count:
                self._base.read_into(info.name, self._buffers[1], begin, begin + count)
                differ += view[:count] != memoryview(self._buffers[1])[:count]
        if differ:
            self._violated(info, "was not patched, but rows that base has differ from base")
        if not end:
            self._check_tuned(info)
        self._check_digest(info)

    def _check_tuned(self, info: TensorInfo) -> None:
        expected = self._output.manifest["inputs"]["tuned"]["tensors"].get(info.name)
        if self._output.manifest["output"]["tensors"][info.name] != expected:
            self._violated(info, "was not patched, but is not the tuned checkpoint's")

    def _check_digest(self, info: TensorInfo) -> None:
        if self._ours.digests[info.name] != self._output.manifest["output"]["tensors"][info.name]:
            self._violated(info, "its digest is not the manifest's")

    def _blocks(self, info: TensorInfo) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Blocks of both as bytes; at the end their digests are compared with the manifest's."""
        ours = self._ours.blocks(info.name, self._buffers[0])
        theirs = self._base.blocks(info.name, self._buffers[1])
        for (_, left), (_, right) in zip(ours, theirs, strict=True):
            yield (
                torch.frombuffer(left, dtype=torch.uint8),
                torch.frombuffer(right, dtype=torch.uint8),
            )
        self._check_digest(info)
        manifest = self._output.manifest
        digest = self._base.digests[info.name]
        if digest != manifest["inputs"]["base"]["tensors"].get(info.name, digest):
            raise InputError(
                f"{self._base.checkpoint.path}: tensor {info.name!r} is not that of the base that"
                " the output was made from; give the right --base"
            )

    def _violated(self, info: TensorInfo, problem: str) -> None:
        path = self._output.path / info.shard
        self._result.violations.append(f"{path}: tensor {info.name!r}: {problem}")


def _not_finite(values: torch.Tensor, counted: torch.Tensor) -> int:
    """How many of the ``counted`` values are NaN or infinite."""
    ends = torch.stack(torch.aminmax(values))  # NaN if any value is; 35 times as fast as isfinite
    if bool(torch.isfinite(ends).all()):
        return 0
    return int(torch.count_nonzero(~torch.isfinite(values[counted])))
