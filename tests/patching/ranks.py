"""Groups of processes: ``python -m tests.patching.ranks FOLDER``.

Imports once and forks 2, then 3 processes, which work off the cases below over gloo, and pairs that
run the command line as torchrun would have them. What each gave is left in ``FOLDER``, for
``test_processes`` to look at.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tailor_fast import (
    Recipe,
    RunOptions,
    calibrate,
    join_processes,
    patch_checkpoint,
    tailor_model,
)
from tailor_fast._core import window
from tailor_fast._core.errors import InputError, StorageError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast._core.progress import Silent
from tailor_fast.checkpoint import ResumeError
from tailor_fast.checkpoint.journal import read_journal
from tailor_fast.cli import main
from tests.patching.toys import Toy, pair, token_batches

RECIPES: dict[str, dict[str, Any]] = {
    "exact": {},
    "retained": {"retained": True},
    "sequential": {"decorate": "obs", "propagate": "sequential"},
    "official": {"decorate": "official", "propagate": "sequential"},
    "no propagation": {"propagate": "none"},
    "by layer": {"scope": "layer", "sensitivity": "diag"},
    "global": {"scope": "global", "normalize": "tensor"},
    "by block": {"group": "block"},
    "ratio": {"sensitivity": "ratio", "retained": True},
    "repeated": {"model": "repeated"},
    "no data": {"data": False},
}
BATCHES = 4
# On disk: an iteration more or less must not be seen, nor move few distinct tokens a score.
RECIPE = {"density": 0.2, "tol": 1e-7, "percdamp": 1.0}


class Repeated(Toy):
    """Runs its first block twice, so that its layers have no one input."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        x = self.layers[0](self.embed(input_ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tailored(name: str, batches: slice, processes: Processes = ALONE) -> Any:
    """Case ``name`` on some of the batches."""
    choices = dict(RECIPES[name])
    torch.manual_seed(3)
    base, tuned = pair(Repeated() if choices.pop("model", "") else Toy())
    old = token_batches(3, seed=6)[batches] if choices.pop("retained", False) else None
    new = token_batches(BATCHES)[batches] if choices.pop("data", True) else None
    recipe = Recipe(density=0.2, **choices)
    return tailor_model(base, tuned, new, recipe, retain_batches=old, processes=processes)


def failing(rank: int, error: BaseException) -> Callable[[Processes], None]:
    """A case in which one process fails while the others go on."""

    def case(processes: Processes) -> None:
        if processes.rank == rank:
            raise error
        tailored("exact", processes.share(BATCHES), processes)

    return case


def not_finite(processes: Processes) -> None:
    """The last batch, in the last process, overflows in the model."""
    base, tuned = pair(Toy())
    batches = [{"input_ids": b["input_ids"], "shift": 0.0} for b in token_batches(BATCHES)]
    batches[-1]["shift"] = float("inf")

    class Shifted(torch.nn.Module):
        def __init__(self, model: Toy) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, shift: float) -> torch.Tensor:
            x = self.model.embed(input_ids) + shift
            for layer in self.model.layers:
                x = layer(x)
            return x

    tailor_model(
        Shifted(base), Shifted(tuned), batches[processes.share(BATCHES)], processes=processes
    )


def different_recipes(processes: Processes) -> None:
    """Each process wants another density."""
    base, tuned = pair(Toy())
    recipe = Recipe(density=0.1 + 0.1 * processes.rank)
    tailor_model(base, tuned, token_batches(), recipe, processes=processes)


def no_batches(processes: Processes) -> None:
    """No process has any."""
    tailor_model(*pair(Toy()), [], processes=processes)


def all_fail(processes: Processes) -> None:
    """Every process for a reason of its own."""
    raise InputError(f"reason {processes.rank}")


FAILURES: dict[str, Callable[[Processes], None]] = {
    "input": failing(1, InputError("the file of process 1 is bad")),
    "storage": failing(0, StorageError("the disk of process 0 is full")),
    "unexpected": failing(1, ZeroDivisionError("no such number")),
    "not finite": not_finite,
    "different recipes": different_recipes,
    "no batches": no_batches,
    "all fail": all_fail,
}


def outcome(case: Callable[[Processes], None]) -> dict[str, Any]:
    """How a case ended here, and whether the next exchange works."""
    try:
        with join_processes() as processes:
            case(processes)
    except Exception as error:  # noqa: BLE001  whatever it is, is what the test looks at
        kind, code = type(error).__name__, getattr(error, "exit_code", None)
        return {"kind": kind, "code": code, "text": str(error)}
    return {"kind": None}


# How the processes reach each other, and what stands in the way of the memory that they share.
WAYS = ("memory", "no memory for it", "out of sight", "another memory there")


def drawn(rank: int) -> list[torch.Tensor]:
    """Tensors of one process: several slots, parts of one, another dtype."""
    generator = torch.Generator().manual_seed(rank)
    sizes = (1, 7, 3000, 255, 0, 1024, 1025)
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    return [*tensors, torch.randn(700, generator=generator, dtype=torch.float64)]


def exchanged(way: str) -> dict[str, bool]:
    """Sums and copies of tensors by one way, against those that this process forms by itself."""
    with pytest.MonkeyPatch.context() as patch, join_processes() as processes:
        if way == "no memory for it":
            patch.setattr(os, "posix_fallocate", failing_call)
        elif way == "out of sight" and processes.rank == 1:
            patch.setattr(window, "_map", lambda _address, _size: None)
        elif way == "another memory there" and processes.rank == 1:
            patch.setattr(window, "_map", a_wrong_token)
        patch.setattr(window, "SLOT_BYTES", 4096)
        sums, every = drawn(processes.rank), [drawn(rank) for rank in range(processes.count)]
        last = sums[2].clone()
        processes.add(sums)
        expected = [sum(parts[1:], parts[0]) for parts in zip(*every, strict=True)]
        processes.broadcast(last, processes.count - 1)
        small = torch.tensor([processes.rank], dtype=torch.int64)
        processes.broadcast(small, 1)
        return {
            "sums": all(
                torch.allclose(one, other, rtol=1e-6, atol=1e-6)
                for one, other in zip(sums, expected, strict=True)
            ),
            "same order": all(map(torch.equal, sums, expected)),
            "copies": torch.equal(last, every[-1][2]) and small.item() == 1,
            "shared": getattr(processes, "_window", None) is not None,
        }


def failing_call(*_args: object) -> None:
    """There is no room."""
    raise OSError("no room")


def a_wrong_token(address: bytes, size: int) -> Any:
    """As if the number of a process meant another one here."""
    return MAP(address[:-1] + bytes([address[-1] ^ 1]), size)


MAP = window._map


def on_disk(folder: Path, processes: Processes) -> None:
    """The two jobs over checkpoints, into ``folder``."""
    options = RunOptions(batch_size=2)
    data, pair_ = folder / "new.jsonl", (folder / "base", folder / "tuned")
    made = folder / f"{processes.count}"
    recipe = Recipe(**RECIPE)
    patch_checkpoint(
        *pair_,
        made / "out",
        recipe,
        calibration=data,
        retain=folder / "old.jsonl",
        options=options,
        processes=processes,
    )
    for kind in ("full", "diag"):
        place = made / f"{kind}.safetensors"
        calibrate(pair_[1], data, place, kind=kind, options=options, processes=processes)
    patch_checkpoint(
        *pair_,
        made / "again",
        recipe,
        statistics=made / "full.safetensors",
        options=options,
        processes=processes,
    )


class Breaking(Silent):
    """Ends a run behind its third group, once the journal names finished tensors.

    Args:
        out: output of the run.
        pids: processes that are killed; none are for Ctrl-C.
    """

    def __init__(self, out: Path, pids: list[int]) -> None:
        self._out, self._pids = out, pids

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        if done < 3:
            return
        end = time.monotonic() + 120
        while self._finished() == 0:
            if time.monotonic() > end:
                raise TimeoutError("no tensor was finished")
            time.sleep(0.01)
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        raise KeyboardInterrupt

    def _finished(self) -> int:
        journals = [path for path in self._out.parent.glob(".*") if path.is_file()]
        pasts = [read_journal(path) for path in journals]
        return sum(len(past.records) for past in pasts if past is not None)


def broken(folder: Path, name: str, processes: Processes) -> None:
    """One of the runs that make ``folder/broken/out`` together."""
    pids = [int(pid) for (pid,) in processes.gather(os.getpid())]
    out = folder / "broken" / "out"
    ends = name != "resumed" and processes.rank == 0 and processes.count == 2
    patch_checkpoint(
        *(folder / "base", folder / "tuned", out, Recipe(**RECIPE)),
        calibration=folder / "new.jsonl",
        retain=folder / "old.jsonl",
        options=RunOptions(batch_size=2, resume="auto" if name == "killed" else "required"),
        progress=Breaking(out, pids[::-1] if name == "killed" else []) if ends else None,
        processes=processes,
    )


def broken_member(folder: Path, name: str, rank: int) -> int:
    """One of two processes of such a run; "alone" is one by itself."""
    if name == "alone":
        try:
            broken(folder, name, ALONE)
        except ResumeError as error:
            (folder / "alone.txt").write_text(str(error))
        return 0
    place = f"file://{folder}/group-{name}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    end = outcome(lambda processes: broken(folder, name, processes))
    (folder / f"{name} {rank}.json").write_text(json.dumps(end))
    return 0


def member(folder: Path, rank: int, count: int) -> int:
    """All cases in one process."""
    place = f"file://{folder}/group-{count}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=count)
    made = folder / f"{count}"
    made.mkdir(exist_ok=True)
    with join_processes() as processes:
        for name in RECIPES:
            result = tailored(name, processes.share(BATCHES), processes)
            state = {key: value.contiguous() for key, value in result.model.state_dict().items()}
            save_file(state, made / f"{name} {rank}.safetensors")
            (made / f"{name} {rank}.json").write_text(json.dumps(result.report.to_dict()))
        on_disk(folder, processes)
    (made / f"exchanges {rank}.json").write_text(json.dumps({w: exchanged(w) for w in WAYS}))
    ends = {name: outcome(case) for name, case in FAILURES.items()}
    if rank < count - 1:  # the last one goes as if it were killed
        ends["killed"] = outcome(lambda processes: processes.wait())
    (made / f"ends {rank}.json").write_text(json.dumps(ends))
    return 0 if rank < count - 1 else 9


def command(folder: Path, case: str, port: int, rank: int) -> int:
    """The command line in one of two processes."""
    said = os.open(folder / f"{case} {rank}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 2)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launcher.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    return main([word.format(folder=folder) for word in COMMANDS[case]])


PATCH = ["patch", "{folder}/base", "{folder}/tuned", "-o", "{folder}/by command", "--device=cpu"]
COMMANDS = {
    "patch": [
        *(*PATCH, "--recipe={folder}/recipe.yaml", "--batch-size=2"),
        *("--calibration={folder}/new.jsonl", "--retain={folder}/old.jsonl"),
    ],
    "too long": [
        *(*PATCH[:4], "{folder}/failed", "--device=cpu", "--batch-size=2"),
        "--calibration={folder}/long.jsonl",
    ],
    "no data": [*PATCH[:4], "{folder}/failed", "--device=cpu"],
    "one card": [*PATCH[:4], "{folder}/failed", "--device=cuda:0"],
    "saved": [
        *(*PATCH[:4], "{folder}/saved", "--device=cpu", "--calibration={folder}/new.jsonl"),
        "--save-patch={folder}/beside.tailor.safetensors",
    ],
    "saved alone": [
        *(*PATCH[:4], "{folder}/saved", "--device=cpu", "--calibration={folder}/new.jsonl"),
        *("--save-patch={folder}/alone.tailor.safetensors", "--no-checkpoint"),
    ],
    "unknown option": [*PATCH, "--frobnicate"],
    "plan": ["plan", *PATCH[1:]],
}


def forked(function: Callable[..., int], *arguments: Any) -> int:
    """Run a function in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = function(*arguments)
        except BaseException:  # noqa: BLE001  a child must not return into the caller
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def together(children: list[int]) -> list[int]:
    """Exit codes of children."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def all_groups(folder: Path) -> None:
    """Every group, one after the other."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # no threads before a fork
    assert LlamaForCausalLM  # imported here, once
    codes: dict[str, list[int]] = {}
    for count in (2, 3):
        codes[str(count)] = together([forked(member, folder, r, count) for r in range(count)])
    (folder / "broken").mkdir()
    for name, ranks in (("killed", 2), ("alone", 1), ("stopped", 2), ("resumed", 2)):
        codes[name] = together([forked(broken_member, folder, name, r) for r in range(ranks)])
    for case in COMMANDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        codes[case] = together([forked(command, folder, case, port, rank) for rank in range(2)])
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    all_groups(Path(sys.argv[1]))
