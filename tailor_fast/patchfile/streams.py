"""Checkpoints read block by block, hashed on the way, in threads of their own.

Reading, hashing, XOR and writing release the GIL, so that a chain of ``ahead`` generators keeps
disk and cores busy at once. Memory is the ring of buffers, whatever the size of a tensor.
"""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from tailor_fast.checkpoint import HashName, TensorHasher, TensorSource
from tailor_fast.ops.codec.layout import WORD_DTYPES

T = TypeVar("T")

# Whole codec blocks of every word width. Small enough that what was read is still in the cache
# when it is hashed and encoded.
BLOCK_BYTES: Final = 4 << 20
DEPTH: Final = 2  # blocks that a stage is ahead of the next one
_END: Final = object()


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive bytes of one tensor.

    Attributes:
        name: tensor.
        begin: first byte within the tensor.
        view: the bytes, writable; they stay until the ring comes round.
        digest: of the whole tensor, with its last block; empty before.
    """

    name: str
    begin: int
    view: memoryview
    digest: str


def read_blocks(
    checkpoint: TensorSource, names: Iterable[str], algorithm: HashName, *, in_use: int
) -> Generator[Block, None, None]:
    """Read tensors one after the other; an empty one is one empty block.

    Args:
        checkpoint: open.
        names: tensors, in the order wanted.
        algorithm: of the digests.
        in_use: how many blocks may be alive at once beside the one that is being read.

    Raises:
        TruncatedError, TransferError: see ``Checkpoint.read_into``.
    """
    names = list(names)
    largest = max((checkpoint.tensors[name].nbytes for name in names), default=0)
    ring = [memoryview(bytearray(min(largest, BLOCK_BYTES))) for _ in range(in_use + 1)]
    turn = 0
    for name in names:
        info = checkpoint.tensors[name]
        hasher = TensorHasher(info.dtype, info.shape, algorithm)
        for begin in range(0, max(info.nbytes, 1), BLOCK_BYTES):
            end = min(info.nbytes, begin + BLOCK_BYTES)
            view = ring[turn][: end - begin]
            checkpoint.read_into(name, view, begin, end)
            hasher.update(view)
            digest = hasher.hexdigest() if end == info.nbytes else ""
            yield Block(name, begin, view, digest)
            turn = (turn + 1) % len(ring)


def words_of(view: memoryview, width: int) -> torch.Tensor:
    """See bytes as a flat tensor of words of ``width`` bytes, without a copy."""
    dtype = WORD_DTYPES[width]
    return torch.frombuffer(view, dtype=dtype) if len(view) else torch.empty(0, dtype=dtype)


def ahead(items: Generator[T, None, None], depth: int = DEPTH) -> Generator[T, None, None]:
    """Yield what ``items`` yields, computed in another thread up to ``depth`` items ahead.

    An error of ``items`` is raised here, in its place. Closing waits for the item that is being
    computed and closes ``items``.
    """
    waiting: deque[Future[T | object]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        waiting.extend(pool.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item  # type: ignore[misc]  # the end is not yielded
    finally:
        pool.shutdown(cancel_futures=True)  # from here on nobody runs ``items``
        items.close()
