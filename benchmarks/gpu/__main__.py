"""``python -m benchmarks.gpu PART``: see ``gpu.sh``, which builds the extension first."""

import argparse
import importlib
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

# Read when they are first needed: before torch makes a handle, and before a kernel is defined.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.run import DeviceLostError, Run
from benchmarks.gpu.table import Row, Table, slug
from benchmarks.results import ROOT

PARTS = ("check", "kernels", "block", "e2e")
SECONDS = 450.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes, on the CPU where there is no card"
    )
    parser.add_argument("--out", type=Path, help="folder of the table; default: results/<card>")
    parser.add_argument("--backend", default="triton", help="whose kernels; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no case begins later")
    parser.add_argument("--seed", type=int, help="of the inputs; default: a new one")
    parser.add_argument("--work", type=Path, help="folder for checkpoints of e2e, 41 GB for 7B")
    parser.add_argument(
        "--sanitized", action="store_true", help="check: one small case of each op, nothing else"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one part; 0 when every case gave its figure, 1 when one failed, 2 without a card."""
    begun = time.monotonic()
    given = parse(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not given.dry_run:
        print("torch sees no CUDA device; --dry-run goes through the motions", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    card = torch.cuda.get_device_name(device) if cuda else "none"
    out = given.out
    if out is None:
        dry_folder = Path(tempfile.gettempdir(), "tailor_fast-dry")
        out = dry_folder if given.dry_run else ROOT / "results" / slug(card)
    seed = secrets.randbits(32) if given.seed is None else given.seed
    name = f"{given.part}-dry" if given.dry_run else given.part
    print(f"{given.part} on {device} ({card}), seed {seed}", flush=True)
    with Table(out / f"{name}.csv", dry=given.dry_run, device=device) as table:
        run = Run(
            table,
            device,
            given.backend,
            given.dry_run,
            seed,
            begun + given.seconds,
            Clock(device, dry=given.dry_run),
        )
        try:
            importlib.import_module(f"benchmarks.gpu.{given.part}").run_part(run, given)
        except KeyboardInterrupt:
            table.add(Row(given.part, error="stopped before its end"))
        except DeviceLostError:
            pass  # it has a row
        print(f"{table.path}: {table.errors} failed, {table.missed} below their bar")
        return 1 if table.errors else 0


if __name__ == "__main__":
    sys.exit(main())
