"""How a run is carried out, apart from what it computes."""

from __future__ import annotations

from dataclasses import dataclass

from tailor_fast._core.errors import UsageError
from tailor_fast.checkpoint import ResumeMode
from tailor_fast.models.inputs import Tokens
from tailor_fast.models.samples import Part


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it but samples, lengths and tokens changes the result.

    Attributes:
        device: where models run and layers are solved, ``cpu`` or ``cuda:N``.
        max_ram: bytes that weights, statistics and activations may take together, beyond the
            program itself and its fixed work buffers (some 100 MiB); None sets no limit.
        max_vram: bytes that all of it may take on ``device``; None takes what is free there. On a
            CPU it rehearses: the same work is laid out as if the device had so much. Patches of
            checkpoints and ``calibrate`` take it.
        max_shard_bytes: size of an output file.
        overwrite: replace an existing output, once the new one is complete.
        resume: go on from what an earlier run of the same job finished, where there is one
            (``auto``), or refuse to start over (``required``), or start over and, when stopped,
            leave nothing (``never``).
        batch_size: samples in one forward pass.
        samples: at most so many samples of each data file, evenly spaced; None takes all.
        max_length: longest sample in tokens.
        tokens: which tokens of a sample count: ``all`` but padding, those of its ``answer``, or
            padding too, as in the authors' script (``official``); ``asked`` is ``answer`` where
            samples have one and ``all`` where not.
        part: which samples of each data file: ``all``, or, of a file cut in two, those that are
            ``fitted`` on or those that are ``held`` back to measure on, as ``target_old`` does.
    """

    device: str = "cpu"
    max_ram: int | None = None
    max_vram: int | None = None
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    resume: ResumeMode = "auto"
    batch_size: int = 8
    samples: int | None = 128
    max_length: int = 2048
    tokens: Tokens = "all"
    part: Part = "all"

    def refuse_max_vram(self, job: str) -> None:
        """Refuse a bound that nothing would keep.

        Raises:
            UsageError: ``max_vram`` is given.
        """
        if self.max_vram is not None:
            raise UsageError(
                f"{job} does not bound the memory of the device; expected max_vram None, got"
                f" {self.max_vram}; choose a smaller batch_size"
            )
