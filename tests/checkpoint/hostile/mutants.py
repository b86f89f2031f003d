"""Good files of every kind, and endless small changes to them, the same on every run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import torch
from safetensors.torch import save

from tests.checkpoint.files import U8_PAIR, raw_file

SEED = 20240712
# Bytes that mean something to the parser; a change takes one of these every other time.
_TELLING = b'0123456789{}[],:"\\ \t\n.-+eEuUFBIaf_\x00\x1f\x7f\x80\xc3\xed\xff'


def _spaced() -> bytes:
    """Fields in another order, white space, escapes: the general path of the parser."""
    text = (
        ' {"__metadata__" : { "k\\n" : "v\\u00e9" } ,\n "a\\u0062" :{"shape":[ 2 , 1 ],'
        '"data_offsets" : [0,8],"dtype":"F32"}, "z":{"data_offsets":[8,8],"dtype":"I64",'
        '"shape":[0]}, "s":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}  '
    )
    return raw_file(text, b"12345678ab")


SEEDS: tuple[bytes, ...] = (
    save({"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.uint8)}, metadata={"k": "v"}),
    save({"z": torch.zeros(0, 2).bfloat16(), "\u00e9": torch.tensor(True), "c": torch.ones(1)}),
    raw_file({}, b""),
    raw_file(
        {
            "vision_tower.layers.11.self_attn.q_proj.weight": U8_PAIR,
            "f4": {"dtype": "F4", "shape": [2, 2], "data_offsets": [2, 4]},
            "__metadata__": {"format": "pt", "a longer key": "a longer value, as there are some"},
        },
        b"1234",
    ),
    raw_file(
        json.dumps(
            {
                "layers.0.w": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]},
                "layers.0.b": {"dtype": "F64", "shape": [1], "data_offsets": [4, 12]},
                "layers.1.w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [12, 15]},
                "__metadata__": {"format": "pt", "": ""},
            },
            separators=(",", ":"),
        ),
        bytes(range(15)),
    ),
    _spaced(),
)
INDEX_SEEDS: tuple[bytes, ...] = (
    b'{"metadata":{"total_size":16},"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}',
    b'{\n "weight_map": {"x": "a.safetensors"}, "more": [1, -2.5e3, {"a": null}, "\\u00e9"]}\n',
)


def mutants(count: int, seeds: tuple[bytes, ...] = SEEDS, start: int = 0) -> Iterator[bytes]:
    """Yield ``count`` changed files, the ``start``-th first; each depends on its number alone.

    One to three bytes of the length and the header of a seed are flipped in one bit, replaced,
    inserted, taken out or copied from elsewhere; the length is put right every other time.
    """
    for number in range(start, start + count):
        dice = random.Random(SEED * 1_000_003 + number)
        yield mutant(seeds[number % len(seeds)], dice)


def mutant(seed: bytes, dice: random.Random) -> bytes:
    """Return ``seed``, a file or an index, changed as ``mutants`` says."""
    framed = seed[:1] != b"{"
    begin = 8 if framed else 0
    end = begin + int.from_bytes(seed[:8], "little") if framed else len(seed)
    text = bytearray(seed[begin:end])
    prefix = bytearray(seed[:begin])
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        if framed and (not text or dice.random() < 0.05):
            prefix[dice.randrange(8)] ^= 1 << dice.randrange(8)
        else:
            _change(text, dice)
    if framed and dice.random() < 0.5 and len(text) != end - begin:
        prefix = bytearray(len(text).to_bytes(8, "little"))
    return bytes(prefix + text) + seed[end:]


def _change(text: bytearray, dice: random.Random) -> None:
    if not text:
        text.append(dice.choice(_TELLING))
        return
    at = dice.randrange(len(text))
    new = dice.choice(_TELLING) if dice.random() < 0.5 else dice.randrange(256)
    match dice.randrange(6):
        case 0 | 1:
            text[at] ^= 1 << dice.randrange(8)
        case 2:
            text[at] = new
        case 3:
            text.insert(at, new)
        case 4:
            del text[at : at + dice.randint(1, 3)]
        case _:
            begin = dice.randrange(len(text))
            text[at:at] = text[begin : begin + dice.randint(1, 24)]
