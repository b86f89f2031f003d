"""What a Triton kernel is launched with, and the forms of it that are compiled ahead of time.

Importing this module does not import triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch configuration of one kernel. The reason for its numbers stands where it is made.

    ``enable_fp_fusion=False`` keeps the compiler from contracting ``a * b + c`` into an FMA, for
    kernels whose bits are promised.
    """

    num_warps: int
    num_stages: int = 2
    enable_fp_fusion: bool = True


@dataclass(frozen=True, slots=True)
class KernelForm:
    """One form of a kernel as it is compiled: the unit of the resource test.

    Attributes:
        name: unique within its op, such as ``"gram_bf16"``.
        kernel: the ``triton.jit`` function.
        signature: argument name -> triton type, such as ``{"x": "*bf16", "tokens": "i64"}``;
            arguments that are in ``constexprs`` are left out.
        constexprs: argument name -> compile-time value.
        launch: warps and stages.
        aligned: arguments whose value is a multiple of 16 (pointers, strides) in real launches.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    launch: Launch
    aligned: frozenset[str] = field(default_factory=frozenset)
