"""Damaged, forged and foreign patch files: each refused with its sentence, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tailor_fast._core.errors import InputError, TailorError
from tailor_fast.checkpoint import (
    MalformedError,
    MissingFileError,
    NotSafetensorsError,
    TruncatedError,
)
from tailor_fast.patchfile import (
    NotPatchError,
    Patch,
    apply_patch,
    is_patch,
    revert_patch,
    verify_patch,
)
from tailor_fast.patchfile.layout import text_digest
from tests.patchfile.pairs import names_in, pair
from tests.patchfile.test_format import tiny

Change = Callable[[dict[str, Any], dict[str, Any], bytearray], None]


def rewritten(path: Path, change: Change, *, seal: bool = True) -> Path:
    """The patch with its header, plan and data changed, written as a forger would.

    Args:
        path: patch file.
        change: takes header, plan and data, and changes them in place.
        seal: give the plan its right digest again.
    """
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:begin]), bytearray(raw[begin:])
    metadata = header["__metadata__"]
    before = metadata["plan"]
    plan = json.loads(before)
    change(header, plan, data)
    if metadata["plan"] == before:
        metadata["plan"] = json.dumps(plan, ensure_ascii=False, separators=(",", ":"))
    if seal and "plan_digest" in metadata:
        metadata["plan_digest"] = text_digest(metadata["plan"], "xxh3-128")
    head = json.dumps(header, ensure_ascii=False).encode()
    out = path.with_name("forged.tailor.safetensors")
    out.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return out


def refused(path: Path, error: type[TailorError], sentence: str) -> None:
    """``apply`` and ``revert`` refuse and leave nothing."""
    folder = path.parent
    before = names_in(folder)
    for run, source in ((apply_patch, "old"), (revert_patch, "new")):
        with pytest.raises(error) as caught:
            run(folder / f"{source}.safetensors", path, folder / "out.safetensors")
        assert sentence in str(caught.value)
        assert caught.value.exit_code == 65
        assert names_in(folder) == before


def violated(path: Path, sentence: str) -> None:
    (violation,) = verify_patch(path).violations
    assert str(path) in violation
    assert sentence in violation


def nothing(header: dict[str, Any], plan: dict[str, Any], data: bytearray) -> None:
    """Change nothing."""


def test_the_forger_can_write_a_sound_patch(tmp_path: Path) -> None:
    """Another writer's header, without our padding: what the tests below break is sound before."""
    path = rewritten(tiny(tmp_path), nothing)
    assert verify_patch(path, base=tmp_path / "old.safetensors").reached
    assert apply_patch(tmp_path / "old.safetensors", path, tmp_path / "out.safetensors").written


@pytest.mark.parametrize(
    ("at", "value", "sentence"),
    [
        (1, 0x03, "patch.mask must be zero beyond the last element; got 0x03 in byte 1"),
        (0, 0x0D, "patch.blocks must be the number of set bits per 65536 elements; got 3"),
        (0, 0x04, "patch.blocks must be the number of set bits per 65536 elements; got 3"),
        (4, 0x00, "patch.words must be free of zero words; got zero at index 1"),
        (8, 0x04, "block counts must lie in [0, 65536] and add up to 3 words; got a sum of 4"),
        (10, 0x01, "block counts must lie in [0, 65536] and add up to 3 words; got a sum of 65539"),
        (11, 0x80, "block counts must lie in [0, 65536]"),
    ],
    ids=["pad bit", "extra bit", "missing bit", "zero word", "count", "huge count", "negative"],
)
def test_parts_that_contradict_each_other(
    tmp_path: Path, at: int, value: int, sentence: str
) -> None:
    def change(header: dict[str, Any], plan: dict[str, Any], data: bytearray) -> None:
        data[at] = value

    path = rewritten(tiny(tmp_path), change)
    violated(path, sentence)
    refused(path, MalformedError, sentence)


@pytest.mark.parametrize("shift", [-70_000, 70_000])
def test_counts_outside_a_block_that_add_up(made: tuple[Path, Path, Path], shift: int) -> None:
    """Offsets made of them would leave the words."""
    base, _, patch = made

    def change(header: dict[str, Any], plan: dict[str, Any], data: bytearray) -> None:
        at = list(plan["tensors"]).index("layers.1.weight")
        begin, end = header[f"p.{at:05}.blocks"]["data_offsets"]
        counts = [int.from_bytes(data[i : i + 4], "little") for i in range(begin, end, 4)]
        changed = counts[0] + shift, counts[1] - shift
        data[begin:end] = b"".join(n.to_bytes(4, "little", signed=True) for n in changed)

    path = rewritten(patch, change)
    violated(path, "tensor 'layers.1.weight': block counts must lie in [0, 65536] and add up to")
    with pytest.raises(MalformedError, match="block counts must lie in"):
        apply_patch(base, path, path.parent / "out")
    assert not (path.parent / "out").exists()


def test_a_word_that_flipped(tmp_path: Path) -> None:
    """Nothing contradicts it but the digests."""

    def change(header: dict[str, Any], plan: dict[str, Any], data: bytearray) -> None:
        data[6] ^= 0x10

    path = rewritten(tiny(tmp_path), change)
    violated(path, "tensor 'b': digest of its words must be e86a87a44e08fe0a29a158465e5294d0; got")
    with pytest.raises(
        MalformedError, match=r"'b': the patch must turn it into digest 4b28.*; got"
    ):
        apply_patch(tmp_path / "old.safetensors", path, tmp_path / "out.safetensors")
    with pytest.raises(
        MalformedError, match=r"'b': the patch must turn it into digest e6ac.*; got"
    ):
        revert_patch(tmp_path / "new.safetensors", path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_words_that_lead_elsewhere_but_have_their_digest(tmp_path: Path) -> None:
    """The parts are sound; only applying them shows that they do not lead to the target."""

    def change(header: dict[str, Any], plan: dict[str, Any], data: bytearray) -> None:
        data[6] ^= 0x10
        plan["tensors"]["b"]["parts"]["words"] = text_digest_of(bytes(data[2:8]))

    path = rewritten(tiny(tmp_path), change)
    assert verify_patch(path).ok
    result = verify_patch(path, base=tmp_path / "old.safetensors")
    assert not result.reached
    assert "the patch must turn it into digest 4b28" in result.violations[0]


def text_digest_of(raw: bytes) -> str:
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(raw))


def set_plan(*keys: str, value: object) -> Change:
    """Set one field of the plan."""

    def change(header: dict[str, Any], plan: dict[str, Any], data: bytearray) -> None:
        place = plan
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


B = ("tensors", "b")
OTHER = "0" * 32
CANONICAL = "plan must be in canonical form"
PLANS = {
    "base digest": (set_plan(*B, "base", value=OTHER), CANONICAL),  # its root says otherwise
    "root": (set_plan("target", "root", value=OTHER), CANONICAL),
    "digest upper": (set_plan(*B, "base", value="E" * 32), "digest of 'b' must be"),
    "digest short": (set_plan(*B, "target", value="e"), "digest of 'b' must be"),
    "digest number": (set_plan(*B, "base", value=1), "plan is not what the format allows"),
    "equal": (set_plan(*B, "target", value="e6ac3f245ab7b8d2d0137b0caf2168a8"), "is stored, but"),
    "dtype": (set_plan(*B, "dtype", value="Q8"), "'b' is no tensor of the format"),
    "dtype list": (set_plan(*B, "dtype", value=[]), "'b' is no tensor of the format"),
    "width": (set_plan(*B, "dtype", value="F32"), "must be U32 [3], as the plan announces"),
    "negative": (set_plan(*B, "shape", value=[-3, -3]), "'b' is no tensor of the format"),
    "float": (set_plan(*B, "shape", value=[3.0, 3]), "'b' is no tensor of the format"),
    "huge": (set_plan(*B, "shape", value=[2**60]), "'b' is no tensor of the format"),
    "long": (set_plan(*B, "shape", value=[3, 33]), "must be U8 [13], as the plan announces"),
    "half byte": (set_plan("tensors", "a é", "dtype", value="F4"), "which is no whole number"),
    "changed": (set_plan(*B, "changed", value=2), "must be U16 [2], as the plan announces"),
    "too many": (set_plan(*B, "changed", value=10), "changed of 'b' must be in [0, 9]; got 10"),
    "bool": (set_plan(*B, "changed", value=True), "changed of 'b' must be in [0, 9]; got True"),
    "text": (set_plan(*B, "changed", value="3"), "changed of 'b' must be in"),
    "zero": (set_plan(*B, "changed", value=0), CANONICAL),
    "extra": (set_plan("extra", value=1), CANONICAL),
    "extra field": (set_plan(*B, "note", value=""), CANONICAL),
    "part": (set_plan(*B, "parts", value={}), "plan is not what the format allows"),
    "name": (set_plan("base", "name", value=7), CANONICAL),
    "no base": (set_plan("base", value=None), "plan is not what the format allows"),
    "tensors": (set_plan("tensors", value=[]), "plan is not what the format allows"),
    "row": (set_plan(*B, value=[]), "plan is not what the format allows"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_are_wrong(tmp_path: Path, case: str) -> None:
    change, sentence = PLANS[case]
    path = rewritten(tiny(tmp_path), change)
    violated(path, sentence)
    refused(path, MalformedError, sentence)


def set_metadata(key: str, value: str | None) -> Change:
    def change(header: dict[str, Any], plan: dict[str, Any], data: bytearray) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("format", "tf", "format 'pt'; got"),
        ("more", "x", "got 'digest', 'format', 'more', 'plan', 'plan_digest' and 1 more"),
        ("digest", None, "metadata must be"),
        ("digest", "md5", "digest must be one of xxh3-128, sha256; got 'md5'"),
        ("plan", "[]", "plan is not what the format allows"),
        ("plan", "{", "plan is not what the format allows"),
        ("plan", "[" * 100_000, "plan is not what the format allows"),
        ("plan", '{"base":NaN}', "plan is not what the format allows"),
    ],
)
def test_metadata_that_are_wrong(
    tmp_path: Path, key: str, value: str | None, sentence: str
) -> None:
    path = rewritten(tiny(tmp_path), set_metadata(key, value))
    violated(path, sentence)
    refused(path, MalformedError, sentence)


def test_a_plan_whose_digest_is_another(tmp_path: Path) -> None:
    path = rewritten(tiny(tmp_path), set_plan("base", "name", value="other"), seal=False)
    violated(path, "plan must have the digest '6f2eed80ccc18589625042cec3c6f6e0'; got")


def test_other_files_are_no_patches(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"a": pair()[0]["bias"]}, plain)
    later = rewritten(tiny(tmp_path), set_metadata("tailor_format", "tailor-patch/2"))
    pickle, missing = tmp_path / "x.safetensors", tmp_path / "missing"
    pickle.write_bytes(b"\x80\x02}")
    for path, error, sentence in (
        (plain, NotPatchError, "tailor_format must be 'tailor-patch/1'; got 'none'"),
        (later, NotPatchError, "tailor_format must be 'tailor-patch/1'; got 'tailor-patch/2'"),
        (pickle, NotSafetensorsError, "is a Python pickle"),
        (missing, MissingFileError, "does not exist"),
    ):
        for run in (Patch.open, verify_patch):
            with pytest.raises(error, match=sentence):
                run(path)
    assert [is_patch(p) for p in (plain, later, pickle, missing)] == [False, True, False, False]


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    raw = path.read_bytes()
    for size in (0, 7, 8, 100, 4095, 4096, 4097, len(raw) - 1):
        path.write_bytes(raw[:size])
        violated(path, "bytes")
        refused(path, TruncatedError, "bytes")
    path.write_bytes(raw + b"\0")
    violated(path, "last tensor's data")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """One bit of every byte of the text, every bit of the data, and some of the padding."""
    path = tiny(tmp_path)
    base = tmp_path / "old.safetensors"
    raw = bytearray(path.read_bytes())
    text = 8 + len(raw[8:4096].rstrip())
    flips = [(at, at % 8) for at in (*range(text), *range(text, 4096, 101))]
    flips += [(at, bit) for at in range(4096, len(raw)) for bit in range(8)]
    for at, bit in flips:
        raw[at] ^= 1 << bit
        path.write_bytes(raw)
        raw[at] ^= 1 << bit
        try:
            found = bool(verify_patch(path).violations)
        except InputError:
            found = True
        assert found, f"bit {bit} of byte {at}"
        if at < text and at % 10:
            continue
        with pytest.raises(InputError):
            apply_patch(base, path, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
    assert len(flips) > 1000
    assert names_in(tmp_path) == ["new.safetensors", "old.safetensors", "p.tailor.safetensors"]
