"""The compiled form of the Triton kernels, where it can differ from the interpreted one.

Every operation on floats is an IEEE one of its own: no FMA, no approximate division or root, no
flushed subnormal.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.source_tree import ROOT

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to ask")

COMPILE = """
import json
from dataclasses import asdict
import triton
from triton.backends.compiler import GPUTarget
from tailor_fast.ops.select.triton import kernels
from tests.ops.aot.__main__ import source
names = {"classify_obs_row_block_bf16", "classify_salience_fp32_masked", "sums_tensor",
         "fold_all", "affine_row", "scores_obs_row_block_upper"}
for form in kernels():
    if form.name in names:
        target = GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source(form), target=target, options=asdict(form.launch))
        print(json.dumps([form.name, compiled.asm["ptx"]]), flush=True)
"""


def test_compiled_arithmetic_is_ieee() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert len(found) == 6
    for name, ptx in found.items():
        arithmetic = re.findall(
            r"\b((?:add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt)\.[\w.]*f(?:32|64))", ptx
        )
        assert arithmetic, name
        for instruction in arithmetic:
            assert re.fullmatch(r"(add|sub|mul|div|sqrt)\.rn\.f(32|64)", instruction), name
    assert "div.rn.f64" in found["classify_obs_row_block_bf16"]
    assert "sqrt.rn.f64" in found["affine_row"]
