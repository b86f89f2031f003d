"""BASE and TUNED: matched in TUNED's order, or refused with file and tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tailor_fast.checkpoint import MismatchError, match_pair, open_checkpoint
from tests.checkpoint.files import save_sharded, some_tensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(some_tensors(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def refused(base: Path, tuned: Path) -> str:
    with open_checkpoint(base) as one, open_checkpoint(tuned) as two:
        with pytest.raises(MismatchError) as caught:
            match_pair(one, two)
        assert caught.value.exit_code == 65
        return str(caught.value)


def test_match_across_shards(base: Path, tmp_path: Path) -> None:
    tensors = some_tensors()
    names = list(tensors)
    shards = {
        "b.safetensors": {name: tensors[name] for name in names[:2]},
        "a.safetensors": {name: tensors[name] for name in names[2:]},
    }
    tuned = save_sharded(tmp_path / "tuned", shards)
    with open_checkpoint(base) as one, open_checkpoint(tuned) as two:
        match_pair(one, two)


def test_names(base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    more = {f"more.{i}": torch.zeros(1) for i in range(7)}
    save_file(some_tensors() | more, tuned)
    message = refused(base, tuned)
    start = f"{tuned}: has 7 tensors that {base} lacks: 'more.0', 'more.1', 'more.2', 'more.3', 'm"
    assert message.startswith(start)
    assert "'more.4' and 2 more; both must be the same architecture" in message
    assert refused(tuned, base).startswith(f"{tuned}: has 7 tensors that {base} lacks")


def test_shape(base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    save_file(some_tensors() | {"layer.weight": torch.zeros(7, 5).bfloat16()}, tuned)
    message = refused(base, tuned)
    assert message.startswith(f"{tuned}: tensor 'layer.weight': shape must equal that of BASE, ")
    assert f"BF16 [6, 5] in {base}; got BF16 [7, 5]; a resized vocabulary" in message


def test_dtype(base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    save_file(some_tensors() | {"layer.weight": torch.zeros(6, 5).half()}, tuned)
    message = refused(base, tuned)
    assert "tensor 'layer.weight': dtype must equal that of BASE, BF16 [6, 5] in" in message
    assert message.endswith("got F16 [6, 5]; save both checkpoints in one dtype")
