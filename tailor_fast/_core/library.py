"""Registration of the ops with ``torch.library``: one call per op.

A registered op has a schema that marks what it mutates and a fake, so that it runs on ``meta``
tensors, under ``torch.compile`` and through ``torch.library.opcheck``. The last argument of every
schema is ``str backend``; the implementation looks the module up and calls it.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

NAMESPACE = "tailor_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def on_its_card(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the card of its first tensor as the current one.

    Kernels are launched on the current card, which is the first one in a new thread, wherever the
    tensors are.
    """

    @wraps(run)
    def call(*args: Any) -> Any:
        with torch.cuda.device(_first_tensor(args).device):
            return run(*args)

    return call


def _first_tensor(args: Iterable[Any]) -> torch.Tensor:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0]
    raise RuntimeError("an op without a tensor")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``schema`` for CPU and CUDA tensors, with ``fake`` for shapes alone."""
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, run, "CPU")
    _library.impl(name, on_its_card(run), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
