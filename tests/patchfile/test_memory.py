"""Memory does not grow with a tensor."""

from pathlib import Path

from tests.checkpoint.files import run_python

MEGABYTES = 160

MEASURE = """
    import sys
    from pathlib import Path
    import torch
    from tailor_fast.checkpoint import StagedFile, TensorSpec, plan_layout
    from tailor_fast.patchfile import apply_patch, diff_checkpoints, verify_patch

    folder, words = Path(sys.argv[1]), int(sys.argv[2])
    piece = 1 << 20
    layout = plan_layout([TensorSpec("w", "BF16", (words,))], max_shard_bytes=None)
    for name, step in (("base", 0), ("target", 1)):
        with StagedFile(folder / f"{name}.safetensors", layout) as staged:
            for begin in range(0, words, piece):
                data = torch.arange(begin, begin + piece, dtype=torch.int64) % 30_000
                data += step * (data % 10 == 0)
                staged.write("w", 2 * begin, data.to(torch.int16))
            staged.commit()

    def resident(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(key))

    base, target, patch = (folder / f"{n}.safetensors" for n in ("base", "target", "patch"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = resident("VmRSS")
    plan = diff_checkpoints(base, target, patch)
    apply_patch(base, patch, folder / "there.safetensors")
    verify_patch(patch, base=base)
    print(plan.changed, resident("VmHWM") - before)
"""


def test_a_large_tensor_streams(in_memory: Path) -> None:
    words = MEGABYTES * 2**20 // 2
    done = run_python(MEASURE, in_memory, words)
    assert done.returncode == 0, done.stderr
    changed, grown = map(int, done.stdout.split())
    assert changed == len(range(0, words, 10))
    assert 0 < grown < MEGABYTES // 2, f"{grown} MiB beyond what was loaded"
