"""The ``codec`` op in Triton: words are counted per tile, a prefix sum places them, one pass moves.

A tile is 2048 elements, ``[256, 8]``: a row shares a byte of the bit mask. The n-th set bit of a
tile has the n-th of its words; the bits below one in its byte and the bytes before it are counted
on chip. Applying reads the bit mask twice (once to prove the patch, before anything is written),
the words twice and the target once, and writes the tiles that change. The proof stays on the
device: the last kernel looks at it and writes nothing where it failed, and the host, which reports
what was wrong, waits for the proof alone.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch
from tailor_fast.ops.codec.layout import (
    WORD_DTYPES,
    as_words,
    block_count,
    mask_bytes,
    refuse,
)

TILE = tl.constexpr(2048)
BYTES = tl.constexpr(256)
TILES = tl.constexpr(32)  # of a block
ZEROS = tl.constexpr(4096)  # words looked at by one program of `check_words_kernel`
NEVER = tl.constexpr(1 << 62)

# What `check_*_kernel` find, int64, 0 where there is nothing: the last byte if its pad bits are
# set, index - NEVER of the first false block count and of the first zero word; the number of bits.
PAD, BAD_BLOCK, ZERO, FOUND = (tl.constexpr(i) for i in range(4))

# 16 elements a thread: two vectors of 16 bytes of a 16-bit word per stream, in few registers, so
# that 16 programs on an SM hide the latency. Not yet measured on a card.
TILE_LAUNCH = Launch(num_warps=4)
CHECK_LAUNCH = Launch(num_warps=8)  # 16 or 32 numbers a thread


@triton.jit
def _bits_set(byte):
    """Number of set bits of int32 values below 256."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def _load(ptr, place, left):
    # Masks that end anywhere make loads scalar: only the last tile has one.
    if left >= TILE:  # noqa: SIM108  a branch of the program, not a choice between two loads
        x = tl.load(ptr + place)
    else:
        x = tl.load(ptr + place, mask=place < left, other=0)
    return x


@triton.jit
def _places(tile, size):
    """First element of a tile (int64) and of the mask's bytes, and how many elements are left.

    What follows counts from there in int32: 64-bit offsets would take twice the registers.
    """
    start = tile.to(tl.int64) * TILE
    return start, tile.to(tl.int64) * BYTES, tl.minimum(size - start, TILE).to(tl.int32)


@triton.jit
def _local():
    """Elements within a tile, int32 ``[256, 8]``, and mask bytes ``[256]``."""
    byte = tl.arange(0, BYTES)
    return byte[:, None] * 8 + tl.arange(0, 8)[None, :], byte


@triton.jit
def _unpack(byte):
    """Which of a tile's elements are set, and the rank of each among them, ``[256, 8]``."""
    bit = tl.arange(0, 8)[None, :]
    counts = _bits_set(byte)
    before = tl.cumsum(counts, axis=0) - counts
    below = _bits_set(byte[:, None] & ((1 << bit) - 1))
    return ((byte[:, None] >> bit) & 1) > 0, before[:, None] + below


@triton.jit(do_not_specialize=["size"])
def mark_kernel(
    base_ptr,  # [size] words
    tuned_ptr,  # [size] words
    allow_ptr,  # [size] uint8 or None
    bits_ptr,  # [ceil(size / 8)] uint8
    counts_ptr,  # [tiles] int32
    size,
):  # fmt: skip
    """The bit mask, and its set bits per tile."""
    tile = tl.program_id(0)
    start, first_byte, left = _places(tile, size)
    place, byte = _local()
    keep = _load(base_ptr + start, place, left) != _load(tuned_ptr + start, place, left)
    if allow_ptr is not None:
        keep = keep & (_load(allow_ptr + start, place, left) != 0)
    bits = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits_ptr + first_byte + byte, bits.to(tl.uint8), mask=byte * 8 < left)
    tl.store(counts_ptr + tile, tl.sum(_bits_set(bits)))


@triton.jit(do_not_specialize=["size"])
def gather_kernel(
    base_ptr, tuned_ptr, bits_ptr,
    ends_ptr,  # [tiles] int64: set bits up to the end of each tile
    counts_ptr,  # [tiles] int32
    words_ptr,  # [set bits] words
    size,
):  # fmt: skip
    """The words that differ, in order."""
    tile = tl.program_id(0)
    count = tl.load(counts_ptr + tile)
    if count > 0:
        start, first_byte, left = _places(tile, size)
        place, byte = _local()
        bits = tl.load(bits_ptr + first_byte + byte, mask=byte * 8 < left, other=0).to(tl.int32)
        keep, rank = _unpack(bits)
        word = _load(base_ptr + start, place, left) ^ _load(tuned_ptr + start, place, left)
        first = tl.load(ends_ptr + tile) - count
        tl.store(words_ptr + first + rank, word, mask=keep)


@triton.jit(do_not_specialize=["size"])
def check_bits_kernel(
    bits_ptr, blocks_ptr,
    counts_ptr,  # [blocks * TILES] int32
    faults_ptr,
    size,
):  # fmt: skip
    """Set bits per tile of one block, against its entry; pad bits."""
    block = tl.program_id(0)
    tile = tl.arange(0, TILES)[:, None]
    byte = block.to(tl.int64) * (TILES * BYTES) + tile * BYTES + tl.arange(0, BYTES)[None, :]
    if (block.to(tl.int64) + 1) * (TILES * TILE) <= size:
        bits = tl.load(bits_ptr + byte)
    else:
        bits = tl.load(bits_ptr + byte, mask=byte * 8 < size, other=0)
    bits = bits.to(tl.int32)
    counts = tl.sum(_bits_set(bits), axis=1)
    tl.store(counts_ptr + block * TILES + tl.arange(0, TILES), counts)
    found = tl.sum(counts)
    tl.atomic_add(faults_ptr + FOUND, found.to(tl.int64))
    if found != tl.load(blocks_ptr + block):
        tl.atomic_min(faults_ptr + BAD_BLOCK, block.to(tl.int64) - NEVER)
    used = size - byte * 8  # bits of a byte that have an element
    pad = tl.where((used > 0) & (used < 8), bits >> tl.minimum(used, 8).to(tl.int32), 0)
    if tl.max(pad) > 0:
        last = tl.max(tl.where((used > 0) & (used < 8), bits, 0))
        tl.store(faults_ptr + PAD, last.to(tl.int64))


@triton.jit(do_not_specialize=["count"])
def check_words_kernel(words_ptr, faults_ptr, count):
    """The first zero word."""
    place = tl.program_id(0).to(tl.int64) * ZEROS + tl.arange(0, ZEROS)
    word = tl.load(words_ptr + place, mask=place < count, other=1)
    first = tl.min(tl.where(word == 0, place - NEVER, 0))
    if first < 0:
        tl.atomic_min(faults_ptr + ZERO, first)


@triton.jit(do_not_specialize=["size", "words"])
def apply_kernel(
    target_ptr,  # [size] words
    bits_ptr, ends_ptr, counts_ptr, words_ptr, faults_ptr,
    size, words,
):  # fmt: skip
    """XOR the words into the elements that are set, unless the patch has a fault."""
    tile = tl.program_id(0)
    count = tl.load(counts_ptr + tile)
    faults = tl.load(faults_ptr + PAD) | tl.load(faults_ptr + BAD_BLOCK)
    faults |= tl.load(faults_ptr + ZERO)
    if (count > 0) & (faults == 0) & (tl.load(faults_ptr + FOUND) == words):
        start, first_byte, left = _places(tile, size)
        place, byte = _local()
        bits = tl.load(bits_ptr + first_byte + byte, mask=byte * 8 < left, other=0).to(tl.int32)
        keep, rank = _unpack(bits)
        first = tl.load(ends_ptr + tile) - count
        word = tl.load(words_ptr + first + rank, mask=keep, other=0)
        target = target_ptr + start + place
        # Whole vectors: at a tenth of the elements nearly every sector changes anyway.
        if left >= TILE:
            tl.store(target, tl.load(target) ^ word)
        else:
            tl.store(target, tl.load(target, mask=keep, other=0) ^ word, mask=keep)


def _launch(kernel: Any, programs: int, config: Launch, *args: Any) -> None:
    tensor = args[0]
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        kernel[(programs,)](*args, num_warps=config.num_warps, num_stages=config.num_stages)


def _tiles(size: int) -> int:
    return int(-(-size // TILE.value))


def encode_patch(
    base: torch.Tensor, tuned: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bit mask of the words that differ, their XOR, and their number per block."""
    left, right, size = as_words(base), as_words(tuned), base.numel()
    bits = torch.empty(mask_bytes(size), dtype=torch.uint8, device=base.device)
    if size == 0:
        return bits, left[:0].clone(), torch.empty(0, dtype=torch.int32, device=base.device)
    allow = None if mask is None else mask.view(-1).view(torch.uint8)
    # Whole blocks of tiles: the rest stays 0.
    counts = torch.zeros(block_count(size) * TILES.value, dtype=torch.int32, device=base.device)
    _launch(mark_kernel, _tiles(size), TILE_LAUNCH, left, right, allow, bits, counts, size)
    blocks = counts.view(-1, TILES.value).sum(1, dtype=torch.int32)
    ends = counts.cumsum(0)  # int64
    words = torch.empty(int(ends[-1]), dtype=WORD_DTYPES[base.element_size()], device=base.device)
    args = left, right, bits, ends, counts, words, size
    _launch(gather_kernel, _tiles(size), TILE_LAUNCH, *args)
    return bits, words, blocks


def apply_patch_(
    target: torch.Tensor, mask: torch.Tensor, words: torch.Tensor, blocks: torch.Tensor
) -> None:
    """XOR ``words`` into the elements of ``target`` that ``mask`` has set."""
    raw, size = as_words(target), target.numel()
    counts = torch.empty(len(blocks) * TILES.value, dtype=torch.int32, device=target.device)
    faults = torch.zeros(4, dtype=torch.int64, device=target.device)
    if size:
        args = mask, blocks, counts, faults, size
        _launch(check_bits_kernel, len(blocks), CHECK_LAUNCH, *args)
    if words.numel():
        programs = -(-words.numel() // ZEROS.value)
        _launch(check_words_kernel, programs, CHECK_LAUNCH, words, faults, words.numel())
    read = _read(faults)
    if words.numel():
        ends = counts.cumsum(0)  # int64
        given = raw, mask, ends, counts, words, faults, size, words.numel()
        _launch(apply_kernel, _tiles(size), TILE_LAUNCH, *given)
    _require_sound(read(), size, words, blocks, counts)


def _read(numbers: torch.Tensor) -> Callable[[], list[int]]:
    """Begin to copy numbers to the host; the function that is returned waits for them alone."""
    if not numbers.is_cuda:
        return numbers.tolist
    with torch.cuda.device(numbers.device):
        here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        here.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        found: list[int] = here.tolist()
        return found

    return wait


def _require_sound(
    faults: Sequence[int],
    size: int,
    words: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Refuse a patch that contradicts itself."""
    if faults[PAD.value]:
        refuse("pad", size // 8, 0, faults[PAD.value])
    if faults[BAD_BLOCK.value]:
        block = faults[BAD_BLOCK.value] + NEVER.value
        found = int(counts.view(-1, TILES.value)[block].sum())
        refuse("block", block, found, int(blocks[block]))
    if faults[FOUND.value] != words.numel():
        refuse("words", 0, faults[FOUND.value], words.numel())
    if faults[ZERO.value]:
        refuse("zero", faults[ZERO.value] + NEVER.value, 0, 0)


def kernels() -> tuple[KernelForm, ...]:
    """The forms in which real launches compile the kernels, for ahead-of-time compilation."""
    fixed = {"bits_ptr": "*u8", "allow_ptr": "*u8", "blocks_ptr": "*i32", "counts_ptr": "*i32"}
    fixed |= {"ends_ptr": "*i64", "faults_ptr": "*i64"}
    fixed |= dict.fromkeys(("size", "count", "words"), "i64")
    forms = []

    def add(kernel: Any, launch: Launch, word: str, **constants: None) -> None:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: fixed.get(name, f"*{word}") for name in names}
        aligned = frozenset(name for name in names if name.endswith("_ptr"))
        step = kernel.__name__.removesuffix("_kernel")
        name = f"{step}_{word}{'_all' if constants else ''}"
        forms.append(KernelForm(name, kernel, signature, constants, launch, aligned))

    for word in ("i8", "i16", "i32", "i64"):
        add(mark_kernel, TILE_LAUNCH, word)
        add(mark_kernel, TILE_LAUNCH, word, allow_ptr=None)
        for kernel in (gather_kernel, apply_kernel):
            add(kernel, TILE_LAUNCH, word)
        add(check_words_kernel, CHECK_LAUNCH, word)
    add(check_bits_kernel, CHECK_LAUNCH, "u8")
    return tuple(forms)
