"""An adapter as TUNED against the merged model: ``python -m benchmarks.cpu_lora DIR``.

A base of LLaMA's shape is patched without data, once towards a checkpoint that holds the merged
words and once towards the adapter itself, whose weights are formed while they stream, in turns. The
merge is done here, by a plain product; the two outputs may differ by its rounding alone. Makes the
checkpoints in DIR and removes them.
"""

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.cpu_disk import patch
from benchmarks.pairs import SHAPES, Shape, write_pair
from benchmarks.results import CPU, Figure, write
from tailor_fast.checkpoint import StagedCheckpoint, open_checkpoint, plan_layout

RANKS = 16, 64
ROUNDS = 5
_STD = 0.02
# Of the words that either output changes, those changed in one only: a score at the threshold.
MASK_APART = 1e-3
# Of the words changed in both, those unequal, by one rounding: sums of float32 in another order.
WORD_APART = 1e-3


def write_adapter(base: Path, folder: Path, rank: int) -> None:
    """Write an adapter of every linear of the blocks, as peft lays it out."""
    generator = torch.Generator().manual_seed(rank)
    factors: dict[str, torch.Tensor] = {}
    modules: set[str] = set()
    with open_checkpoint(base) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if "_proj" not in name:
                continue
            (rows, cols), module = info.shape, name.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            for kind, shape in (("A", (rank, cols)), ("B", (rows, rank))):
                factor = torch.randn(shape, generator=generator) * _STD
                factors[f"base_model.model.{module}.lora_{kind}.weight"] = factor
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    named = {"target_modules": sorted(modules), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | named))


def write_merged(base: Path, adapter: Path, folder: Path, shape: Shape) -> None:
    """Write the checkpoint with the adapter merged into it: ``W + 2 B A``, rounded once."""
    file = adapter / "adapter_model.safetensors"
    with ExitStack() as stack:
        ours, factors = (stack.enter_context(open_checkpoint(path)) for path in (base, file))
        layout = plan_layout(shape.specs(), max_shard_bytes=shape.shard_bytes)
        staged = stack.enter_context(StagedCheckpoint(folder, layout))
        for spec in shape.specs():
            weight = ours.read(spec.name)
            module = f"base_model.model.{spec.name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in factors.tensors:
                down, up = (factors.read(f"{module}.lora_{kind}.weight") for kind in "AB")
                weight = (weight.float() + 2.0 * (up @ down)).bfloat16()
            staged.write(spec.name, 0, weight)
        staged.add_file("config.json", (base / "config.json").read_text())
        staged.commit()


def check(base: Path, merged: Path, adapted: Path) -> None:
    """Refuse to report two outputs that are not one another's but for a rounding."""
    moved = apart = words = unequal = 0
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in (base, merged, adapted)]
        for name in opened[0].tensors:
            before, *after = (checkpoint.read(name).view(torch.int16) for checkpoint in opened)
            first, second = (value != before for value in after)
            moved += int((first | second).sum())
            apart += int((first ^ second).sum())
            both = (first & second).nonzero(as_tuple=True)
            one, other = (value[both].int() for value in after)
            words += len(one)
            unequal += int((one != other).sum())
            # Of one sign, neighbours in bfloat16 are neighbours as integers.
            if len(one) and int((one - other).abs().max()) > 1:
                raise SystemExit(f"{name}: a patched word is more than a rounding away")
    print(f"{apart} of {moved} changed words are changed in one only; {unequal} of {words} unequal")
    if not moved or apart > MASK_APART * moved or unequal > WORD_APART * words:
        raise SystemExit("the two outputs differ by more than a rounding")


def measure(folder: Path, size: str, rank: int, rounds: int) -> list[Figure]:
    """Figures of one rank."""
    base, adapter, merged = folder / "base", folder / f"lora-{rank}", folder / f"merged-{rank}"
    write_adapter(base, adapter, rank)
    write_merged(base, adapter, merged, SHAPES[size])
    ways = {"merged": merged, f"adapter, rank {rank}": adapter}
    outs = [folder / f"out-{number}" for number in range(len(ways))]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for (way, tuned), out in zip(ways.items(), outs, strict=True):
            shutil.rmtree(out, ignore_errors=True)
            seconds[way].append(patch((base, tuned), out)[0])
    check(base, *outs)
    for path in (adapter, merged, *outs):
        shutil.rmtree(path)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    shape = f"{size}, bfloat16, 10%"
    return [
        Figure("patch", shape, way, value, medians["merged"] / value, math.nan)
        for way, value in medians.items()
    ]


@contextmanager
def room(folder: Path) -> Iterator[Path]:
    """Make ``folder``, and remove it with what is in it."""
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make, measure, check, remove, write, print."""
    parser = argparse.ArgumentParser(description="Times an adapter against the merged model.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="has room for four models")
    parser.add_argument("--size", choices=SHAPES, default="0.4B")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=CPU / "lora.csv")
    given = parser.parse_args(arguments)
    figures: list[Figure] = []
    with room(given.folder.absolute()) as folder:
        write_pair(folder, SHAPES[given.size])
        shutil.rmtree(folder / "tuned")
        for rank in RANKS:
            figures += measure(folder, given.size, rank, given.rounds)
    write(given.out, figures)


if __name__ == "__main__":
    main()
