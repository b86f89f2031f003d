"""What a job needs of a checkpoint, be it files on disk or a view that makes its words of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from tailor_fast.checkpoint.reader import ShardInfo, TensorInfo


class TensorSource(Protocol):
    """Named tensors that can be read by ranges of bytes, from several threads.

    ``Checkpoint`` is one; ``AdapterView`` is a base model as an adapter changes it.
    """

    @property
    def path(self) -> Path:
        """As given."""

    @property
    def directory(self) -> Path | None:
        """Where ``config.json`` and the processor are; None where there is no such place."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name, in the order in which they are read best."""

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The weight files that are this input's own, for its record."""

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Configuration, tokenizer, processor and the like, sorted by name."""

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """Every place that is read: an output must not touch one of them."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Legal but suspicious facts, a sentence each."""

    @property
    def settings(self) -> tuple[Path, ...]:
        """Files that decide the words beside the weights."""

    @property
    def processor_directory(self) -> Path | None:
        """Where tokenizer and processor are; None where there is no such place."""

    @property
    def inherited(self) -> frozenset[str]:
        """Tensors that are, word for word, those of the base model that this is a view of."""

    @property
    def reading_bytes(self) -> int:
        """Memory that a reading thread takes beside its buffer."""

    def path_of(self, name: str) -> Path:
        """The file that decides what tensor ``name`` is."""

    def empty(self, name: str) -> torch.Tensor:
        """Memory for tensor ``name``, not yet filled; see ``Checkpoint.empty``."""

    def read(self, name: str) -> torch.Tensor:
        """Tensor ``name`` in memory of its own."""

    def read_into(self, name: str, buffer: object, begin: int = 0, end: int | None = None) -> int:
        """Read bytes ``[begin, end)`` of tensor ``name``; see ``Checkpoint.read_into``."""

    def check_unchanged(self) -> None:
        """Raise ``ChangedError`` when a file was changed since it was opened."""

    def __enter__(self) -> Self:
        """Return self."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what this source has opened."""
