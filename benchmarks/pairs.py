"""Pairs of checkpoints of any size, for timing: ``python -m benchmarks.pairs DIR --size 1.1B``.

LLaMA shapes in bfloat16, in shards with their index. The numbers are one block of normal variates,
entered at another place for each tensor, so that a pair is made at the speed of the disk and only
a few tensors are ever in memory. They repeat after some four million, at no multiple of a row.
"""

import argparse
import json
import math
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor_fast.checkpoint import StagedCheckpoint, TensorSpec, plan_layout

_BLOCK = 4_194_319  # a prime: no two rows of a matrix are equal
_CHUNK = 1 << 20  # elements
_WEIGHT_STD = 0.02
_DELTA_STD = 0.002


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA and of its files."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    shard_bytes: int
    vocabulary: int = 32000

    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor, in the order of the files."""
        kv = self.hidden // self.heads * self.kv_heads
        yield _matrix("model.embed_tokens", self.vocabulary, self.hidden)
        for number in range(self.layers):
            block = f"model.layers.{number}"
            for name, rows, cols in (
                ("self_attn.q_proj", self.hidden, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, self.hidden),
                ("mlp.gate_proj", self.intermediate, self.hidden),
                ("mlp.up_proj", self.intermediate, self.hidden),
                ("mlp.down_proj", self.hidden, self.intermediate),
            ):
                yield _matrix(f"{block}.{name}", rows, cols)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield TensorSpec(f"{block}.{name}.weight", "BF16", (self.hidden,))
        yield TensorSpec("model.norm.weight", "BF16", (self.hidden,))
        yield _matrix("lm_head", self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """``config.json`` of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


# 1.1B has the shapes of TinyLlama (4 key-value heads of 64), 3B of OpenLLaMA, 7B of LLaMA-7B.
SHAPES = {
    "0.1B": Shape(12, 768, 2048, 12, 12, 10**8),
    "0.4B": Shape(24, 1024, 2816, 16, 16, 4 * 10**8),
    "1.1B": Shape(22, 2048, 5632, 32, 4, 12 * 10**8),
    "3B": Shape(26, 3200, 8640, 32, 32, 19 * 10**8),
    "7B": Shape(32, 4096, 11008, 32, 32, 19 * 10**8),
}


def _matrix(module: str, rows: int, cols: int) -> TensorSpec:
    return TensorSpec(f"{module}.weight", "BF16", (rows, cols))


class _Numbers:
    """Normal variates that are drawn once and read in a circle."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        block = torch.randn(_BLOCK, generator=generator).bfloat16()
        self._twice = torch.cat((block, block[:_CHUNK]))

    def chunk(self, start: int, count: int) -> torch.Tensor:
        """``count`` numbers, at most ``_CHUNK``, from place ``start`` of the circle."""
        start %= _BLOCK
        return self._twice[start : start + count]


def write_pair(
    folder: Path, shape: Shape, seed: int = 0, moved: int | None = None
) -> tuple[Path, Path]:
    """Write ``folder/base`` and ``folder/tuned``; the tuned linears have moved by a tenth.

    Args:
        folder: an existing directory.
        shape: of the model.
        seed: of all numbers.
        moved: seed of what the tuned linears have moved by, where one base has several fine-tunes;
            None is ``seed + 1``.

    Raises:
        TailorError: a model is there already, or cannot be written.
    """
    numbers, moves = _Numbers(seed), _Numbers(seed + 1 if moved is None else moved)
    layout = plan_layout(shape.specs(), max_shard_bytes=shape.shard_bytes)
    paths = folder / "base", folder / "tuned"
    with StagedCheckpoint(paths[0], layout) as base, StagedCheckpoint(paths[1], layout) as tuned:
        for spec in shape.specs():
            place = zlib.crc32(spec.name.encode())
            for begin, old, new in _chunks(spec, place, numbers, moves):
                base.write(spec.name, 2 * begin, old)
                tuned.write(spec.name, 2 * begin, new)
        for staged in (base, tuned):
            staged.add_file("config.json", json.dumps(shape.config(), indent=2) + "\n")
            staged.commit()
    return paths


def _chunks(
    spec: TensorSpec, place: int, numbers: _Numbers, moves: _Numbers
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield ``(first element, base, tuned)`` of a tensor; they stay until the next is asked for."""
    # Whole pages: the writer passes them by the page cache.
    buffers = [torch.frombuffer(mmap.mmap(-1, 2 * _CHUNK), dtype=torch.bfloat16) for _ in range(2)]
    size = math.prod(spec.shape)
    for begin in range(0, size, _CHUNK):
        count = min(_CHUNK, size - begin)
        old, new = (buffer[:count] for buffer in buffers)
        if len(spec.shape) == 1:
            old.fill_(1.0)
        else:
            torch.mul(numbers.chunk(place + begin, count), _WEIGHT_STD, out=old)
        if len(spec.shape) == 1 or "embed" in spec.name:
            new = old
        else:
            # Another place of the circle than the weights': the two are as good as independent.
            torch.add(old, moves.chunk(7 * place + begin, count), alpha=_DELTA_STD, out=new)
        yield begin, old, new


def main() -> None:
    """Make one pair."""
    parser = argparse.ArgumentParser(description="Makes a pair of checkpoints of random numbers.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="base and tuned are made in it")
    parser.add_argument("--size", choices=SHAPES, default="1.1B")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for path in write_pair(given.folder, SHAPES[given.size], given.seed):
        print(path)


if __name__ == "__main__":
    main()
