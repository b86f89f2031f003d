"""Digests by their definition, manifests that repeat byte for byte, cards that YAML reads."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
import xxhash
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tailor_fast.checkpoint import (
    CARD_NAME,
    MANIFEST_NAME,
    CheckpointRecord,
    HashName,
    StagedCheckpoint,
    TensorHasher,
    build_manifest,
    checkpoint_root,
    input_record,
    model_card,
    model_name,
    open_checkpoint,
    read_license,
)
from tests.checkpoint.files import layout_of, save_sharded, some_tensors

ALGORITHMS = {"xxh3-128": xxhash.xxh3_128, "sha256": hashlib.sha256}


def digests_of(path: Path, algorithm: HashName = "xxh3-128") -> dict[str, str]:
    digests = {}
    with open_checkpoint(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            hasher = TensorHasher(info.dtype, info.shape, algorithm)
            hasher.update(checkpoint.read(name))
            digests[name] = hasher.hexdigest()
    return digests


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.binary(max_size=64), cuts=st.lists(st.integers(0, 64), max_size=3))
@settings(max_examples=40)
def test_tensor_digest_is_as_defined(algorithm: HashName, data: bytes, cuts: list[int]) -> None:
    hasher = TensorHasher("U8", (1, len(data)), algorithm)
    places = sorted([0, *cuts, len(data)])
    for begin, end in itertools.pairwise(places):
        hasher.update(data[begin:end])
    expected = ALGORITHMS[algorithm](f"U8|2|1,{len(data)}|".encode() + data[: places[-1]])
    assert hasher.hexdigest() == expected.hexdigest()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_root_is_as_defined_and_blind_to_order(algorithm: HashName) -> None:
    digests = {"b": "22", "a.\u00e9": "11"}
    expected = ALGORITHMS[algorithm]("a.\u00e9\x0011\nb\x0022\n".encode()).hexdigest()
    assert checkpoint_root(digests, algorithm) == expected
    assert checkpoint_root(dict(reversed(digests.items())), algorithm) == expected


def test_dtype_and_shape_count() -> None:
    variants = [("U8", (4,)), ("I8", (4,)), ("U8", (2, 2)), ("U8", (4, 1)), ("F32", (1,))]
    found = set()
    for dtype, shape in variants:
        hasher = TensorHasher(dtype, shape)
        hasher.update(b"1234")
        found.add(hasher.hexdigest())
    assert len(found) == len(variants)


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="hash must be one of xxh3-128, sha256; got 'md5'"):
        TensorHasher("U8", (1,), "md5")


def test_root_does_not_depend_on_the_files(tmp_path: Path) -> None:
    tensors = some_tensors()
    one, two = list(tensors)[:2], list(tensors)[2:]
    save_file(tensors, tmp_path / "one.safetensors")
    shards = {
        "a.safetensors": {name: tensors[name] for name in two},
        "b.safetensors": {name: tensors[name] for name in one},
    }
    single = digests_of(tmp_path / "one.safetensors")
    sharded = digests_of(save_sharded(tmp_path / "many", shards))
    assert single == sharded
    assert checkpoint_root(single) == checkpoint_root(sharded)


def make_output(tmp_path: Path, name: str, algorithm: HashName) -> Path:
    torch.manual_seed(1)
    tensors = some_tensors()
    source = tmp_path / "in.safetensors"
    save_file(tensors, source)
    layout = layout_of(tensors, 30)
    with (
        open_checkpoint(source) as base,
        StagedCheckpoint(tmp_path / name, layout, hash=algorithm) as staged,
    ):
        for tensor in base.tensors:
            staged.write(tensor, 0, base.read(tensor))
        staged.add_file("config.json", b"{}")
        manifest = build_manifest(
            inputs={"base": input_record(base, digests_of(source, algorithm), algorithm)},
            output=staged.record(),
            recipe={"density": 0.1},
            versions={"torch": "2"},
            algorithm=algorithm,
        )
        staged.add_file(MANIFEST_NAME, manifest)
        staged.commit()
    return tmp_path / name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_manifest(tmp_path: Path, algorithm: HashName) -> None:
    out = make_output(tmp_path, "out", algorithm)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["format"] == "tailor-manifest/1"
    assert manifest["tensor_digest"] == algorithm
    assert (manifest["recipe"], manifest["versions"]) == ({"density": 0.1}, {"torch": "2"})
    output, base = manifest["output"], manifest["inputs"]["base"]
    assert output["tensors"] == base["tensors"] == digests_of(out, algorithm)
    assert output["root"] == base["root"] == checkpoint_root(output["tensors"], algorithm)
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != MANIFEST_NAME}
    files_in = {"in.safetensors": (tmp_path / "in.safetensors").read_bytes()}
    for record, found in ((output, files), (base, files_in)):
        assert set(record["files"]) == set(found)
        for name, data in found.items():
            end = 8 + int.from_bytes(data[:8], "little")
            weights = name.endswith(".safetensors")
            key, covered = ("header_sha256", data[:end]) if weights else ("sha256", data)
            digest = hashlib.sha256(covered).hexdigest()
            assert record["files"][name] == {"bytes": len(data), key: digest}


def test_same_job_same_bytes(tmp_path: Path) -> None:
    outs = [make_output(tmp_path, name, "xxh3-128") for name in ("one", "two")]
    one, two = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert one == two


def test_partial_and_wrong_records(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as base:
        record = input_record(base, {"odd": "00"})
        assert (record.root, dict(record.tensors)) == (None, {"odd": "00"})
        with pytest.raises(ValueError, match="digests must be of its tensors; got 'x'"):
            input_record(base, {"x": "00"})
    output = CheckpointRecord({}, {}, None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        build_manifest(inputs={}, output=output, recipe={"x": float("nan")}, versions={})


def test_card(tmp_path: Path) -> None:
    names = ['org/base: "x"', "org/tuned\u00e9\n- y"]
    card = model_card(
        title="Tailored",
        base_models=names,
        recipe={"density": 0.1, "targets": "a|b"},
        kept={"layers.0": (1, 10), "layers.1": (0, 0), "layers.2": (29, 290)},
        license="apache-2.0",
    )
    _, matter, body = card.split("---\n", 2)
    assert yaml.safe_load(matter) == {
        "base_model": names,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "model-tailor", "tailor_fast"],
        "license": "apache-2.0",
    }
    for line in (
        "# Tailored",
        "| density | 0.1 |",
        '| targets | "a\\|b" |',
        "| layers.0 | 1 | 10 | 10.00 |",
        "| layers.1 | 0 | 0 | - |",
        "| all of these | 30 | 300 | 10.00 |",
    ):
        assert line in body.splitlines()
    (tmp_path / CARD_NAME).write_text(card)
    assert read_license(tmp_path) == "apache-2.0"


@pytest.mark.parametrize(
    ("text", "license_name"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\na: b\nlicense: 'cc-by-4.0'  \n---\nlicense: mit\n", "cc-by-4.0"),
        ("---\na: b\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("", None),
    ],
)
def test_license_of_a_card(tmp_path: Path, text: str, license_name: str | None) -> None:
    assert read_license(tmp_path) is None
    (tmp_path / CARD_NAME).write_text(text)
    assert read_license(tmp_path) == license_name


def test_a_checkpoint_is_not_called_by_its_place(tmp_path: Path) -> None:
    plain = tmp_path / "llava-docs"
    plain.mkdir()
    assert model_name(plain) == "llava-docs"
    assert model_name(plain / "model.safetensors") == "model.safetensors"
    for told, expected in (
        ('{"_name_or_path": "llava-hf/llava-1.5-7b-hf"}', "llava-hf/llava-1.5-7b-hf"),
        ('{"_name_or_path": "/home/me/llava"}', "llava-docs"),
        ('{"_name_or_path": "./checkpoints/a"}', "llava-docs"),
        ('{"_name_or_path": "a/b/c"}', "llava-docs"),
        ('{"_name_or_path": 3}', "llava-docs"),
        ("[]", "llava-docs"),
        ("{", "llava-docs"),
    ):
        (plain / "config.json").write_text(told)
        assert model_name(plain) == expected
    cached = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "0123abc"
    assert model_name(cached) == "llava-hf/llava-1.5-7b-hf"
