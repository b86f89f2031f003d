"""One part under way: its device, its table, its time, and what happens when a case fails."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.floors import Ceilings, Cost
from benchmarks.gpu.plan import MODEL_7B, MODEL_DRY, TOKENS, TOKENS_DRY, Bar, Model
from benchmarks.gpu.table import Row, Table
from tailor_fast._core.backend import Backend

Case = Callable[[], Iterable[Row]]


class DeviceLostError(RuntimeError):
    """The device's context has ended: every further call fails."""


@dataclass
class Run:
    """What every part is given.

    Attributes:
        table: where rows go.
        device: where the ops run.
        backend: whose kernels are held and measured.
        dry: tiny sizes, no figure that means anything.
        seed: of the inputs, drawn anew for each run.
        deadline: ``time.monotonic()`` after which no case is begun.
        clock: times calls.
        ceilings: of this card, once they are measured.
    """

    table: Table
    device: torch.device
    backend: Backend
    dry: bool
    seed: int
    deadline: float
    clock: Clock
    ceilings: Ceilings | None = None

    @property
    def model(self) -> Model:
        """Shapes to measure at."""
        return MODEL_DRY if self.dry else MODEL_7B

    @property
    def tokens(self) -> int:
        """Tokens of a Gram."""
        return TOKENS_DRY if self.dry else TOKENS

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers on the device that depend on the run's seed and on ``key``."""
        generator = torch.Generator(self.device)
        seed = self.seed
        for part in key:
            seed = (seed * 1_000_003 + part) % 2**63
        return generator.manual_seed(seed)

    def normal(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        """Standard normal numbers, float32, on the device."""
        return torch.randn(shape, generator=generator, device=self.device)

    def attempt(self, row: Row, case: Case) -> None:
        """Add a case's rows as it gives them; where it fails, ``row`` with the reason.

        Raises:
            DeviceLostError: no later case can run.
        """
        if self.left <= 0:
            self.table.add(replace(row, error="not run: the part's time was used up"))
            return
        try:
            for found in case():
                self.table.add(found)
        except Exception as error:  # noqa: BLE001  any failure is a result; the others go on
            reason = " ".join(str(error).split())[:300]
            self.table.add(replace(row, error=f"{type(error).__name__}: {reason}"))
        if self.device.type == "cuda":
            self._settle()

    def _settle(self) -> None:
        """Free what the case held; a fault in a kernel ends the context, and shows here."""
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            self.table.add(Row("device", error=f"lost, nothing more can run: {reason}"))
            raise DeviceLostError(reason) from error

    def figure(
        self,
        row: Row,
        seconds: float,
        cost: Cost | None = None,
        *,
        ratio: float = float("nan"),
        bars: Sequence[Bar] = (),
    ) -> Row:
        """Complete a row from a measured time.

        Args:
            row: names of the figure.
            seconds: median.
            cost: for the floor; None where none was derived.
            ratio: to the baseline.
            bars: what is asked for, held against share, ratio, seconds or peak bytes.
        """
        if cost is not None:
            row = replace(row, bytes=cost.bytes, flops=cost.flops)
            if self.ceilings is not None:
                floor = self.ceilings.floor(cost)
                row = replace(row, floor_seconds=floor, share=floor / seconds)
        row = replace(row, seconds=seconds, ratio=ratio)
        if not bars:
            return row
        measured = {
            "share": row.share,
            "ratio": row.ratio,
            "seconds": row.seconds,
            "bytes": float(row.peak_bytes),
        }
        met = all(bar.met(measured[bar.kind]) for bar in bars)
        return replace(row, bar=", ".join(map(str, bars)), met="yes" if met else "no")
