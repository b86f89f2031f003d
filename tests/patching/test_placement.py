"""Every tensor on its way through a solve is made where the layer is: no card is needed to see it.

``meta`` stands for the card: an op on tensors of two devices fails there as it would on a card.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tailor_fast.calibration.moments import Moments
from tailor_fast.calibration.token_buffer import TokenBuffer
from tailor_fast.ops.decorate.factors import pack
from tailor_fast.patching import equations, solving
from tailor_fast.patching.equations import Equations, Layer

CARD = torch.device("meta")
ROWS, COLS = 300, 4200  # more than two panels


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and events that order nothing, and what cannot be read from ``meta``."""

    def stream(device: torch.device = CARD) -> SimpleNamespace:
        waits = {"wait_event": lambda _event: None, "wait_stream": lambda _other: None}
        return SimpleNamespace(device=device, **waits)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda _stream: None))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(equations, "damping_of", lambda *_: 0.1)
    monkeypatch.setattr(equations, "retain_scale", lambda *_: 0.5)
    monkeypatch.setitem(solving._CHUNK, "meta", 1 << 18)


def there(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CARD)


def moments(*, waiting: bool) -> Moments:
    """As a walk leaves them; with the differences in the machine's memory where they wait."""
    cross, error = (torch.empty(COLS, COLS, device="cpu" if waiting else CARD) for _ in range(2))
    return Moments(there(COLS, COLS), there(COLS), there(COLS), cross, error, there(COLS), 10)


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("retains", [False, True])
def test_the_equations(waiting: bool, retains: bool) -> None:
    old = moments(waiting=waiting) if retains else None
    made = Equations(moments(waiting=waiting), old, 0.01, 1.0)
    system = made.system(Layer(there(ROWS, COLS), there(ROWS, COLS), None, None, None))
    assert system.rhs is not None
    assert system.target_energy is not None
    assert {part.device for part in (system.gram, system.rhs, system.target_energy)} == {CARD}
    shifted = equations.answer_terms(
        there(ROWS, COLS), there(ROWS, COLS), there(ROWS), moments(waiting=waiting)
    )
    assert {part.device for part in shifted} == {CARD}


def test_what_is_written() -> None:
    base, tuned = (there(ROWS, COLS, dtype=torch.bfloat16) for _ in range(2))
    mask = there(ROWS, COLS, dtype=torch.bool)
    assert solving.write_patch(base, there(ROWS, COLS), mask).device == CARD
    solving.keep_(base, tuned, mask)
    assert base.device == CARD


@pytest.mark.parametrize("known", [False, True])
def test_a_factor(known: bool) -> None:
    gram, blocks = there(300, 300), there(3, 128, 128)
    packed = pack(gram, gram if known else None, blocks if known else [], 0.1)
    assert {part.device for part in packed} == {CARD}


def test_tokens_that_wait() -> None:
    waiting = TokenBuffer()
    assert list(waiting.put(there(100, 64), there(100, 64))) == []
    assert {part.device for pair in waiting.take() for part in pair if part is not None} == {CARD}
