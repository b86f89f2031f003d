"""The C++ backend against the reference, bit for bit: on every instruction set, on every path."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast._core.extension import load_extension
from tailor_fast.ops.select import reference
from tailor_fast.ops.select.options import NORMALIZATIONS, SCOPES, SENSITIVITIES, Scoring
from tailor_fast.ops.select.radix import KeyInterval, float_keys
from tests.backends import INSTRUCTION_SETS, instruction_set, needs_native
from tests.ops.select.cases import DTYPES, make_pair, tied_pair

pytestmark = needs_native
EXTENSION = load_extension()
if not isinstance(EXTENSION, ImportError):
    from tailor_fast.ops.select import native

INF = math.inf
STREAMED = 1  # `stream_from`: everything is


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with instruction_set(request.param):
        yield


def unaligned(x: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values ``offset`` elements into a larger storage."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype)
    room[offset:] = x.flatten()
    return room[offset:].view(x.shape)


def selected(
    pair: Any, scoring: Scoring, scope: str, density: float, **tuning: Any
) -> tuple[torch.Tensor, Any]:
    mask, fault, work = native._select_patch(
        *pair, scoring, scope, density, native.Tuning(**tuning)
    )
    assert fault is None
    return mask, work


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_have_the_same_bits(normalize: str, dtype: torch.dtype) -> None:
    for shape in [(3, 1153), (1, 1)]:
        base, tuned, c = make_pair(*shape, dtype)
        for sensitivity, w in itertools.product(SENSITIVITIES, (0.0, 0.3, 1.0)):
            scoring = Scoring(sensitivity, w, normalize)
            ours = native.score_pair(base, tuned, c, scoring)
            expected = reference.score_pair(base, tuned, c, scoring)
            assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


@settings(max_examples=80)
@given(st.data())
def test_masks_have_the_same_bits(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 300))
    dtype = data.draw(st.sampled_from(DTYPES))
    make = data.draw(st.sampled_from([make_pair, tied_pair]))
    base, tuned, c = make(rows, cols, seed=data.draw(st.integers(0, 10**6)))
    scale = 2.0 ** data.draw(st.sampled_from([0, -20, -130]))  # subnormals
    pair = [(x * scale).to(dtype) for x in (base, tuned)] + [c]
    pair = [unaligned(x, data.draw(st.integers(0, 3))) for x in pair]
    scoring = Scoring(
        data.draw(st.sampled_from(SENSITIVITIES)),
        data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        data.draw(st.sampled_from(NORMALIZATIONS)),
    )
    scope = data.draw(st.sampled_from(SCOPES))
    density = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    stream_from = data.draw(st.sampled_from([STREAMED, 1 << 20]))
    with instruction_set(data.draw(st.sampled_from(INSTRUCTION_SETS))):
        mask, _ = selected(pair, scoring, scope, density, stream_from=stream_from)
    assert torch.equal(mask, reference.select_patch(*pair, scoring, scope, density))


LAST = 2**63 - 1
Bracket = tuple[float, int, float, int]
BRACKETS: dict[str, Bracket] = {
    "too high": (60.0, 0, 50.0, LAST),
    "too low": (-50.0, 0, -60.0, LAST),
    "all": (INF, 0, -INF, LAST),
    "a score that is none": (0.25, 0, 0.25, LAST),
    "above all": (INF, 0, INF, LAST),
    "inverted": (-1.0, 0, 1.0, LAST),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bracket", BRACKETS.values(), ids=BRACKETS)
def test_a_missed_bracket_costs_passes_only(bracket: Bracket) -> None:
    pair = make_pair(60, 700, torch.bfloat16)
    scoring = Scoring("obs", 0.5, "row_block")
    mask, work = selected(pair, scoring, "tensor", 0.1, stream_from=STREAMED, bracket=bracket)
    # The counts refuse the bracket, or it holds too much to collect: two counting passes, one more.
    assert work.passes == 4
    assert torch.equal(mask, reference.select_patch(*pair, scoring, "tensor", 0.1))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_estimate_takes_one_pass(normalize: str) -> None:
    pair = make_pair(512, 2048, torch.bfloat16)
    scoring = Scoring("obs", 0.5, normalize)
    mask, work = selected(pair, scoring, "tensor", 0.1, stream_from=STREAMED)
    assert work.passes == 1
    assert 0 < work.candidates < mask.numel() // 16
    assert torch.equal(mask, reference.select_patch(*pair, scoring, "tensor", 0.1))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("density", [0.05, 0.3, 0.6, 0.99])
def test_heavy_ties(density: float) -> None:
    # Three scores in all: the cuts lie among equals, so that few are collected.
    pair = tied_pair(300, 1000)
    scoring = Scoring("diag", 1.0, "none")
    mask, work = selected(pair, scoring, "tensor", density, stream_from=STREAMED)
    assert work.passes == 1
    assert work.candidates < mask.numel() // 16
    assert torch.equal(mask, reference.select_patch(*pair, scoring, "tensor", density))


TIES = 60 * 1500  # one score; the best 9000 are the first ones


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("first", "last", "passes"),
    [
        (8000, 9500, 1),
        (9000, 9000, 1),
        (9001, 9500, 1),  # the first cut gives way to 9000
        (8000, 8600, 1),  # the last one too
        (6000, 8500, 4),  # both cuts before the threshold
        (12000, 14000, 4),  # both after it
        (0, LAST, 4),  # too many to collect
    ],
)
def test_cuts_among_equals(first: int, last: int, passes: int) -> None:
    # A cut within a stretch, here 1024 or 476 elements of a row, gives way to an end of it.
    pair = (torch.zeros(60, 1500), torch.ones(60, 1500), torch.ones(1500))
    scoring = Scoring("diag", 1.0, "none")
    bracket = (1.0, first, 1.0, last)
    tuning = {"stream_from": STREAMED, "bracket": bracket}
    mask, work = selected(pair, scoring, "tensor", 0.1, **tuning)
    assert work.passes == passes
    assert torch.equal(mask.flatten(), torch.arange(TIES) < TIES // 10)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("k", [1, 4000, 100_000, 196_000, 200_000])
def test_cuts_among_infinities(value: float, k: int) -> None:
    scores = torch.full((200_000,), value)
    scores[::50] = 1.0
    mask, _, _ = native._topk_mask(scores, k, native.Tuning(stream_from=STREAMED))
    assert torch.equal(mask, reference.topk_mask(scores, k))


def test_ties_that_do_not_fit_are_counted() -> None:
    zero, c = torch.zeros(100, 1000), torch.ones(1000)
    tuned = torch.ones(100, 1000)
    tuned[::7, ::3] = 2.0
    scoring = Scoring("diag", 1.0, "none")
    mask, work = selected(
        (zero, tuned, c), scoring, "tensor", 0.4, stream_from=STREAMED, bracket=(1.5, 0, 0.5, LAST)
    )
    assert work.passes == 4
    assert torch.equal(mask, reference.select_patch(zero, tuned, c, scoring, "tensor", 0.4))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_threads_do_not_change_the_mask(
    scope: str, normalize: str, set_num_threads: Callable[[int], None]
) -> None:
    pair = make_pair(80, 1100, torch.float16)
    scoring = Scoring("obs", 0.5, normalize)
    expected = reference.select_patch(*pair, scoring, scope, 0.1)
    for threads, stream_from in itertools.product((1, 3), (STREAMED, 1 << 20)):
        set_num_threads(threads)
        assert torch.equal(
            selected(pair, scoring, scope, 0.1, stream_from=stream_from)[0], expected
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_what_the_selector_calls(threads: int, set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(threads)
    for (base, tuned, c), normalize in itertools.product(
        (make_pair(90, 1100, torch.bfloat16), tied_pair(90, 1100)), NORMALIZATIONS
    ):
        scoring = Scoring("obs", 0.5, normalize)
        if normalize == "tensor":
            affine = native.tensor_affine(base, tuned, c, scoring)
            assert torch.equal(affine, reference.tensor_affine(base, tuned, c, scoring))
            scoring = scoring._replace(affine=affine)
        keys = float_keys(reference.score_pair(base, tuned, c, scoring)).flatten()
        low, high = (int(x) for x in keys.sort().values[[60_000, 90_000]])
        for interval in (
            KeyInterval(None, low, high),
            KeyInterval(low >> 16, low, low),
            KeyInterval(None, 2**31 - 1, 2**31 - 2),
            KeyInterval(None, 1 - 2**31, 2**31 - 1),
        ):
            counts = [torch.ones(65536, dtype=torch.int64) for _ in range(2)]
            rooms = [torch.empty(base.numel(), dtype=torch.int32) for _ in range(2)]
            (found, above), other = (
                module.count_keys_(mine, room, base, tuned, c, scoring, interval)
                for module, mine, room in zip((native, reference), counts, rooms, strict=True)
            )
            assert torch.equal(*counts)
            assert (found, above) == other
            assert torch.equal(*(room[:found] for room in rooms))
        for key, take in itertools.product((low, high, 2**31 - 1), (0, 5, 10**6)):
            left = [torch.tensor([take]), torch.tensor([take])]
            threshold = torch.tensor([key], dtype=torch.int32)
            masks = [
                module.mark_pair_(base, tuned, c, scoring, threshold, ties)
                for module, ties in zip((native, reference), left, strict=True)
            ]
            assert torch.equal(*masks)
            assert torch.equal(*left)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_every_kind(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, INF, -INF, 2.0**-149, -(2.0**-149), 6e-8, 1e-40, 65504.0, -1.0, 1.0]
    scores = torch.tensor(special).to(dtype).repeat(999)[:9973]
    for k, stream_from in itertools.product((0, 1, 900, 4000, 9972, 9973), (STREAMED, 1 << 20)):
        tuning = native.Tuning(stream_from=stream_from)
        mask, fault, _ = native._topk_mask(scores, k, tuning)
        assert fault is None
        assert torch.equal(mask, reference.topk_mask(scores, k))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("stream_from", [STREAMED, 1 << 20])
def test_the_first_fault_is_named(stream_from: int) -> None:
    tuning = native.Tuning(stream_from=stream_from)
    for normalize, scope in itertools.product(NORMALIZATIONS, SCOPES):
        base, tuned, c = make_pair(70, 1100)
        tuned[64, 1099] = INF
        tuned[69, 0] = math.nan
        scoring = Scoring("weight", 0.5, normalize)
        _, fault, _ = native._select_patch(base, tuned, c, scoring, scope, 0.1, tuning)
        assert fault == (64 * 1100 + 1099, INF)
    scores = torch.zeros(5000)
    scores[4321] = math.nan
    assert native._topk_mask(scores, 7, tuning)[1][0] == 4321  # type: ignore[index]  # None for small units only


def test_flushed_subnormals_do_not_leak_in(set_num_threads: Callable[[int], None]) -> None:
    scores = torch.arange(3000, dtype=torch.int32).view(torch.float32)  # all subnormal
    expected = torch.arange(3000) >= 2000
    set_num_threads(2)
    assert torch.set_flush_denormal(True)
    try:
        for stream_from in (STREAMED, 1 << 20):
            tuning = native.Tuning(stream_from=stream_from)
            assert torch.equal(native._topk_mask(scores, 1000, tuning)[0], expected)
    finally:
        torch.set_flush_denormal(False)
