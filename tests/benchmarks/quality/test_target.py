"""``target_old`` on trained pairs: its lines, kept and read back, and their table."""

from pathlib import Path

import torch

from benchmarks.quality import target, target_table, tinyllava
from benchmarks.quality.bench import Bench
from benchmarks.quality.cells import read
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.target import Asked, Pair
from tailor_fast.models.tokens import TOKEN_MASK


def line(target_old: str, density: str, old: str, new: str, tried: str) -> dict[str, str]:
    kept = {"old_kept": old, "new_kept": new, "models_tried": tried}
    return {"protocol": "hard-code", "target": target_old, "asked_density": density, **kept}


def test_the_table_counts_what_was_found_and_names_the_least(tmp_path: Path) -> None:
    rows = [
        line("", "0.1", "0.95", "0.97", ""),
        line("0.99", "", "0.99", "0.90", "3"),
        line("0.99", "", "1.00", "0.80", "4"),
        line("0.99", "", "", "", ""),
        line("0.95", "0.1", "", "", ""),
    ]
    target.save(rows, tmp_path / "target.csv", "a command")
    again = list(read(tmp_path / "target.csv"))
    assert [{name: row[name] for name in rows[0]} for row in again] == rows
    lines = target_table.table(again).splitlines()
    assert lines[2] == "| `hard-code` | defaults | 0.1 |  | 95.0 ± 0.0 | 95.0 | 97.0 ± 0.0 |  |"
    found = "2 of 3 | 99.5 ± 0.7 | 99.0 | 85.0 ± 7.1 | 3 to 4"
    assert lines[3] == f"| `hard-code` | 0.99 | searched | {found} |"
    assert lines[4] == "| `hard-code` | 0.95 | 0.1 | 0 of 1 |  |  |  |  |"


def test_a_pair_has_its_lines_once_each() -> None:
    keys = [tuple(one.columns().values()) for one in target.asked([128])]
    assert len(set(keys)) == len(keys) == 1 + 2 * len(target.TARGETS)
    assert Asked(128, None, 0.1).columns()["target"] == ""


def test_prepared_scenes_count_the_answers_alone() -> None:
    pair = Pair.__new__(Pair)
    pair.bench = Bench.__new__(Bench)
    pair.bench.family = PROTOCOLS["qformer-next"].family
    batches = pair._batches("list", 20, 0)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 4]
    for batch in batches:
        asked = batch["input_ids"][batch[TOKEN_MASK].bool()].view(len(batch["input_ids"]), -1)
        assert asked.shape[1] == 5
        assert bool((asked[:, -1] == tinyllava.EOS).all())
        assert torch.equal(batch["qformer_input_ids"], batch["input_ids"][:, 5:7])
