"""Finding the weights: one source, bare names, index and headers in full agreement."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tailor_fast.checkpoint import (
    CheckpointError,
    MalformedError,
    MissingFileError,
    NotSafetensorsError,
    open_checkpoint,
)
from tests.checkpoint.files import save_sharded, some_tensors, write_index

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shards = {ONE: {"a": torch.zeros(2), "b": torch.ones(3)}, TWO: {"c": torch.ones(4)}}
    return save_sharded(tmp_path / "model", shards)


def refused(path: Path, error: type[CheckpointError]) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sharded(sharded: Path) -> None:
    with open_checkpoint(sharded) as checkpoint:
        assert {name: info.shard for name, info in checkpoint.tensors.items()} == {
            "a": ONE,
            "b": ONE,
            "c": TWO,
        }
        assert checkpoint.directory == sharded
        assert checkpoint.warnings == ()
        assert checkpoint.total_bytes == 36
    with open_checkpoint(sharded / "model.safetensors.index.json") as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert checkpoint.directory == sharded


def test_links_as_a_hub_cache_has_them(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in sharded.iterdir():
        blob = tmp_path / f"blob-{path.name.encode().hex()}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(blob)
    with open_checkpoint(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("c"), torch.ones(4))
        assert checkpoint.input_paths[0] == snapshot
        blobs = {path.parent for path in checkpoint.input_paths[1:]}
        assert blobs == {tmp_path}


def test_both_sources(sharded: Path) -> None:
    save_file(some_tensors(), sharded / "model.safetensors")
    message = refused(sharded, MalformedError)
    assert "it holds both; remove the stale one" in message


def test_no_source(tmp_path: Path) -> None:
    assert "it holds neither" in refused(tmp_path, MissingFileError)
    assert "does not exist" in refused(tmp_path / "nowhere", MissingFileError)
    save_file(some_tensors(), tmp_path / "adapter_model.safetensors")
    message = refused(tmp_path, MissingFileError)
    assert "got 'adapter_model.safetensors'; give the file itself" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}q\0.")
    message = refused(tmp_path, NotSafetensorsError)
    assert f"holds only pickles, which may run code when loaded: '{name}'" in message
    assert "convert it to safetensors first" in message
    assert "is a pickle" in refused(tmp_path / name, NotSafetensorsError)


def test_stray_weights_are_named(sharded: Path) -> None:
    save_file(some_tensors(), sharded / "consolidated.safetensors")
    with open_checkpoint(sharded) as checkpoint:
        (warning,) = checkpoint.warnings
    assert warning.endswith("not part of the checkpoint and not read: 'consolidated.safetensors'")


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "C:x.safetensors"),
        *("..\\x.safetensors", "\\\\host\\x.safetensors", "a\0.safetensors", ".safetensors"),
        *(
            "",
            ".",
            "..",
            "x",
            "x.safetensors ",
            "x.safetensors.",
            "x.SAFETENSORS",
            "x\n.safetensors",
        ),
    ],
)
def test_names_that_are_not_bare(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    assert "a file name must be bare and end in .safetensors" in refused(tmp_path, MalformedError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected '{'"),
        ("[]", "expected '{'"),
        ("{}", "expected a weight_map from tensors to files, found none"),
        ('{"weight_map":{}}', "found none or an empty one"),
        ('{"weight_map":[]}', "expected '{'"),
        ('{"weight_map":{"a":1}}', "expected a string"),
        ('{"weight_map":{"a":null}}', "expected a string"),
        ('{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}', "found 'a' again"),
        ('{"weight_map":{"a":"x.safetensors"},"weight_map":{}}', "found 'weight_map' again"),
        ('{"metadata":{"total_size":NaN},"weight_map":{"a":"x.safetensors"}}', "NaN"),
        ('{"weight_map":{"a":"x.safetensors"}} ,', "expected nothing more"),
        ('{"metadata":' + "[" * 100_000, "at most 64 levels of nesting"),
    ],
)
def test_malformed_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert message in refused(tmp_path, MalformedError)


def test_index_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b'{"weight_map":{"\xff":"x.safetensors"}}')
    assert "expected UTF-8; got byte 0xff at byte 16" in refused(tmp_path, MalformedError)
    monkeypatch.setattr("tailor_fast.checkpoint.index._MAX_INDEX_BYTES", 10)
    assert "index must be at most 10 bytes; got " in refused(tmp_path, MalformedError)


def test_pickle_in_the_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "pytorch_model-1.bin"})
    assert "got the pickle 'pytorch_model-1.bin'" in refused(tmp_path, NotSafetensorsError)


def test_names_equal_but_for_case(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "x.safetensors", "b": "X.safetensors"})
    assert "'X.safetensors' and 'x.safetensors' differ only in case" in refused(
        tmp_path, MalformedError
    )


def test_missing_shard(sharded: Path) -> None:
    (sharded / TWO).unlink()
    message = refused(sharded, MissingFileError)
    assert f"names 2 files, of which 1 are missing: '{TWO}'; fetch" in message


def test_index_and_headers_disagree(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    assert "must hold what the index names; 1 are in no file: 'd'" in refused(
        sharded, MalformedError
    )
    write_index(sharded, {"a": ONE, "c": TWO})
    assert "must hold only what the index names; got 1 more: 'b'" in refused(
        sharded, MalformedError
    )
    write_index(sharded, {"a": ONE, "b": TWO, "c": TWO})
    message = refused(sharded, MalformedError)
    assert f"tensor 'b': must be in '{TWO}', as the index says; it is in '{ONE}'" in message


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_sharded(tmp_path / "m", {ONE: {"a": torch.zeros(2)}, TWO: {"b": torch.zeros(1)}})
    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "m" / TWO)
    message = refused(tmp_path / "m", MalformedError)
    assert f"{TWO}: tensor 'a': must be in one file only; it is in '{ONE}' too" in message


def test_one_file_under_two_names(sharded: Path) -> None:
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to(sharded / ONE)
    message = refused(sharded, MalformedError)
    assert (
        "must be in one file only" in message or "a file of its own; it is the same as" in message
    )


@pytest.mark.parametrize("total", [36, 36.0, "36", None, "many", 1e400, [36]])
def test_right_or_unreadable_total_size(sharded: Path, total: object) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text()) | {"metadata": {"total_size": total}, "more": [1]}
    path.write_text(json.dumps(index).replace("Infinity", "1e400"))
    with open_checkpoint(sharded) as checkpoint:
        assert checkpoint.warnings == () or total == 1e400


def test_wrong_total_size(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": ONE, "c": TWO}, metadata={"total_size": 35})
    with open_checkpoint(sharded) as checkpoint:
        (warning,) = checkpoint.warnings
    assert warning.endswith("the index says 35 bytes, the tensors have 36")


def _directory(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _circle(path: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_directory, "a directory"),
        (os.mkfifo, "a pipe"),
        (_device, "a character device"),
        (_circle, "leads in a circle"),
        (_socket, "not a regular file"),
    ],
)
def test_shard_that_is_no_regular_file(sharded: Path, make, kind: str) -> None:
    (sharded / TWO).unlink()
    make(sharded / TWO)
    message = refused(sharded, MissingFileError)
    assert TWO in message
    assert kind in message
