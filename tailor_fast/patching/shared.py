"""A run that several processes do together: what those do without that do not write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from tailor_fast._core.processes import Processes
from tailor_fast.patching.report import LinearReport
from tailor_fast.patching.resuming import Ledger
from tailor_fast.patching.sources import Sources


class Discard:
    """Stands for the writer in a process that does not write."""

    def put(
        self, name: str, tensor: torch.Tensor, arrived: Callable[[], object] | None = None
    ) -> None:
        """Do nothing: process 0 has the same tensor."""

    def drain(self) -> None:
        """Do nothing."""


class SharedLedger:
    """What an earlier run finished, known to all processes; its words come from process 0.

    Args:
        ledger: process 0's; None in the others.
        sources: the open pair.
        processes: all of which make this object together.

    Attributes:
        rows: the lines of the report, by tensor.
    """

    def __init__(self, ledger: Ledger | None, sources: Sources, processes: Processes) -> None:
        self._ledger = ledger
        self._sources = sources
        self._processes = processes
        known: dict[str, Any] = {}
        if ledger is not None:
            known = {
                n: asdict(r) for n in sorted(ledger.earlier) if (r := ledger.patched_earlier(n))
            }
        self.rows: dict[str, LinearReport] = {} if ledger is None else ledger.rows
        self._earlier = {}
        for name, row in processes.gather_json(known)[0].items():
            self._earlier[name] = LinearReport(**{**row, "group": tuple(row["group"])})

    def patched_earlier(self, name: str) -> LinearReport | None:
        """The report of a layer that the earlier run patched; None of any other."""
        return self._earlier.get(name)

    def read(self, name: str) -> torch.Tensor:
        """The words of a tensor that the earlier run wrote; all processes ask for it together."""
        if self._ledger is None:
            tensor = self._sources.tuned.checkpoint.empty(name)
        else:
            tensor = self._ledger.read(name)
        with self._processes.exchange():
            self._processes.gather()
            self._processes.broadcast(tensor)
        return tensor
