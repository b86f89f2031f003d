"""``diff``, ``apply``, ``revert``; ``inspect`` and ``verify`` of a patch: sentences, exit codes."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.running import CommandLine
from tests.patchfile.pairs import content, names_in, pair, save, save_pair

Made = tuple[Path, Path, Path]


@pytest.fixture
def made(tailor_fast: CommandLine, tmp_path: Path) -> Made:
    base, target = save_pair(tmp_path)
    patch = tmp_path / "task.tailor.safetensors"
    assert tailor_fast("diff", base, target, "-o", patch, "-q") == (0, "", "")
    return base, target, patch


def test_diff_says_what_differs(tailor_fast: CommandLine, made: Made) -> None:
    base, target, patch = made
    out = patch.with_name("other.tailor.safetensors")
    ran = tailor_fast("diff", base, target, "-o", out)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"out      {out}, ")
    assert lines[1].startswith("changed  30.")
    assert lines[1].endswith(" of 78,650 weights in 7 of 9 tensors")
    assert ran.err.splitlines()[-1].startswith("9/9 steps  ")
    assert out.read_bytes() == patch.read_bytes()
    assert tailor_fast("diff", base, target, "-o", out).code == 73
    assert (
        tailor_fast("diff", base, target, "-o", out, "--overwrite", "--digest", "sha256").code == 0
    )
    assert "target   target, sha256 " not in tailor_fast("inspect", patch).out
    assert "target   target, sha256 " in tailor_fast("inspect", out).out


def test_apply_and_revert(tailor_fast: CommandLine, made: Made, tmp_path: Path) -> None:
    base, target, patch = made
    there, back = tmp_path / "there", tmp_path / "back"
    ran = tailor_fast("apply", base, patch, "-o", there, "--out-shard-size", "5kB")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"out      {there}, 15")
    assert lines[1].endswith(" weights in 7 tensors")
    assert len(list(there.glob("model-*.safetensors"))) > 1
    assert tailor_fast("revert", there, patch, "-o", back, "-q") == (0, "", "")
    assert content(there) == content(target)
    assert content(back) == content(base)


def test_already_done_is_said_and_is_no_error(tailor_fast: CommandLine, made: Made) -> None:
    base, target, patch = made
    before = names_in(patch.parent)
    for command, source, what in (
        ("apply", target, "is what the patch makes already"),
        ("revert", base, "is what the patch was made from already"),
    ):
        ran = tailor_fast(command, source, patch, "-o", patch.parent / "out")
        assert ran.code == 0
        assert ran.out == f"{source}: {what}; nothing was written\n"
    assert names_in(patch.parent) == before


def test_a_wrong_base_is_65(tailor_fast: CommandLine, made: Made) -> None:
    _, _, patch = made
    tensors = pair()[0]
    tensors["same"].view(torch.uint8)[0] ^= 1
    other = save(patch.parent / "other.safetensors", tensors)
    ran = tailor_fast("apply", other, patch, "-o", patch.parent / "out.safetensors")
    assert (ran.code, ran.out) == (65, "")
    error = ran.err.splitlines()[-1]
    assert error.startswith(f"tailor-fast: error: {other}: tensor 'same': digest must be ")
    assert ", that of the patch's base; got " in error
    assert error.endswith("; give the very weights that the patch was made from")
    assert not (patch.parent / "out.safetensors").exists()


def test_usage_is_2(tailor_fast: CommandLine, made: Made) -> None:
    base, target, _ = made
    for arguments, sentence in (
        (("diff", base, target, "-o", "x.bin"), "x.bin: a patch file's name must end in"),
        (("diff", base, target), "Missing option '-o' / '--out'"),
        (("diff", base, target, "-o", "x", "--digest", "md5"), "Invalid value for '--digest'"),
        (("apply", base, "-o", "x"), "Missing argument 'PATCH'"),
        (("revert", base, target, "-o", "x", "--out-shard-size", "5x"), "a size must be like 5GB"),
    ):
        ran = tailor_fast(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert sentence in ran.err


def test_inspect_shows_what_is_stored(tailor_fast: CommandLine, made: Made) -> None:
    _, _, patch = made
    ran = tailor_fast("inspect", patch)
    assert ran.code == 0
    facts = dict(line.split(maxsplit=1) for line in ran.out.splitlines()[:6])
    assert facts["path"] == str(patch)
    assert facts["format"] == "tailor-patch/1"
    assert facts["base"].startswith("base, xxh3-128 ")
    rows = [line.split("  ") for line in ran.out.splitlines()[7:]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows[0] == ["tensors", "number", "form", "weights", "changed", "share", "size"]
    assert ["scale", "1", "F32 []", "1", "1", "100.00%", "9 bytes"] in rows
    assert len(rows) == 1 + 7
    forms = [row[2] for row in rows if row[:2] == ["layers.*.weight", "1"]]
    assert forms == ["BF16 [40, 33]", "BF16 [300, 257]"]
    assert "layers.1.weight" in tailor_fast("inspect", patch, "-v").out


def test_inspect_as_json(tailor_fast: CommandLine, made: Made) -> None:
    base, _, patch = made
    found = json.loads(tailor_fast("inspect", patch, "--json").out)
    assert found["facts"]["path"] == str(patch)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors["layers.0.weight"]["shape"] == [40, 33]
    assert tensors["scale"]["changed"] == 1
    assert len(tensors["scale"]["base"]) == 32
    found = json.loads(tailor_fast("inspect", base, "--json").out)
    assert found["shards"][0]["name"] == "model.safetensors"
    assert {tensor["name"] for tensor in found["tensors"]} == set(pair()[0])


def test_verify_of_a_patch(tailor_fast: CommandLine, made: Made) -> None:
    base, target, patch = made
    ran = tailor_fast("verify", patch)
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "verdict  holds"
    assert ran.out.splitlines()[1].endswith(" stored weights in 7 tensors")
    ran = tailor_fast("verify", patch, "--base", base)
    assert "base     the patch turns it into its target, bit for bit" in ran.out
    assert tailor_fast("verify", patch, "--base", target, "-q").code == 65
    raw = bytearray(patch.read_bytes())
    raw[-6] ^= 1
    patch.write_bytes(raw)
    ran = tailor_fast("verify", patch, "--quick")  # does not read the word that flipped
    assert (ran.code, ran.out.splitlines()) == (0, ["verdict  holds", "weights  not read"])
    ran = tailor_fast("verify", patch, "--base", base)
    assert ran.code == 1
    assert ran.out.splitlines()[0] == "verdict  1 violations"
    assert ran.out.splitlines()[-1].startswith(f"violated: {patch}: tensor 'steps': digest of its")
    patch.write_bytes(raw[:-1])
    assert tailor_fast("verify", patch, "--quick", "-q").code == 1
    ran = tailor_fast("verify", patch, "-q")
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.startswith(f"violated: {patch}: ")
    plain = base / "model.safetensors"
    ran = tailor_fast("verify", plain)
    assert (ran.code, ran.out) == (65, "")
    assert "is no patch file: tailor_format must be 'tailor-patch/1'; got 'none'" in ran.err
