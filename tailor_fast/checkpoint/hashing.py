"""Digests of tensors and of whole checkpoints.

The digest of a tensor covers dtype, shape and raw little-endian bytes, not the file they lie in;
the root of a checkpoint covers the sorted (name, digest) pairs. Both are therefore the same however
the tensors are distributed over files. ``xxh3-128`` finds damage and mix-ups at memory speed;
``sha256``, some ten times slower, also withstands someone who wants to deceive.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import xxhash

from tailor_fast.checkpoint.files import byte_view

HashName = Literal["xxh3-128", "sha256"]
HASHES: tuple[str, ...] = get_args(HashName)


class Hash(Protocol):
    """What every algorithm offers."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Digest of what was added so far."""


def new_hash(algorithm: str) -> Hash:
    """Return a fresh hash.

    Raises:
        ValueError: no such algorithm.
    """
    if algorithm == "xxh3-128":
        fast: Hash = xxhash.xxh3_128()
        return fast
    if algorithm == "sha256":
        return hashlib.sha256()
    raise ValueError(f"hash must be one of {', '.join(HASHES)}; got {algorithm!r}")


class TensorHasher:
    """Digest of one tensor, fed with its bytes in order.

    Definition: ``H(b"DTYPE|RANK|SIZE,SIZE,...|" + bytes)`` with the format's dtype name and decimal
    numbers, as in ``BF16|2|4096,4096|``.
    """

    def __init__(self, dtype: str, shape: Sequence[int], algorithm: HashName = "xxh3-128") -> None:
        """Start with dtype and shape.

        Raises:
            ValueError: no such algorithm.
        """
        self._hash = new_hash(algorithm)
        sizes = ",".join(str(size) for size in shape)
        self._hash.update(memoryview(f"{dtype}|{len(shape)}|{sizes}|".encode()))

    def update(self, buffer: object) -> None:
        """Add the next bytes: contiguous CPU tensor or an object with the buffer protocol."""
        self._hash.update(byte_view(buffer, writable=False))

    def hexdigest(self) -> str:
        """Return the digest of what was added so far, in hexadecimal."""
        return self._hash.hexdigest()


def checkpoint_root(digests: Mapping[str, str], algorithm: HashName = "xxh3-128") -> str:
    """Return the digest of a whole checkpoint from its tensors' digests.

    Definition: ``H`` over ``NAME NUL DIGEST LF`` in UTF-8, sorted by name.
    """
    root = new_hash(algorithm)
    for name, digest in sorted(digests.items()):
        root.update(memoryview(f"{name}\0{digest}\n".encode()))
    return root.hexdigest()
