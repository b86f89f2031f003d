"""Compiles every kernel form of a module and prints what each needs, one JSON a line.

A process of its own, with whichever triton comes first on its path: where tests run, the kernels
are interpreted, and an interpreted kernel cannot be compiled.

    python -m tests.ops.aot tailor_fast.ops.gram.triton

Each kernel has one form more, whose integers are 1: a launch makes these constants of the compiler,
which have no methods; the interpreter does not.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailor_fast._core.launch import KernelForm
from tests.ops.aot.addresses import narrow_products
from tests.ops.aot.cards import CARDS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ALIGNED = [["tt.divisibility", 16]]


def source(form: KernelForm) -> ASTSource:
    """The form as a launch specialises it: constants by value, alignment where it holds."""
    names = form.kernel.arg_names
    given = set(form.signature) | set(form.constexprs)
    if given != set(names) or set(form.signature) & set(form.constexprs):
        raise ValueError(f"arguments {sorted(names)}, but the form describes {sorted(given)}")
    if not form.aligned <= set(form.signature):
        raise ValueError(f"{sorted(form.aligned - set(form.signature))} cannot be aligned")
    hash(tuple(form.constexprs.values()))  # a launch looks its constants up
    return ASTSource(
        form.kernel,
        {name: form.signature.get(name, "constexpr") for name in names},
        dict(form.constexprs),
        # In the order of the arguments: it is part of what the compiler's cache looks up.
        {(index,): ALIGNED for index, name in enumerate(names) if name in form.aligned},
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack, local and static shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run(
            [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    if found is None:
        raise ValueError(f"no resource usage in {done.stdout!r}")
    return dict(
        zip(("registers", "stack", "static", "local"), map(int, found.groups()), strict=True)
    )


def compile_form(form: KernelForm, capability: int) -> dict[str, Any]:
    """Compile one form for one card."""
    options = asdict(form.launch)
    kernel = triton.compile(source(form), target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "narrow": narrow_products(kernel.asm["ttir"]),
        **resources(kernel.asm["cubin"]),
    }


@cache
def forms(module: str) -> tuple[KernelForm, ...]:
    """The forms that a module names; a forked process has them already."""
    named: tuple[KernelForm, ...] = importlib.import_module(module).kernels()
    first = {form.kernel.__name__: form for form in reversed(named)}
    return named + tuple(filter(None, map(of_ones, first.values())))


def of_ones(form: KernelForm) -> KernelForm | None:
    """The form as it is compiled where every integer is 1; None where that changes nothing."""
    fixed = {param.name for param in form.kernel.params if param.do_not_specialize}
    integers = {
        name
        for name, kind in form.signature.items()
        if kind in ("i32", "i64") and name not in fixed
    }
    if not integers:
        return None
    return replace(
        form,
        name=f"{form.name}, integers 1",
        signature={name: kind for name, kind in form.signature.items() if name not in integers},
        constexprs={**form.constexprs, **dict.fromkeys(integers, 1)},
        aligned=form.aligned - integers,
    )


def described(module: str, task: tuple[int, int]) -> dict[str, Any]:
    """What is printed of one form (by number: kernels cannot be sent) on one card."""
    index, capability = task
    form = forms(module)[index]
    line: dict[str, Any] = {
        "form": form.name,
        "kernel": form.kernel.__name__,
        "capability": capability,
        "triton": triton.__version__,
    }
    try:
        return line | compile_form(form, capability)
    except Exception as error:  # noqa: BLE001  whatever the compiler raises is the result
        return line | {"error": f"{type(error).__name__}: {error}"}


def main(module: str) -> None:
    """Compile on every core; a form that fails is printed with its error, the others follow."""
    tasks = [(index, card) for index in range(len(forms(module))) for card in CARDS]
    workers = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for line in pool.imap(partial(described, module), tasks):
            print(json.dumps(line), flush=True)  # noqa: T201  the program's output


if __name__ == "__main__":
    main(sys.argv[1])
