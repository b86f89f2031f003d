"""A script with the authors' import structure and driver loop, run unchanged."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.authors import AuthorsOptions, authors_fasterprune, authors_gram
from tailor_fast.integrations import official
from tailor_fast.integrations.sparsegpt import SparseGPT
from tests.checkpoint.files import run_python
from tests.ops.decorate.test_official import check_sweep

ROOT = Path(__file__).resolve().parents[2]
ORIGINAL = 'raise RuntimeError("the original module was run")\n'
TRAINER = """
    from llava.train.sparsegpt import SparseGPT

    class Trainer:
        def prune(self, layer, base, batches, sparsity):
            gpt = SparseGPT(layer, base)
            def add(_, inp, out):
                gpt.add_batch(inp[0].data, out.data)

            handle = layer.register_forward_hook(add)
            for batch in batches:
                layer(batch)
            handle.remove()
            options = {"prunen": 0, "prunem": 0, "percdamp": 0.01, "blocksize": 128}
            assert gpt.fasterprune(sparsity, **options) is None
            gpt.free()
"""
SCRIPT = """
    import sys
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from llava.sparsegpt import SparseGPT
    from llava.train.llava_trainer import Trainer
    import llava.sparsegpt

    SPARSITY, OUT = 0.9, sys.argv[1] if sys.argv[1:] else "pruned.safetensors"

    def make():
        torch.manual_seed(0)
        base, tuned = nn.Linear(192, 48), nn.Linear(192, 48)
        tuned.weight.data = base.weight.data + 0.05 * torch.randn(48, 192)
        return base, tuned, [torch.randn(4, 30, 192) for _ in range(3)]

    if __name__ == "__main__":
        assert llava.sparsegpt.SparseGPT is SparseGPT
        assert isinstance(SparseGPT, type)
        base, tuned, batches = make()
        original = tuned.weight.data.clone()
        with torch.no_grad():
            Trainer().prune(tuned, base, batches, SPARSITY)
        trained = tuned.weight.data
        tuned.weight.data = original
        gpt = SparseGPT(tuned, base)
        for batch in batches:
            gpt.add_batch(batch, None)
        zeros, full, sparse, mask = gpt.fasterprune(SPARSITY)
        save_file({"trained": trained, "evaluated": tuned.weight.data, "mask": mask,
                   "base": base.weight.data, "tuned": original,
                   **{f"x{i}": batch for i, batch in enumerate(batches)}}, OUT)
"""


def upstream_checkout(place: Path, trainer: str = TRAINER, script: str = SCRIPT) -> Path:
    """Write a checkout of theirs; returns its script."""
    train = place / "llava" / "train"
    train.mkdir(parents=True)
    for folder in (train.parent, train):
        (folder / "__init__.py").touch()
        (folder / "sparsegpt.py").write_text(ORIGINAL)
    (train / "llava_trainer.py").write_text(textwrap.dedent(trainer))
    path = place / "main_model_tailor.py"
    path.write_text(textwrap.dedent(script))
    return path


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    return upstream_checkout(tmp_path / "checkout")


def start(*arguments: object) -> tuple[int, str, str]:
    code = """
        import runpy, sys
        sys.argv[0] = "official"
        runpy.run_module("tailor_fast.integrations.official", run_name="__main__")
    """
    done = run_python(code, *arguments, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_a_script_of_theirs(upstream: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    code, printed, errors = start(upstream, out)
    assert code == 0, errors
    assert [line.split()[0] for line in printed.splitlines()] == ["time", "error"] * 2
    saved = load_file(out)
    base, tuned = saved["base"], saved["tuned"]
    gram = authors_gram([saved[f"x{i}"] for i in range(3)])
    hessian = gram.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    error = [float(line.split()[1]) for line in printed.splitlines()[1::2]]
    for i, (name, weights) in enumerate((("trained", (0.8, 0.2)), ("evaluated", (0.5, 0.5)))):
        options = AuthorsOptions(score_weights=weights)
        expected, _ = authors_fasterprune(base, tuned, gram, options)
        assert torch.equal(saved[name] == base, expected == base)
        check_sweep(saved[name], error[i], tuned, base, hessian, expected)
    assert torch.equal(saved["mask"].bool(), saved["evaluated"] != base)


def test_another_mode(upstream: Path, tmp_path: Path) -> None:
    weights = {}
    for mode in ("official", "exact"):
        out = tmp_path / f"{mode}.safetensors"
        code, _, errors = start("--mode", mode, upstream, out)
        assert code == 0, errors
        weights[mode] = load_file(out)["evaluated"]
    assert not torch.equal(weights["official"], weights["exact"])


def test_a_script_that_imports_neither(tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text("print('ran')\n")
    code, printed, errors = start(script)
    assert (code, printed) == (1, "ran\n")
    assert "imported neither llava.sparsegpt nor llava.train.sparsegpt" in errors


def test_no_such_script(tmp_path: Path) -> None:
    code, _, errors = start(tmp_path / "nowhere.py")
    assert code == 65
    assert "no such script" in errors


def test_too_late(upstream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llava.sparsegpt", sys)
    with (
        pytest.raises(RuntimeError, match=r"llava.sparsegpt is imported already"),
        official.replaced(),
    ):
        pass


def test_the_replacement_ends_with_its_block(
    upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(upstream.parent)
    for name in ("llava", "llava.sparsegpt"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with official.replaced() as made:
        from llava.sparsegpt import SparseGPT as Replaced

        assert issubclass(Replaced, SparseGPT)
    assert made == ["llava.sparsegpt"]
    with pytest.raises(RuntimeError, match="the original module was run"):
        __import__("llava.sparsegpt")
