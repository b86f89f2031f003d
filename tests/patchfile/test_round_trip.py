"""``diff``, ``apply`` and ``revert``: bit for bit, whatever the words, shapes, dtypes and files."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tailor_fast.checkpoint import open_checkpoint
from tailor_fast.ops.codec.layout import BLOCK
from tailor_fast.patchfile import apply_patch, diff_checkpoints, revert_patch, streams
from tests.checkpoint.files import save_sharded
from tests.ops.codec.words import DTYPES, random_pair
from tests.patchfile.pairs import Tensors, content, names_in, pair, save, save_pair

SHAPES = [(), (0,), (3, 0), (1,), (7,), (8,), (9,), (63,), (8, 8), (65,), (5, 13, 7)]
DENSITIES = [0.0, 1e-4, 0.1, 0.5, 1.0]
Form = tuple[tuple[int, ...], torch.dtype, float]
FORMS = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(DENSITIES))


def check_there_and_back(folder: Path, base_tensors: Tensors, target_tensors: Tensors) -> None:
    """Write a pair, go there and back through a patch, compare every byte."""
    names = ("base", "target", "patch", "there", "back")
    base, target, patch, there, back = (folder / f"{name}.safetensors" for name in names)
    save(base, base_tensors)
    save(target, target_tensors)
    plan = diff_checkpoints(base, target, patch)
    assert patch.stat().st_size == plan.file_bytes
    assert apply_patch(base, patch, there).written
    revert_patch(there, patch, back)
    assert content(base) == content(back) == content(save(folder / "base2", base_tensors))
    assert content(target) == content(there) == content(save(folder / "target2", target_tensors))


def test_two_thousand_tensors(in_memory: Path) -> None:
    number = itertools.count()
    cases = 0

    @settings(max_examples=450)
    @given(forms=st.lists(FORMS, min_size=5, max_size=6))
    @example(forms=[((), torch.bool, 1.0)])
    @example(forms=[((0,), torch.complex64, 1.0)])
    @example(forms=[])
    def check(forms: list[Form]) -> None:
        nonlocal cases
        cases += len(forms)
        folder = in_memory / str(next(number))
        both = {f"t{index}": random_pair(*form) for index, form in enumerate(forms)}
        base, target = ({name: two[side] for name, two in both.items()} for side in (0, 1))
        check_there_and_back(folder, base, target)
        shutil.rmtree(folder)

    check()
    assert cases >= 2000


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("density", [1e-5, 0.1, 1.0])
def test_many_blocks(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, density: float
) -> None:
    """Tensors of several blocks of the stream, next to small ones, and sizes on the edges."""
    block = BLOCK * dtype.itemsize
    monkeypatch.setattr(streams, "BLOCK_BYTES", block)
    shapes = [(BLOCK - 1,), (3,), (BLOCK,), (BLOCK + 1,), (5, BLOCK), (4 * BLOCK - 7,)]
    both = [random_pair(shape, dtype, density) for shape in shapes]
    both[1] = both[1][0], both[1][0]
    folder = in_memory / "blocks"
    base, target = ({f"t{at}": two[side] for at, two in enumerate(both)} for side in (0, 1))
    check_there_and_back(folder, base, target)
    shutil.rmtree(folder)


def test_blocks_of_the_real_size(in_memory: Path) -> None:
    words = streams.BLOCK_BYTES // 2
    base, target = random_pair((2 * words + 12345,), torch.bfloat16, 0.1)
    check_there_and_back(in_memory / "real", {"w": base}, {"w": target})
    shutil.rmtree(in_memory / "real")


def test_sub_byte_elements_are_bytes(tmp_path: Path) -> None:
    """Dtypes that torch has not: F4 and F6 are patched byte by byte."""
    header = (
        '{"four":{"dtype":"F4","shape":[6],"data_offsets":[0,3]},'
        '"six":{"dtype":"F6_E2M3","shape":[2,4],"data_offsets":[3,9]}}'
    )
    paths = tmp_path / "base.safetensors", tmp_path / "target.safetensors"
    for path, data in zip(paths, (bytes(9), b"\1\0\2" + b"\0\7\0\0\0\0"), strict=True):
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    patch, there = tmp_path / "p.safetensors", tmp_path / "there.safetensors"
    plan = diff_checkpoints(*paths, patch)
    assert [(entry.words, entry.changed) for entry in plan.entries] == [(3, 2), (6, 1)]
    apply_patch(paths[0], patch, there)
    assert content(there) == content(paths[1])


def test_a_model_directory_keeps_its_side_files(tmp_path: Path) -> None:
    base, target = save_pair(tmp_path)
    patch, there, back = tmp_path / "p.safetensors", tmp_path / "there", tmp_path / "back"
    diff_checkpoints(base, target, patch)
    apply_patch(base, patch, there)
    revert_patch(there, patch, back)
    assert content(there) == content(target)
    assert content(back) == content(base)
    for out in (there, back):
        assert names_in(out) == ["config.json", "model.safetensors"]
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_files_and_order_do_not_matter(tmp_path: Path) -> None:
    """The same tensors, otherwise ordered and distributed, have the same patch."""
    base, target = save_pair(tmp_path)
    first = tmp_path / "first.safetensors"
    diff_checkpoints(base, target, first)
    for side, tensors in zip(("base", "target"), pair(), strict=True):
        names = sorted(tensors, reverse=side == "base")
        halves = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
        shards = {file: {n: tensors[n] for n in part} for file, part in halves.items()}
        save_sharded(tmp_path / "other" / side, shards)
    second = tmp_path / "second.safetensors"
    diff_checkpoints(tmp_path / "other" / "base", tmp_path / "other" / "target", second)
    assert first.read_bytes() == second.read_bytes()

    out = tmp_path / "out"
    apply_patch(tmp_path / "other" / "base", first, out, max_shard_bytes=5000)
    assert content(out) == content(target)
    with open_checkpoint(out) as checkpoint:
        assert len(checkpoint.shards) > 1


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(
    tmp_path: Path, set_num_threads, made: tuple[Path, Path, Path], threads: int
) -> None:
    set_num_threads(threads)
    base, target, patch = made
    diff_checkpoints(base, target, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == patch.read_bytes()


def test_equal_checkpoints_have_an_empty_patch(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path)
    patch = tmp_path / "p.safetensors"
    plan = diff_checkpoints(base, base, patch)
    assert plan.changed == 0
    assert plan.base_root == plan.target_root
    assert patch.stat().st_size == plan.file_bytes
    with open_checkpoint(patch) as file:
        assert not file.tensors
    assert apply_patch(base, patch, tmp_path / "out").written
    assert content(tmp_path / "out") == content(base)


def test_sha256_instead(tmp_path: Path) -> None:
    base, target = save_pair(tmp_path)
    patch = tmp_path / "p.safetensors"
    plan = diff_checkpoints(base, target, patch, digest="sha256")
    assert {len(entry.base) for entry in plan.entries} == {64}
    apply_patch(base, patch, tmp_path / "out")
    assert content(tmp_path / "out") == content(target)
