"""The format: golden bytes, sizes, what the documentation says, and what other libraries see."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tailor_fast.checkpoint import checkpoint_root
from tailor_fast.patchfile import Patch, PatchEntry, PatchPlan, diff_checkpoints
from tests.patchfile.pairs import content, pair, save
from tests.source_tree import ROOT

DOCUMENT = ROOT / "docs" / "patch-files.md"
# The plan of ``tiny``, in pieces that fit a line; every digest was computed apart from the package,
# by ``test_golden_digests_are_those_of_the_document``.
BASE_ROOT, TARGET_ROOT = "45dc2b20985aabfcc549cc699b8c23a4", "0af07afc00984e3f87624cc116c56d3d"
EQUAL = "50db531f307235c6bcd1660753e60edd"
BASE, TARGET = "e6ac3f245ab7b8d2d0137b0caf2168a8", "4b2844009c6f5803f15b25ed412dc59b"
MASK, WORDS = "ae1ee961e3d9e7c0c0a7c62b3ac4ea0d", "e86a87a44e08fe0a29a158465e5294d0"
BLOCKS = "d4e8a7f153d614aef8b0ec3427dee7b3"
PLAN_DIGEST = "6f2eed80ccc18589625042cec3c6f6e0"
PLAN = (
    f'{{"base":{{"name":"old.safetensors","root":"{BASE_ROOT}"}},'
    f'"target":{{"name":"new.safetensors","root":"{TARGET_ROOT}"}},'
    f'"tensors":{{"a é":{{"dtype":"F32","shape":[1],"base":"{EQUAL}"}},'
    f'"b":{{"dtype":"BF16","shape":[3,3],"base":"{BASE}","target":"{TARGET}","changed":3,'
    f'"parts":{{"mask":"{MASK}","words":"{WORDS}","blocks":"{BLOCKS}"}}}}}}}}'
)
ESCAPED = PLAN.replace('"', '\\"')
HEADER = (
    '{"__metadata__":{"format":"pt","tailor_format":"tailor-patch/1","digest":"xxh3-128",'
    f'"plan":"{ESCAPED}","plan_digest":"{PLAN_DIGEST}"}},'
    '"p.00001.mask":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
    '"p.00001.words":{"dtype":"U16","shape":[3],"data_offsets":[2,8]},'
    '"p.00001.blocks":{"dtype":"U32","shape":[1],"data_offsets":[8,12]}}'
)
DATA = bytes.fromhex("0c0100804000feff03000000")


def tiny(folder: Path) -> Path:
    """The patch of a pair whose every bit is written here."""
    words = torch.tensor([0, 1, -32768, 0x7FC1, 5, 6, 7, 8, 9], dtype=torch.int16)
    other = torch.tensor([0, 1, 0, 0x7F81, 5, 6, 7, 8, -9], dtype=torch.int16)
    base = {"b": words.view(torch.bfloat16).reshape(3, 3), "a é": torch.tensor([1.5])}
    target = {"b": other.view(torch.bfloat16).reshape(3, 3), "a é": torch.tensor([1.5])}
    save(folder / "old.safetensors", base)
    save(folder / "new.safetensors", target)
    diff_checkpoints(
        folder / "old.safetensors", folder / "new.safetensors", folder / "p.tailor.safetensors"
    )
    return folder / "p.tailor.safetensors"


def header_and_data(path: Path) -> tuple[str, bytes]:
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:begin].decode(), raw[begin:]


def test_golden_bytes(tmp_path: Path) -> None:
    raw = tiny(tmp_path).read_bytes()
    assert raw == (4096 - 8).to_bytes(8, "little") + HEADER.encode().ljust(4096 - 8) + DATA


def test_golden_digests_are_those_of_the_document() -> None:
    reader = the_reader()
    words = (b"\0\0\1\0\0\x80\xc1\x7f", b"\0\0\1\0\0\0\x81\x7f")
    rest = b"\5\0\6\0\7\0\x08\0"
    base, target = words[0] + rest + b"\x09\0", words[1] + rest + b"\xf7\xff"
    found = reader["digest"]("BF16", [3, 3], base), reader["digest"]("BF16", [3, 3], target)
    assert found == (BASE, TARGET)
    assert reader["digest"]("F32", [1], b"\0\0\xc0\x3f") == EQUAL
    plain = reader["xxhash"].xxh3_128_hexdigest
    assert (plain(DATA[:2]), plain(DATA[2:8]), plain(DATA[8:])) == (MASK, WORDS, BLOCKS)
    assert plain(PLAN.encode()) == PLAN_DIGEST
    for root, digest in ((BASE_ROOT, BASE), (TARGET_ROOT, TARGET)):
        assert plain(f"a é\0{EQUAL}\nb\0{digest}\n".encode()) == root


def the_reader() -> dict[str, Any]:
    """The reader that the document prints, as a module's names."""
    section = DOCUMENT.read_text().split("## A reader in 30 lines")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


def test_the_reader_of_the_document_goes_there_and_back(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, target, patch = (path / "model.safetensors" if path.is_dir() else path for path in made)
    switch = the_reader()["switch"]

    def forms(tensors: dict[str, tuple[str, list[int], bytes]]) -> dict[str, Any]:
        return {n: (dtype, tuple(shape), raw) for n, (dtype, shape, raw) in tensors.items()}

    assert forms(switch(base, patch)) == content(target)
    assert forms(switch(target, patch, "target", "base")) == content(base)
    with pytest.raises(ValueError, match="must be"):
        switch(target, patch)


def test_safetensors_itself_reads_it(made: tuple[Path, Path, Path]) -> None:
    _, _, path = made
    with Patch.open(path) as patch, safe_open(path, "np") as file:
        names = set(file.keys())
        for at, entry in patch.plan.stored:
            words, blocks = (file.get_tensor(f"p.{at:05}.{part}") for part in ("words", "blocks"))
            mask = file.get_tensor(f"p.{at:05}.mask")
            names -= {f"p.{at:05}.{part}" for part in ("mask", "words", "blocks")}
            encoded = patch.encoded(entry.name)
            assert np.array_equal(mask, encoded.mask.numpy())
            assert words.tobytes() == encoded.words.numpy().tobytes()
            assert words.dtype.kind == "u"
            assert blocks.sum() == words.size == entry.changed
        assert names == set()


def test_the_patch_lists_what_it_changes(made: tuple[Path, Path, Path]) -> None:
    base, target = pair()
    with Patch.open(made[2]) as patch:
        assert patch.path == made[2]
        assert patch.nbytes == made[2].stat().st_size
        expected = {}
        for name, tensor in base.items():
            left, right = (side[name].reshape(-1).view(torch.uint8) for side in (base, target))
            width = tensor.element_size()
            differs = (left != right).view(-1, width).any(1) if left.numel() else left.bool()
            if int(differs.sum()):
                expected[name] = int(differs.sum())
        assert {name: entry.changed for name, entry in patch.items()} == expected
        assert list(patch) == sorted(expected)
        assert "same" not in patch
        assert [entry.name for entry in patch.plan.entries] == sorted(base)
        assert patch["layers.0.weight"].shape == (40, 33)
        with pytest.raises(KeyError):
            patch["same"]
        roots = patch.plan.base_root, patch.plan.target_root
        assert roots[0] == checkpoint_root({e.name: e.base for e in patch.plan.entries})
        assert roots[0] != roots[1]
        assert repr(patch).endswith(
            f"{len(expected)} of 9 tensors, {patch.plan.changed} of {patch.plan.words} words)"
        )


def llama(blocks: int, hidden: int, inner: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama-2 model."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for block in range(blocks):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        names = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{at}.{n}.weight": (hidden,) for n in names}
    return shapes


@pytest.mark.parametrize(
    ("form", "weights", "limit"),
    [((32, 4096, 11008, 32000), 6_738_415_616, 2.3e9), ((40, 5120, 13824, 32000), 13e9, 4.4e9)],
)
def test_size_of_a_large_models_patch(
    form: tuple[int, int, int, int], weights: float, limit: float
) -> None:
    """Every tensor patched at a tenth; the size follows from the headers."""
    entries = []
    for name, shape in sorted(llama(*form).items()):
        words = torch.Size(shape).numel()
        entry = PatchEntry(name, "BF16", shape, words // 10, "0" * 32, "1" * 32, ("2" * 32,) * 3)
        entries.append(entry)
    plan = PatchPlan("BASE", "TUNED", "xxh3-128", tuple(entries))
    assert plan.words >= weights
    assert plan.file_bytes <= limit
    assert plan.file_bytes >= plan.words * (1 / 8 + 2 / 10)


def test_the_size_in_the_plan_is_the_size_of_the_file(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    with Patch.open(path) as patch:
        assert patch.plan.file_bytes == path.stat().st_size == patch.nbytes
    text = json.loads(HEADER)["__metadata__"]["plan"]
    assert text == PLAN


def test_names_of_checkpoints_carry_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    out = tmp_path / "q.safetensors"
    plan = diff_checkpoints("./old.safetensors", tmp_path / "x" / ".." / "new.safetensors", out)
    assert (plan.base_name, plan.target_name) == ("old.safetensors", "new.safetensors")
    assert str(tmp_path).encode() not in out.read_bytes()
    assert out.read_bytes() == (tmp_path / "p.tailor.safetensors").read_bytes()
