"""A checkpoint that is hashed while it is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tailor_fast.checkpoint import Hashed, TensorHasher, checkpoint_root, open_checkpoint

TENSORS = {
    "a": torch.arange(1000, dtype=torch.float32).reshape(10, 100),
    "b": torch.tensor([1, 2, 3], dtype=torch.int8),
    "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
}


def expected() -> dict[str, str]:
    digests = {}
    for name, dtype in (("a", "F32"), ("b", "I8"), ("empty", "BF16")):
        hasher = TensorHasher(dtype, TENSORS[name].shape)
        hasher.update(TENSORS[name])
        digests[name] = hasher.hexdigest()
    return digests


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_every_way_of_reading_gives_the_same_digest(block: int, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        whole, parts = Hashed(checkpoint), Hashed(checkpoint)
        for name, tensor in TENSORS.items():
            assert torch.equal(whole.read(name), tensor)
        joined = b"".join(bytes(view) for _, view in parts.blocks("a", bytearray(block)))
        assert joined == TENSORS["a"].numpy().tobytes()
        assert parts.digests == {"a": expected()["a"]}
        assert parts.finish(bytearray(block)) == whole.digests == expected()
        assert parts.root(bytearray(block)) == checkpoint_root(expected())


def test_half_a_tensor_has_no_digest(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        hashed = Hashed(checkpoint)
        next(hashed.blocks("a", bytearray(8)))
        assert hashed.digests == {}
