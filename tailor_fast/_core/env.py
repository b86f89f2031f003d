"""The only reader of environment variables.

Each is read once, at start-up of the part that it concerns, and never inside an op.
"""

import os

TRITON_INTERPRET = "TRITON_INTERPRET"


def triton_interpreted() -> bool:
    """Whether Triton kernels run under its CPU interpreter (set before the first import)."""
    return os.environ.get(TRITON_INTERPRET, "0") == "1"
