"""Protocols train what they say, and find it again."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality.protocols import PROTOCOLS, Protocol
from tests.benchmarks.quality.conftest import INSTANT


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_seeds_make_models_of_their_own(tmp_path: Path, family: str) -> None:
    pretraining = replace(INSTANT.pretraining, family=family)
    protocol = Protocol("small", "small", pretraining, INSTANT.finetuning)
    said: list[str] = []
    pairs = [protocol.make(tmp_path, 0, seed, said.append) for seed in (0, 1, 0)]
    assert pairs[0] == pairs[2]
    assert len({pair[0].fingerprint for pair in pairs}) == 1
    assert len({pair[1].fingerprint for pair in pairs}) == 2
    assert [line for line in said if "trained" in line] == [said[0], said[1], said[3]]
    base, tuned = (protocol.family.load(made.folder).state_dict() for made in pairs[0])
    changed = {name for name, tensor in base.items() if not tensor.equal(tuned[name])}
    trained = {"llava": "model.multi_modal_projector", "instructblip": "language_projection"}
    assert any(name.startswith(trained[family]) for name in changed)
    assert not any("vision" in name for name in changed)


def test_names_are_keys() -> None:
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
