"""Base, target or neither: the digest of every tensor decides, and a refusal leaves nothing."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tailor_fast._core.errors import TailorError, UsageError
from tailor_fast.checkpoint import (
    ChangedError,
    Checkpoint,
    MismatchError,
    OutputExistsError,
    OutputLockedError,
    OutputPlaceError,
    StagedFile,
    TensorSpec,
    TransferError,
    plan_layout,
)
from tailor_fast.checkpoint.header import Limits
from tailor_fast.patchfile import (
    WrongStateError,
    apply_patch,
    diff_checkpoints,
    layout,
    revert_patch,
    verify_patch,
)
from tests.patchfile.pairs import Tensors, content, names_in, pair, save

Made = tuple[Path, Path, Path]
SMALLEST = "scale"  # of the tensors that change: asked first


def variant(folder: Path, change: Callable[[Tensors, Tensors], object]) -> Path:
    """A checkpoint that is base but for what ``change(base, target)`` makes of it."""
    base, target = pair()
    change(base, target)
    save(folder / "variant" / "model.safetensors", base)
    return folder / "variant"


def refused(
    run: Callable[..., object], source: Path, patch: Path, error: type[TailorError], sentence: str
) -> str:
    folder = patch.parent
    before = names_in(folder)
    with pytest.raises(error) as caught:
        run(source, patch, folder / "out")
    assert sentence in str(caught.value)
    assert names_in(folder) == before
    return str(caught.value)


def test_already_there(made: Made) -> None:
    base, target, patch = made
    before = names_in(patch.parent)
    done = apply_patch(target, patch, patch.parent / "out")
    back = revert_patch(base, patch, patch.parent / "out")
    assert (done.written, back.written) == (False, False)
    assert names_in(patch.parent) == before


@pytest.mark.parametrize("name", ["layers.1.weight", "same", "empty", SMALLEST, "eight.weight"])
def test_another_base_is_refused(made: Made, name: str) -> None:
    """One bit of one tensor, also of one that the patch leaves alone."""
    patch = made[2]

    def change(tensors: Tensors, _: Tensors) -> None:
        if tensors[name].numel():
            tensors[name].view(-1)[-1:].view(torch.uint8)[0] ^= 2
        else:
            tensors["bias"].view(torch.uint8)[0] ^= 1  # an empty tensor has no bit

    other = variant(patch.parent, change)
    named = name if name != "empty" else "bias"
    for run in (apply_patch, revert_patch):
        told = refused(run, other, patch, WrongStateError, "digest must be ")
        if run is apply_patch or name in ("same", SMALLEST):
            assert f"tensor '{named}': " in told
            assert told.startswith(f"{other}: ")
            assert "; got " in told
    with pytest.raises(WrongStateError):
        verify_patch(patch, base=other)


def test_half_patched_is_refused(made: Made) -> None:
    patch = made[2]

    def one(tensors: Tensors, tuned: Tensors) -> None:
        tensors["bias"] = tuned["bias"]

    def all_but_one(tensors: Tensors, tuned: Tensors) -> None:
        tensors.update({n: t for n, t in tuned.items() if n != "bias"})

    half = variant(patch.parent, one)
    told = "tensor 'bias': is the patch's target already, but 'scale' is still its base"
    refused(apply_patch, half, patch, WrongStateError, told)
    refused(revert_patch, half, patch, WrongStateError, "'bias' is still its target")
    most = variant(patch.parent, all_but_one)
    told = "tensor 'scale': is the patch's target already, but 'bias' is still its base"
    refused(apply_patch, most, patch, WrongStateError, told)
    told = "tensor 'bias': is the patch's base already, but 'scale' is still its target"
    refused(revert_patch, most, patch, WrongStateError, told)


def test_the_target_is_no_base_to_verify_against(made: Made) -> None:
    _, target, patch = made
    with pytest.raises(WrongStateError, match="is the patch's target already; give its base"):
        verify_patch(patch, base=target)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b, _: b.pop("bias"), "has 1 tensors of the patch less: 'bias'"),
        (lambda b, _: b.pop("same"), "has 1 tensors of the patch less: 'same'"),
        (
            lambda b, _: b.update(more=torch.zeros(1)),
            "has 1 tensors that the patch does not know: 'more'",
        ),
        (
            lambda b, _: b.update({"bias": b["bias"].view(7, 11)}),
            "tensor 'bias': must be F32 [77], as in the patch; got F32 [7, 11]",
        ),
        (
            lambda b, _: b.update({"bias": b["bias"].view(torch.int32)}),
            "tensor 'bias': must be F32 [77], as in the patch; got I32 [77]",
        ),
    ],
)
def test_other_tensors_are_refused(
    made: Made, change: Callable[[Tensors, Tensors], object], sentence: str
) -> None:
    other = variant(made[2].parent, change)
    for run in (apply_patch, revert_patch):
        refused(run, other, made[2], MismatchError, sentence)


def test_diff_refuses_what_does_not_match(made: Made) -> None:
    base, target, patch = made
    folder = patch.parent
    other = variant(folder, lambda b, _: b.update(bias=torch.zeros(5)))
    for left, right in ((base, other), (other, target)):
        with pytest.raises(MismatchError, match="shape must equal that of BASE"):
            diff_checkpoints(left, right, folder / "q.safetensors")
    with pytest.raises(UsageError, match=r"q\.patch: a patch file's name must end in .safetensors"):
        diff_checkpoints(base, target, folder / "q.patch")
    with pytest.raises(UsageError, match="digest must be one of xxh3-128, sha256; got 'md5'"):
        diff_checkpoints(base, target, folder / "q.safetensors", digest="md5")  # type: ignore[arg-type]  # wrong on purpose
    assert not list(folder.glob("q.*"))


def test_an_existing_output_stays_unless_overwritten(made: Made) -> None:
    base, target, patch = made
    out = patch.parent / "out"
    old = patch.read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        diff_checkpoints(base, target, patch)
    apply_patch(base, patch, out)
    kept = content(out)
    with pytest.raises(OutputExistsError, match="exists already"):
        apply_patch(base, patch, out)
    with pytest.raises(WrongStateError):
        apply_patch(
            variant(patch.parent, lambda b, _: b["bias"].add_(1)), patch, out, overwrite=True
        )
    assert content(out) == kept
    diff_checkpoints(base, target, patch, overwrite=True)
    assert patch.read_bytes() == old
    revert_patch(target, patch, out, overwrite=True)
    assert content(out) == content(base)
    for run, source in ((apply_patch, base), (revert_patch, target)):  # an input is no output
        with pytest.raises(OutputPlaceError, match="is, or lies in, the input"):
            run(source, patch, source, overwrite=True)
    with pytest.raises(OutputPlaceError):
        diff_checkpoints(base, target, base / "p.safetensors")


def test_one_file_has_no_shards(made: Made) -> None:
    base, _, patch = made
    with pytest.raises(UsageError, match="is one file, and so will OUT be; expected no shard size"):
        apply_patch(base / "model.safetensors", patch, patch.parent / "out", max_shard_bytes=100)


def test_more_tensors_than_a_header_can_name(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    base, target, patch = made
    before = names_in(patch.parent)
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 4000)
    with pytest.raises(UsageError, match="a header of 4000 bytes cannot name 9 tensors"):
        diff_checkpoints(base, target, patch.parent / "q.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr(layout, "LIMITS", Limits(100, 2000))
    with pytest.raises(UsageError, match="metadata of 2000 bytes cannot describe 9 tensors"):
        diff_checkpoints(base, target, patch.parent / "q.safetensors")
    assert names_in(patch.parent) == before


def test_a_second_writer_is_refused(made: Made) -> None:
    base, target, patch = made
    out = patch.parent / "out.safetensors"
    one = plan_layout([TensorSpec("a", "U8", (1,))], max_shard_bytes=None)
    with StagedFile(out, one), pytest.raises(OutputLockedError, match="is being written by"):
        diff_checkpoints(base, target, out)


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["base", "target", "patch"])
def test_an_input_that_changes_meanwhile(
    made: Made, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """Seen before the output has its name."""
    base, target, patch = made
    folder = patch.parent
    real = Checkpoint.check_unchanged

    times = itertools.count(1)  # the second run must find another change

    def touched(checkpoint: Checkpoint) -> None:
        if checkpoint.path == made[victim]:
            os.utime(checkpoint.shards[0].path, ns=(1, next(times)))
        real(checkpoint)

    before = names_in(folder)
    monkeypatch.setattr(Checkpoint, "check_unchanged", touched)
    runs: list[Callable[[], object]] = []
    if made[victim] != target:
        runs.append(lambda: apply_patch(base, patch, folder / "out"))
    if made[victim] != patch:
        runs.append(lambda: diff_checkpoints(base, target, folder / "q.safetensors"))
    for run in runs:
        with pytest.raises(ChangedError, match="was changed while it was being read"):
            run()
        assert names_in(folder) == before


def open_files() -> list[str]:
    """Numbers of this process's open files."""
    return names_in(Path("/proc/self/fd"))


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13])
def test_a_read_that_fails_in_the_thread(
    made: Made, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The sentence of the reader, from whichever thread; nothing is left, no thread, no file."""
    base, target, patch = made
    folder = patch.parent
    calls = 0
    real = Checkpoint.read_into

    def failing(self: Checkpoint, name: str, *args: object) -> int:
        nonlocal calls
        calls += 1
        if calls == at:
            raise TransferError("reading at byte 7 failed", path=self.path, tensor=name)
        return real(self, name, *args)  # type: ignore[arg-type]  # handed on

    before, open_before = names_in(folder), open_files()
    monkeypatch.setattr(Checkpoint, "read_into", failing)
    for run in (
        lambda: diff_checkpoints(base, target, folder / "q.safetensors"),
        lambda: apply_patch(base, patch, folder / "out"),
        lambda: verify_patch(patch),
    ):
        calls = 0
        with pytest.raises(TransferError, match="reading at byte 7 failed"):
            run()
    assert names_in(folder) == before
    assert open_files() == open_before


def test_side_files_of_a_lone_file(made: Made) -> None:
    base, target, patch = made
    out = patch.parent / "there.safetensors"
    apply_patch(base / "model.safetensors", patch, out)
    assert content(out) == content(target)
    assert load_file(out).keys() == pair()[1].keys()
    assert json.loads((base / "config.json").read_text()) == {"made": "base"}
