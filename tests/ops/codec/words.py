"""Pairs of tensors for the codec's tests: any words, and the ones that arithmetic would change."""

import torch

from tailor_fast.ops.codec.layout import WORD_DTYPES

DTYPES = [
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.int64,
    torch.uint64,
    torch.float64,
    torch.complex64,
]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: equality without a look at what they mean."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def special_words(dtype: torch.dtype) -> torch.Tensor:
    """Words that value semantics would merge or change: zeros, subnormals, infinities, NaNs."""
    word = WORD_DTYPES[dtype.itemsize]
    if dtype == torch.bool:
        return torch.tensor([0, 1], dtype=word)
    if not dtype.is_floating_point:
        return torch.tensor([0, 1, -1, torch.iinfo(word).min, torch.iinfo(word).max], dtype=word)
    infinity = torch.tensor(float("inf"), dtype=dtype).view(word)  # the largest where there is none
    positive = torch.stack([infinity * 0, infinity * 0 + 1, infinity, infinity | 1, infinity | 3])
    words: torch.Tensor = torch.cat([positive, positive | torch.iinfo(word).min]).unique()
    return words


def random_words(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Flat random words, a quarter of them special."""
    if dtype == torch.bool:
        return torch.rand(size) < 0.5
    word = WORD_DTYPES[dtype.itemsize]
    words = torch.randint(-128, 128, (size * dtype.itemsize,), dtype=torch.int8).view(word)
    special = special_words(dtype)
    chosen = special[torch.randint(len(special), (size,))]
    return torch.where(torch.rand(size) < 0.25, chosen, words).view(dtype)


def random_pair(
    shape: tuple[int, ...], dtype: torch.dtype, density: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that differ in about ``density`` of their words, in all of them for 1."""
    size = torch.Size(shape).numel()
    base, other = random_words(size, dtype), random_words(size, dtype)
    word = WORD_DTYPES[dtype.itemsize]
    other_words = torch.where(
        other.view(word) == base.view(word), base.view(word) ^ 1, other.view(word)
    )
    tuned = torch.where(torch.rand(size) < density, other_words, base.view(word))
    return base.reshape(shape), tuned.view(dtype).reshape(shape)
