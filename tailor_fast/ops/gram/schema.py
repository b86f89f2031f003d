"""``torch.library`` registration of the ``gram`` op. Imports no backend until one is called."""

import torch

from tailor_fast._core.backend import Order, implementation
from tailor_fast._core.library import register

# On CPU tensors Triton means its interpreter: for tests, never what `auto` takes.
ORDER: Order = {"cpu": ("native", "reference", "triton"), "cuda": ("triton", "reference")}


def _gram(gram: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, backend: str) -> None:
    implementation("gram", ORDER, backend, x.device.type).accumulate_gram_(gram, x, mask)


def _cross(
    cross: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None, backend: str
) -> None:
    implementation("gram", ORDER, backend, x.device.type).accumulate_cross_gram_(cross, x, y, mask)


def _diag(diag: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, backend: str) -> None:
    implementation("gram", ORDER, backend, x.device.type).accumulate_gram_diag_(diag, x, mask)


def _fake(*_: object) -> None:
    return None


register(
    "accumulate_gram_(Tensor(a!) gram, Tensor x, Tensor? token_mask, str backend) -> ()",
    _gram,
    _fake,
)
register(
    "accumulate_cross_gram_"
    "(Tensor(a!) cross, Tensor x, Tensor y, Tensor? token_mask, str backend) -> ()",
    _cross,
    _fake,
)
register(
    "accumulate_gram_diag_(Tensor(a!) diag, Tensor x, Tensor? token_mask, str backend) -> ()",
    _diag,
    _fake,
)
