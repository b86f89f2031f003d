"""Calibration beside plain forward passes: ``python -m benchmarks.cpu_calibration``.

Both streams of an asymmetric run, the tuned and the patched model on the same 8192 tokens, are
walked group by group, as a patch does it, and their moments taken. The time of the moments is told
apart; the rest, finding the groups included, is held against one plain forward pass of each
batch through each model, by the same calls.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.pairs import SHAPES
from benchmarks.results import CPU, Figure, interleaved, write
from tailor_fast.calibration.collect import Collector, Streams
from tailor_fast.calibration.groups import Groups, discover
from tailor_fast.calibration.lockstep import Lockstep, Stream, run_all
from tailor_fast.calibration.moments import Moments, MomentSums
from tailor_fast.models import caller, find_targets

SAMPLES, LENGTH, BATCH = 64, 128, 4
FLOOR = 1 / 1.15
# Both sum in float32, in another order.
APART = 1e-4


def make_streams(samples: int, shape: str) -> Streams:
    """Two models of one shape with other weights, on the same random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig.from_dict(SHAPES[shape].config())
    tuned, patched = (LlamaForCausalLM(config).bfloat16() for _ in range(2))
    with torch.no_grad():
        for ours, theirs in zip(patched.parameters(), tuned.parameters(), strict=True):
            ours.copy_(theirs + 0.1 * ours)
    words = torch.randint(0, config.vocab_size, (samples, LENGTH))
    batches = [{"input_ids": part} for part in words.split(BATCH)]
    call = caller(tuned)
    return Streams(
        Stream("tuned/new", tuned, batches, call),
        Stream("patched/new", patched, batches, call),
        paired=True,
    )


class Calibration:
    """One walk over both streams.

    Attributes:
        groups: the input groups.
        last: moments of the last group that was walked.
        moment_seconds: of each walk, the part that is not forward passes.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._names = [target.name for target in find_targets(streams.tuned.model)]
        self.groups: Groups
        self.last: Moments | None = None
        self.moment_seconds: list[float] = []

    def __call__(self) -> None:
        """Find the groups, walk, and note how long the moments took."""
        with _timed_moments() as spent:
            streams = self._streams
            self.groups = discover(streams.tuned, self._names)
            collector = Collector(streams.tuned.model, self.groups)
            with Lockstep(streams.running(), self.groups.sites) as lockstep:
                for site in self.groups.sites:
                    self.last, _ = collector.both(lockstep, site, streams)
        self.moment_seconds.append(sum(spent))


@contextmanager
def _timed_moments() -> Iterator[list[float]]:
    """Time every call that adds a batch to moments, or makes means of them."""
    spent: list[float] = []

    def timed(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            start = time.perf_counter()
            try:
                return original(*args)
            finally:
                spent.append(time.perf_counter() - start)

        return call

    add, finish = timed(MomentSums.add), timed(MomentSums.finish)
    with patch.object(MomentSums, "add", add), patch.object(MomentSums, "finish", finish):
        yield spent


def check(calibration: Calibration, streams: Streams) -> None:
    """Hold the last group's Gram to that of plain passes with a hook."""
    name, moments = calibration.groups.sites[-1].modules[0], calibration.last
    actual = streams.new[0]
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, -2).float())

    handle = actual.model.get_submodule(name).register_forward_pre_hook(keep)
    for _ in run_all(actual):
        pass
    handle.remove()
    x = torch.cat(seen)
    truth = x.t() @ x / len(x)
    if moments is None or moments.cross is None or moments.tokens != len(x):
        raise SystemExit(f"{name}: the walk did not count what plain passes count")
    if (moments.gram - truth).norm() > APART * truth.norm():
        raise SystemExit(f"{name}: its Gram is not that of plain passes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make, measure, check, write, print."""
    parser = argparse.ArgumentParser(description="Times calibration beside plain forward passes.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--size", choices=SHAPES, default="0.1B")
    parser.add_argument("--out", type=Path, default=CPU / "calibration.csv")
    given = parser.parse_args(arguments)
    streams = make_streams(given.samples, given.size)
    calibration = Calibration(streams)

    def plain() -> None:
        for stream in streams.running():
            for _ in run_all(stream):
                pass

    call = streams.tuned.call
    for stream in streams.running():  # libraries choose and pack on the first call
        with torch.no_grad():
            call(stream.model, stream.batches[0])
    times = interleaved({"plain": plain, "walk": calibration}, given.rounds)
    moments = sum(calibration.moment_seconds) / len(calibration.moment_seconds)
    check(calibration, streams)
    forward = times["walk"] - moments
    shape = f"{given.size}, 2 streams, {given.samples * LENGTH} tokens, bfloat16"
    nan = float("nan")
    write(
        given.out,
        [
            Figure("forward", shape, "plain passes", times["plain"], 1.0, nan),
            Figure("forward", shape, "calibration", forward, times["plain"] / forward, FLOOR),
            Figure("moments", shape, "calibration", moments, nan, nan),
        ],
    )


if __name__ == "__main__":
    main()
