"""What was damaged is found, what is patched comes back, and nothing is lost on the way."""

from __future__ import annotations

import gc
import itertools
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailor_fast._core.errors import TailorError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import TensorSpec, open_checkpoint, plan_layout
from tailor_fast.checkpoint.writer import StagedFile
from tailor_fast.patchfile import apply_patch, diff_checkpoints, revert_patch
from tailor_fast.patching import checkpoints, outputs
from tailor_fast.patching.verify import verify_output
from tests.faults.harness import Lab

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool)
SIZES = (0, 1, 7, 63, 64, 65, 1000, 65535, 65536, 65537)
DENSITIES = (0.0, 1e-4, 0.1, 0.5, 1.0)


def bit_flips(base: Path, out: Path, flips: int, seed: int = 2) -> int:
    """Flip one bit of any file that the manifest of ``out`` has; returns how many were found."""
    chance, found = random.Random(seed), 0
    assert verify_output(out, base=base).violations == []
    records = outputs.read_output(out).manifest["output"]["files"]
    names = [name for name, record in sorted(records.items()) if record["bytes"]]
    for flip in range(flips):
        path = out / names[flip % len(names)]
        content = path.read_bytes()
        bit = chance.randrange(8 * len(content))
        with path.open("r+b") as file:
            file.seek(bit // 8)
            file.write(bytes([content[bit // 8] ^ 1 << bit % 8]))
        try:
            found += bool(verify_output(out, base=base).violations)
        except TailorError:
            found += 1
        path.write_bytes(content)
    assert verify_output(out, base=base).violations == []
    return found


@st.composite
def _pairs(draw: st.DrawFn) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors of any words (NaN payloads, -0 and subnormals are among them), and changed ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        dtype, size = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SIZES))
        width = 1 if dtype is torch.bool else dtype.itemsize
        words = torch.randint(0, 256, (size * width,), dtype=torch.uint8, generator=generator)
        changed = torch.rand(size, generator=generator) < draw(st.sampled_from(DENSITIES))
        other = torch.randint(0, 256, (size * width,), dtype=torch.uint8, generator=generator)
        if dtype is torch.bool:
            words, other = words % 2, other % 2
        mask = changed.repeat_interleave(width)
        pairs.append((words.view(dtype), torch.where(mask, other, words).view(dtype)))
    return pairs


def _save(path: Path, tensors: Sequence[torch.Tensor]) -> None:
    kinds = {torch.bool: "BOOL", torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}
    kinds |= {torch.float16: "F16", torch.bfloat16: "BF16"}
    specs = [TensorSpec(f"t{at}", kinds[t.dtype], tuple(t.shape)) for at, t in enumerate(tensors)]
    layout = plan_layout(specs, max_shard_bytes=None)
    with StagedFile(path, layout, overwrite=True) as staged:
        for at, tensor in enumerate(tensors):
            staged.write(f"t{at}", 0, tensor)
        staged.commit()


def _words(path: Path) -> dict[str, bytes]:
    with open_checkpoint(path) as file:
        found = {}
        for name, info in file.tensors.items():
            raw = bytearray(info.nbytes)
            file.read_into(name, raw)
            found[name] = bytes(raw)
        return found


def patches(folder: Path, cases: int) -> int:
    """``revert(apply(base)) == base`` and ``apply(base) == target``, bytewise."""
    names = ("base", "target", "patch", "applied", "back")
    base, target, patch, applied, back = (folder / f"{name}.safetensors" for name in names)
    done = 0

    @settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(_pairs())
    def check(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        nonlocal done
        _save(base, [pair[0] for pair in pairs])
        _save(target, [pair[1] for pair in pairs])
        diff_checkpoints(base, target, patch, overwrite=True)
        written = apply_patch(base, patch, applied, overwrite=True).written
        assert _words(applied if written else base) == _words(target)
        written = revert_patch(target, patch, back, overwrite=True).written
        assert _words(back if written else target) == _words(base)
        for path in (applied, back):
            path.unlink(missing_ok=True)
        done += 1

    check()
    return done


PEAK = """
    import sys
    from pathlib import Path
    import torch
    from tailor_fast.cli import main
    torch.set_num_threads(2)
    code = main([*sys.argv[1:], "-q"])
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(int(status) // 1024)
    sys.exit(code)
"""


def big_tensors(folder: Path, gigabytes: float) -> dict[str, int]:
    """Peak resident MiB of each command on a pair whose two tensors have so many gigabytes each."""
    rows = int(gigabytes * 2**30) // 2 // 8192
    names = ("model.up_proj.weight", "model.down_proj.weight")
    specs = [TensorSpec(name, "BF16", (rows, 8192)) for name in names]
    layout = plan_layout(specs, max_shard_bytes=None)
    generator = torch.Generator().manual_seed(1)
    chunk = torch.randn(2**22, generator=generator).bfloat16()
    for name, scale in (("base", 1.0), ("tuned", 1.01)):
        with StagedFile(folder / f"{name}.safetensors", layout) as staged:
            for tensor, begin in itertools.product(names, range(0, rows * 8192 * 2, chunk.nbytes)):
                part = chunk[: (rows * 8192 * 2 - begin) // 2]
                staged.write(tensor, begin, (part * scale).contiguous())
            staged.commit()
    base, tuned, patch = (folder / f"{name}.safetensors" for name in ("base", "tuned", "patch"))
    found = {}
    for command in (
        ["patch", base, tuned, "-o", folder / "out", "--max-ram", "256MiB"],
        ["diff", base, tuned, "-o", patch],
        ["apply", base, patch, "-o", folder / "applied.safetensors"],
    ):
        code = [sys.executable, "-c", textwrap.dedent(PEAK), *map(str, command)]
        done = subprocess.run(code, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[command[0]] = int(done.stdout.split()[-1])
        shutil.rmtree(folder / "out", ignore_errors=True)
    return found


def leaks(lab: Lab, runs: int) -> tuple[int, int]:
    """Growth of resident KiB and of open files over many runs in one process, after a few."""
    options = RunOptions(overwrite=True, max_shard_bytes=60_000)
    base, tuned = (lab.inputs / name for name in ("base", "tuned"))
    checkpoints.draw_report = lambda _report: b"a picture"
    lab.reset()

    def state() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() // 1024, len([*Path("/proc/self/fd").iterdir()])

    warm = min(runs, 50)
    for run in range(runs + warm):
        if run == warm:
            before = state()
        checkpoints.patch_checkpoint(base, tuned, lab.folder / "out", options=options)
    after = state()
    return after[0] - before[0], after[1] - before[1]
