"""Statistics files: sums over a model's inputs, one entry per input group, in safetensors.

Per group ``i``: ``g<i>.total`` fp32 ``[cols]`` (sum of ``x``), ``g<i>.tokens`` int64 ``[1]``, and
``g<i>.gram`` fp32 ``[cols, cols]`` (sum of ``x xᵀ``) or, of kind ``diag``, ``g<i>.diag`` fp32
``[cols]`` alone. The metadata names the model, the data and the layers of each group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tailor_fast._core.errors import InputError
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.calibration.prepared import is_prepared
from tailor_fast.checkpoint import (
    Checkpoint,
    Layout,
    StagedFile,
    TensorSpec,
    open_checkpoint,
    plan_layout,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = "tailor-statistics/1"
Kind = Literal["full", "diag"]


@dataclass(frozen=True)
class StatisticsHeader:
    """What a statistics file says of itself.

    Attributes:
        kind: ``full`` (Grams) or ``diag`` (their diagonals).
        model_root: digest of the model's tensors (``checkpoint_root``).
        data_sha256: digest of the samples and their images.
        samples: how many samples were run.
        tokens: which tokens count, ``all`` or ``answer``.
        groups: the layers of each group, by module name; they share their inputs.
        weights: digests of the layers' weights, as in ``groups``.
        cols: length of each group's inputs.
    """

    kind: Kind
    model_root: str
    data_sha256: str
    samples: int
    tokens: str
    groups: tuple[tuple[str, ...], ...]
    weights: tuple[tuple[str, ...], ...]
    cols: tuple[int, ...]

    def metadata(self) -> dict[str, str]:
        """The file's metadata, strings only."""
        body = {
            "kind": self.kind,
            "model_root": self.model_root,
            "data_sha256": self.data_sha256,
            "samples": str(self.samples),
            "tokens": self.tokens,
        }
        names = {"groups": json.dumps(self.groups), "weights": json.dumps(self.weights)}
        return {"tailor_format": FORMAT, **body, **names}

    def layout(self) -> Layout:
        """The file, before a number is known."""
        specs = []
        for index, cols in enumerate(self.cols):
            square = self.kind == "full"
            name = "gram" if square else "diag"
            specs.append(TensorSpec(f"g{index}.{name}", "F32", (cols, cols) if square else (cols,)))
            if square:
                specs.append(TensorSpec(f"g{index}.total", "F32", (cols,)))
            specs.append(TensorSpec(f"g{index}.tokens", "I64", (1,)))
        return plan_layout(specs, max_shard_bytes=None, metadata=self.metadata())


def write_group(
    staged: StagedFile, index: int, sums: Mapping[str, torch.Tensor], tokens: int
) -> None:
    """Write one group: ``sums`` holds ``gram`` and ``total``, or ``diag``."""
    for name, tensor in sums.items():
        staged.write(f"g{index}.{name}", 0, tensor.cpu())
    staged.write(f"g{index}.tokens", 0, torch.tensor([tokens], dtype=torch.int64))


class Statistics:
    """An open statistics file.

    Attributes:
        header: what it says of itself.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.header = _parse(checkpoint)
        self._group_of = {
            name: index for index, group in enumerate(self.header.groups) for name in group
        }

    def check_model(self, root: str, role: str, weights: Mapping[str, str] | None = None) -> None:
        """Check that the statistics are of the model with this digest.

        Args:
            root: digest of the whole model.
            role: what the model is, for the message.
            weights: digests of layers' weights by module name, for a model in another layout than
                the one that was run: with equal weights it is the same model.

        Raises:
            InputError: they are of another model.
        """
        ours = {
            name: digest
            for group, digests in zip(self.header.groups, self.header.weights, strict=True)
            for name, digest in zip(group, digests, strict=True)
        }
        same = bool(weights) and ours.items() >= (weights or {}).items()
        if root != self.header.model_root and not same:
            raise InputError(
                f"{self._checkpoint.path}: these statistics are of another model (digest"
                f" {self.header.model_root}) than {role} ({root}); expected the same weights;"
                " calibrate again"
            )

    def __contains__(self, name: str) -> bool:
        """Whether the file has the layer called ``name``."""
        return name in self._group_of

    def grouped(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """``names`` by input group, in the order of the file; names that it lacks are left out."""
        wanted = set(names)
        groups = (tuple(n for n in group if n in wanted) for group in self.header.groups)
        return [group for group in groups if group]

    def moments(self, name: str, device: torch.device) -> Moments | DiagonalMoments | None:
        """Read the moments of the layer called ``name``; None when no token was counted.

        Raises:
            KeyError: the file has no such layer.
            InputError: the numbers are not finite, or the count is none.
        """
        index = self._group_of[name]
        tokens = int(self._checkpoint.read(f"g{index}.tokens"))
        if tokens < 0:
            raise InputError(f"{self._checkpoint.path}: g{index}.tokens is {tokens}; expected >= 0")
        if tokens == 0:
            return None
        if self.header.kind == "diag":
            return DiagonalMoments(self._mean(f"g{index}.diag", tokens, device), tokens)
        gram = self._mean(f"g{index}.gram", tokens, device)
        mean = self._mean(f"g{index}.total", tokens, device)
        diag = gram.diagonal().clone()
        return Moments(gram, mean, diag, None, None, None, tokens)

    def _mean(self, name: str, tokens: int, device: torch.device) -> torch.Tensor:
        total = self._checkpoint.read(name).to(device)
        if not bool(torch.isfinite(total).all()):
            raise InputError(
                f"{self._checkpoint.path}: {name} is not finite; expected sums over activations"
            )
        return total.div_(tokens)


@contextmanager
def open_statistics(path: Path) -> Iterator[Statistics]:
    """Open a statistics file.

    Raises:
        InputError: it is no statistics file, or malformed.
    """
    with open_checkpoint(path) as checkpoint:
        yield Statistics(checkpoint)


def is_statistics(path: Path) -> bool:
    """Whether ``path`` is a safetensors file of statistics, rather than samples of any form.

    Raises:
        InputError: it is a safetensors file that cannot be read.
    """
    return path.suffix == ".safetensors" and not is_prepared(path)


def _parse(checkpoint: Checkpoint) -> StatisticsHeader:
    metadata: Mapping[str, Any] = checkpoint.shards[0].metadata
    if metadata.get("tailor_format") != FORMAT:
        raise InputError(
            f"{checkpoint.path}: tailor_format is {metadata.get('tailor_format')!r}; expected"
            f" {FORMAT!r}, as `tailor-fast calibrate` writes"
        )
    try:
        groups, weights = (
            tuple(tuple(map(str, group)) for group in json.loads(metadata[name]))
            for name in ("groups", "weights")
        )
        kind = metadata["kind"]
        sums = "gram" if kind == "full" else "diag"
        cols = tuple(checkpoint.tensors[f"g{i}.{sums}"].shape[0] for i in range(len(groups)))
        header = StatisticsHeader(
            kind,
            metadata["model_root"],
            metadata["data_sha256"],
            int(metadata["samples"]),
            metadata["tokens"],
            groups,
            weights,
            cols,
        )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"{checkpoint.path}: the metadata is incomplete or malformed ({error}); expected what"
            " `tailor-fast calibrate` writes"
        ) from None
    planned = header.layout().tensors
    found = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    expected = {name: (place.dtype, place.shape) for name, place in planned.items()}
    if found != expected or list(map(len, groups)) != list(map(len, weights)):
        raise InputError(
            f"{checkpoint.path}: its tensors are not those that its metadata announces; expected"
            " what `tailor-fast calibrate` writes"
        )
    return header
