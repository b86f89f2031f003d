"""The 22 dtypes of the safetensors format: their size and their torch dtype, if there is one."""

import math
from collections.abc import Sequence

import torch

# name in the file -> (bits per element, torch dtype). None: carried as raw bytes, never computed on
# (F4 and F6 pack several elements into a byte, which no torch tensor of that shape can hold).
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "C64": (64, torch.complex64),
    "F64": (64, torch.float64),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
}
DTYPES: tuple[str, ...] = tuple(_DTYPES)
_NAMES = {dtype: name for name, (_, dtype) in _DTYPES.items() if dtype is not None}


def item_bits(name: str) -> int:
    """Return the bits of one element of the format's dtype ``name``."""
    return _DTYPES[name][0]


def torch_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of the format's dtype ``name``, None when torch has none."""
    return _DTYPES[name][1]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a torch dtype.

    Raises:
        TypeError: the format has no such dtype.
    """
    if dtype not in _NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _NAMES)
        raise TypeError(f"dtype_name: dtype must be one of {known}; got {dtype}")
    return _NAMES[dtype]


def byte_size(name: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor, exact for any size.

    Raises:
        ValueError: the elements do not fill whole bytes (possible for F4 and F6 only).
    """
    bits = math.prod(shape) * item_bits(name)
    if bits % 8:
        raise ValueError(f"{name} {list(shape)} is {bits} bits, which is no whole number of bytes")
    return bits // 8
