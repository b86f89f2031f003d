"""Registration of the ops with ``torch.library``: one call per op.

A registered op has a schema that marks what it mutates and a fake, so that it runs on ``meta``
tensors, under ``torch.compile`` and through ``torch.library.opcheck``. The last argument of every
schema is ``str backend``; the implementation looks the module up and calls it.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "tailor_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``schema`` for CPU and CUDA tensors, with ``fake`` for shapes alone."""
    name = schema.split("(", 1)[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
