"""Writing: what the format's library reads back, whatever the order of the writes."""

import itertools
import json
import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tailor_fast.checkpoint import (
    DTYPES,
    IncompleteError,
    MissingFileError,
    StagedCheckpoint,
    StagedFile,
    TensorHasher,
    TensorSpec,
    dtype_name,
    open_checkpoint,
    plan_layout,
    torch_dtype,
)
from tailor_fast.checkpoint.shardfile import Coverage
from tests.checkpoint.files import layout_of, run_python, some_tensors, tree
from tests.checkpoint.test_reader import bits, random_tensor

KNOWN = [name for name in DTYPES if torch_dtype(name) is not None]


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


@given(
    st.dictionaries(
        st.text("ab_\u00e9", min_size=1, max_size=9),
        st.tuples(st.sampled_from(KNOWN), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    st.integers(1, 300),
    st.randoms(use_true_random=False),
)
@settings(max_examples=30)
def test_round_trip_in_any_order(spec, limit: int, random) -> None:
    tensors = {
        n: random_tensor(torch_dtype(d), s, random.getrandbits(32)) for n, (d, s) in spec.items()
    }
    specs = [TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
    chunks = []
    for name, tensor in tensors.items():
        raw = bits(tensor)
        cuts = sorted({0, len(raw), *(random.randint(0, len(raw)) for _ in range(3))})
        chunks += [(name, lo, raw[lo:hi]) for lo, hi in itertools.pairwise(cuts)]
    random.shuffle(chunks)
    with TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        with StagedCheckpoint(out, plan_layout(specs, max_shard_bytes=limit)) as staged:
            for chunk in chunks:
                staged.write(*chunk)
            digests = staged.finish()
            staged.commit()
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        found = load_all(out)
        assert list(digests) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert bits(found[name]) == bits(tensor)
            hasher = TensorHasher(dtype_name(tensor.dtype), tensor.shape)
            hasher.update(tensor.contiguous())
            assert digests[name] == hasher.hexdigest()
        if tensors:
            with open_checkpoint(out) as checkpoint:
                assert checkpoint.warnings == ()


def test_transformers_finds_every_part(tmp_path: Path) -> None:
    tensors = some_tensors()
    with StagedCheckpoint(tmp_path / "out", layout_of(tensors, 30)) as staged:
        for name, tensor in tensors.items():
            staged.write(name, 0, tensor)
        staged.add_file("config.json", "{}\n")
        staged.commit()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values(), "config.json", "model.safetensors.index.json"}
    assert set(tree(tmp_path / "out")) == files
    assert len(files) == 5
    found = load_all(tmp_path / "out")
    assert all(bits(found[name]) == bits(tensor) for name, tensor in tensors.items())


def test_writes_from_many_threads(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(64, 1024) for i in range(6)}
    chunks = [(n, lo) for lo in range(0, 64 * 4096, 8192) for n in tensors]
    raw = {name: bits(tensor) for name, tensor in tensors.items()}
    with StagedCheckpoint(tmp_path / "out", layout_of(tensors, 600_000)) as staged:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for name, lo in chunks[number::4]:
                    staged.write(name, lo, raw[name][lo : lo + 8192])
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        digests = staged.finish()
        staged.commit()
    assert errors == []
    found = load_all(tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        hasher = TensorHasher("F32", (64, 1024))
        hasher.update(tensor)
        assert digests[name] == hasher.hexdigest()


def test_dirty_memory_is_written_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shardfile = "tailor_fast.checkpoint.shardfile"
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(f"{shardfile}._WINDOW", 1000)
    for step in ("start", "finish"):
        monkeypatch.setattr(
            f"{shardfile}.{step}_writeback",
            lambda fd, offset, count, step=step: calls.append((step, offset, count)),
        )
    tensors = {"a": torch.arange(100, dtype=torch.uint8).repeat(50)}
    with StagedCheckpoint(tmp_path / "out", layout_of(tensors), drop_cache=True) as staged:
        for begin in range(0, 5000, 500):
            staged.write("a", begin, tensors["a"][begin : begin + 500])
        staged.commit()
    windows = [(4096 + begin, 1000) for begin in range(0, 5000, 1000)]
    assert [call[1:] for call in calls if call[0] == "start"] == windows
    assert [call[1:] for call in calls if call[0] == "finish"] == windows[:-1]
    assert torch.equal(load_all(tmp_path / "out")["a"], tensors["a"])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=20))
@settings(max_examples=150)
def test_coverage(claims: list[tuple[int, int]]) -> None:
    coverage, taken = Coverage(), set[int]()
    for begin, count in claims:
        wanted = set(range(begin, begin + count))
        assert coverage.take(begin, begin + count) == wanted.isdisjoint(taken)
        taken |= wanted if wanted.isdisjoint(taken) else set()
    assert {byte for lo, hi in coverage.spans for byte in range(lo, hi)} == taken
    assert all(one[1] < two[0] for one, two in itertools.pairwise(coverage.spans))
    begin, end = coverage.missing(40)
    first = next(byte for byte in range(41) if byte not in taken)
    assert begin == first
    assert not taken & set(range(begin, end))
    assert end == 40 or end in taken


def test_missing_bytes_are_not_committed(tmp_path: Path) -> None:
    tensors = some_tensors()
    with StagedCheckpoint(tmp_path / "out", layout_of(tensors, 30)) as staged:
        for name, tensor in tensors.items():
            if name != "layer.bias":
                staged.write(name, 0, tensor)
        staged.write("layer.bias", 0, b"1234")
        staged.write("layer.bias", 12, b"12345678")
        with pytest.raises(IncompleteError, match=r"'layer.bias': bytes \[4, 12\] of 20") as caught:
            staged.commit()
        assert caught.value.exit_code == 73
        staged.write("layer.bias", 4, b"12345678")
        staged.commit()
    assert bits(load_all(tmp_path / "out")["layer.bias"]) == b"123412345678" + b"12345678"


def test_wrong_use(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4, dtype=torch.uint8), "b": torch.zeros(2, dtype=torch.uint8)}
    staged = StagedCheckpoint(tmp_path / "out", layout_of(tensors))
    staged.write("a", 1, b"12")
    for begin in (0, 1, 2):
        with pytest.raises(ValueError, match="of 'a' must be written once"):
            staged.write("a", begin, b"12")
    with pytest.raises(ValueError, match=r"range must lie in \[0, 4\] of 'a'; got \[3, 5\]"):
        staged.write("a", 3, b"12")
    with pytest.raises(ValueError, match=r"got \[-1, 1\]"):
        staged.write("a", -1, b"12")
    staged.write("b", 0, b"12")
    with pytest.raises(ValueError, match="of 'b' must be written once"):
        staged.write("b", 0, b"12")
    with pytest.raises(KeyError):
        staged.write("c", 0, b"12")
    with pytest.raises(TypeError, match="buffer must be a tensor"):
        staged.write("a", 3, "1")
    for name in ("", ".", "..", "a/b", "a\0"):
        with pytest.raises(ValueError, match="file name must be bare"):
            staged.add_file(name, b"")
    staged.add_file("x", b"1")
    for name in ("x", "model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(ValueError, match="file name must be new"):
            staged.add_file(name, b"")
    staged.write("a", 0, b"0")
    staged.write("a", 3, b"3")
    staged.commit()
    for use in (staged.commit, staged.finish, lambda: staged.add_file("y", b"")):
        with pytest.raises(ValueError, match="out: is closed"):
            use()
    assert load_all(tmp_path / "out")["a"].tolist() == list(b"0123")


@pytest.mark.parametrize("size", [0, 5, 9_000_001])
def test_copied_files(tmp_path: Path, size: int) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_bytes(os.urandom(size))
    (tmp_path / "link").symlink_to(source)
    with StagedCheckpoint(tmp_path / "out", plan_layout([])) as staged:
        staged.copy_file(source)
        staged.copy_file(tmp_path / "link", "other.json")
        staged.commit()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == source.read_bytes()
    assert (tmp_path / "out" / "other.json").read_bytes() == source.read_bytes()
    assert not (tmp_path / "out" / "other.json").is_symlink()


def test_copy_of_nothing(tmp_path: Path) -> None:
    with StagedCheckpoint(tmp_path / "out", plan_layout([])) as staged:
        with pytest.raises(MissingFileError, match="does not exist"):
            staged.copy_file(tmp_path / "gone")
        staged.commit()
    assert set(tree(tmp_path / "out")) == {"model.safetensors"}


def test_single_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    with StagedFile(tmp_path / "p.safetensors", layout_of(tensors)) as staged:
        for name, tensor in tensors.items():
            staged.write(name, 0, tensor)
        assert set(staged.record().files) == {"p.safetensors"}
        staged.commit()
    assert set(tree(tmp_path)) == {"p.safetensors"}
    found = load_file(tmp_path / "p.safetensors")
    assert all(bits(found[name]) == bits(tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="layout must be one file; got 3"):
        StagedFile(tmp_path / "q.safetensors", layout_of(tensors, 30))


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    code = """
        import os, sys
        from tailor_fast.checkpoint import StagedCheckpoint, StagedFile, TensorSpec, plan_layout
        specs = [TensorSpec(name, "U8", (1,)) for name in "ab"]
        for umask in sys.argv[1:]:
            os.umask(int(umask))
            with StagedCheckpoint(f"out{umask}", plan_layout(specs, max_shard_bytes=1)) as staged:
                staged.write("a", 0, b"1")
                staged.write("b", 0, b"2")
                staged.add_file("config.json", b"{}")
                staged.commit()
            with StagedFile(f"one{umask}", plan_layout([])) as staged:
                staged.commit()
    """
    umasks = (0o022, 0o077, 0o002)
    done = run_python(code, *umasks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for umask in umasks:
        out = tmp_path / f"out{umask}"
        assert out.stat().st_mode & 0o777 == 0o777 & ~umask
        files = [*out.iterdir(), tmp_path / f"one{umask}"]
        assert len(files) == 5
        assert {path.stat().st_mode & 0o7777 for path in files} == {0o666 & ~umask}
