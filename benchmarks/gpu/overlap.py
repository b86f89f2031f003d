"""Copies that run beside the card's work: the same bytes as on the CPU, whatever the streams do.

The card is kept busy meanwhile, so that a copy that waits for nothing comes too early.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.holding import Shape, require
from benchmarks.gpu.plan import DENSITY
from benchmarks.gpu.run import Run
from tailor_fast._core.backend import Backend
from tailor_fast._core.transfer import Outbox, own_stream, page_locked, panels, to_device
from tailor_fast.ops.select import select_patch

PANEL = 64  # rows of a piece
SENT = 6  # tensors that go through two rooms
BUSY = 2048  # columns of the products that keep the card at work; 64 on a CPU
NEEDED = ("pydantic", "greenlet")


def hold_panels(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``panels`` of a matrix in page-locked memory, each read behind a long queue of work."""
    torch.manual_seed(run.seed + index)
    matrix = torch.randn(shape).to(dtype)
    if run.device.type == "cuda":
        matrix = matrix.pin_memory()
    pieces = []
    for place, piece in panels(matrix, PANEL, run.device):
        _keep_busy(run)
        pieces.append(piece.clone())
        require(len(pieces[-1]) == place.stop - place.start, f"rows {place} have another number")
    require(torch.equal(torch.cat(pieces).cpu(), matrix), "not the words of the machine's memory")
    return f"{len(pieces)} pieces"


def hold_arrivals(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``to_device`` of page-locked memory that is dropped, and taken anew, before it is copied."""
    torch.manual_seed(run.seed + index)
    locked, expected, there = run.device.type == "cuda", [], []
    for _ in range(SENT):
        tensor = torch.empty(shape, dtype=dtype, pin_memory=locked).copy_(torch.randn(shape))
        expected.append(tensor.clone())
        _keep_busy(run)
        there.append(to_device(tensor, run.device).clone())
        del tensor
        torch.empty(shape, dtype=dtype, pin_memory=locked).fill_(float("nan"))
    for ours, tensor in zip(there, expected, strict=True):
        require(torch.equal(ours.cpu(), tensor), "not the words of the machine's memory")
    return f"{SENT} tensors"


def hold_outbox(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """``Outbox`` and a thread that reads, while the memory of what was sent is used again."""
    torch.manual_seed(run.seed + index)
    tensors = [torch.randn(shape).to(dtype) for _ in range(SENT)]
    outbox = Outbox()
    with ThreadPoolExecutor(1) as writer:
        written: list[Future[torch.Tensor]] = []
        for tensor in tensors:
            sent = tensor.to(run.device, copy=True)
            _keep_busy(run)
            sent.add_(0)  # behind the work
            there, arrived = outbox.send(sent)
            del sent
            torch.full(shape, float("nan"), dtype=dtype, device=run.device)  # over it, if it may
            if written:
                written[-1].result()
            written.append(writer.submit(_read, there, arrived))
        found = [future.result() for future in written]
    for ours, tensor in zip(found, tensors, strict=True):
        require(torch.equal(ours, tensor), "not the words that were sent")
    return f"{SENT} tensors"


def _read(there: torch.Tensor, arrived: Callable[[], object]) -> torch.Tensor:
    arrived()
    return there.clone()


def hold_threads(run: Run, shape: Shape, dtype: torch.dtype, index: int) -> str:
    """Threads that each bring a pair, patch it and take it back, by streams of their own."""
    torch.manual_seed(run.seed + index)
    # Triton's interpreter, which stands for a card in a dry run, takes one thread at a time.
    threads_at_once = 2 if run.device.type == "cuda" else 1
    count, size = 4, shape[0] * shape[1] * dtype.itemsize
    memory = memoryview(bytearray(2 * count * size))
    words = [
        torch.frombuffer(memory[at * size : (at + 1) * size], dtype=dtype).view(shape)
        for at in range(2 * count)
    ]
    pairs = list(zip(words[:count], words[count:], strict=True))
    for base, tuned in pairs:
        base.copy_(torch.randn(shape))
        tuned.copy_(base.float() + torch.randn(shape))
    expected = [_patched(base, tuned, "auto") for base, tuned in pairs]

    def work(base: torch.Tensor, tuned: torch.Tensor) -> None:
        with own_stream(run.device):
            there = [tensor.to(run.device) for tensor in (base, tuned)]
            _keep_busy(run)
            base.copy_(_patched(there[0], there[1], run.backend))

    with page_locked(memory, run.device), ThreadPoolExecutor(threads_at_once) as threads:
        for future in [threads.submit(work, *pair) for pair in pairs]:
            future.result()
    for (base, _), ours in zip(pairs, expected, strict=True):
        require(torch.equal(base, ours), "not the words of the CPU")
    return f"{count} pairs"


def _patched(base: torch.Tensor, tuned: torch.Tensor, backend: Backend) -> torch.Tensor:
    mask = select_patch(base, tuned, density=DENSITY, salience_weight=1.0, backend=backend)
    return torch.where(mask, tuned, base)


def _keep_busy(run: Run) -> None:
    """Work of some milliseconds on the current stream."""
    size = BUSY if run.device.type == "cuda" else 64
    x = torch.zeros(size, size, device=run.device)
    for _ in range(4):
        x = x @ x


def hold_checkpoint(run: Run) -> str:
    """``patch_checkpoint`` without data, on the device and on the CPU: the same files."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f"not run: {' and '.join(missing)} not installed"
    from benchmarks.pairs import Shape as Sizes
    from benchmarks.pairs import write_pair
    from tailor_fast import Recipe, RunOptions, patch_checkpoint

    with _folder() as home:
        sizes = (
            Sizes(1, 64, 96, 4, 4, 1 << 30, 128) if run.dry else Sizes(4, 1024, 2816, 8, 8, 1 << 26)
        )
        base, tuned = write_pair(home, sizes, run.seed % 2**31)
        outs: list[Path] = []
        for name in ("cpu", str(run.device)):
            outs.append(home / f"out-{len(outs)}")
            recipe = Recipe(density=DENSITY, salience_weight=1.0, decorate="none")
            patch_checkpoint(base, tuned, outs[-1], recipe, options=RunOptions(device=name))
        files = sorted(path.name for path in outs[0].glob("*.safetensors"))
        require(bool(files), "no file was written")
        for name in files:
            ours, theirs = (out.joinpath(name).read_bytes() for out in outs)
            require(ours == theirs, f"{name} has other bytes than on the CPU")
        return f"{len(files)} files, byte for byte"


@contextmanager
def _folder() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="tailor_fast-"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
