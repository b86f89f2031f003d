"""The Triton backend against the reference, bit for bit; interpreted where there is no GPU."""

import itertools
import mmap
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast._core.backend import why_unavailable
from tailor_fast.ops.select import TopKSelector, reference, select_patch
from tailor_fast.ops.select.options import NORMALIZATIONS, SCOPES, SENSITIVITIES, Scoring
from tailor_fast.ops.select.radix import NO_KEY, KeyInterval, float_keys
from tests.ops.select.cases import DTYPES, make_pair, tied_pair

WHY_NOT = why_unavailable("triton", "cpu")
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    # numpy warns where the interpreter meets the zero spread of a unit, or a NaN on purpose.
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
if WHY_NOT is None:
    import triton
    import triton.language as tl

    from tailor_fast.ops.select import triton as fast
    from tailor_fast.ops.select.triton import masks, rows, scores
    from tailor_fast.ops.select.triton.masks import Tuning
    from tailor_fast.ops.select.triton.pair import Pair

INF, NAN = float("inf"), float("nan")
OPS = torch.ops.tailor_fast
SAMPLED = 1  # `bracket_from`: every unit is


def unaligned(x: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values ``offset`` elements into a larger storage."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype)
    room[offset:] = x.flatten()
    return room[offset:].view(x.shape)


@pytest.fixture
def descents(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per descent over all elements: empty where the bracket held."""
    found: list[int] = []
    real = masks._select_whole

    def spy(*args: Any) -> bool:
        found.append(1)
        return real(*args)

    monkeypatch.setattr(masks, "_select_whole", spy)
    return found


def assert_mask(pair: Any, scoring: Scoring, scope: str, density: float, **tuning: Any) -> None:
    mask = fast.select_patch(*pair, scoring, scope, density, Tuning(**tuning))
    assert torch.equal(mask, reference.select_patch(*pair, scoring, scope, density))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_scores_have_the_same_bits(normalize: str) -> None:
    cases = [((3, 1153), sensitivity, 0.3) for sensitivity in SENSITIVITIES]
    cases += [((3, 300), sensitivity, 0.7) for sensitivity in SENSITIVITIES]
    cases += [((1, 1), "obs", 0.5), ((3, 256), "weight", 0.0), ((140, 40), "obs", 1.0)]
    for (shape, sensitivity, w), dtype in zip(cases, itertools.cycle(DTYPES), strict=False):
        base, tuned, c = make_pair(*shape, dtype)
        scoring = Scoring(sensitivity, w, normalize)
        ours = fast.score_pair(base, tuned, c, scoring)
        expected = reference.score_pair(base, tuned, c, scoring)
        assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


@settings(max_examples=30)
@given(st.data())
def test_masks_have_the_same_bits(data: st.DataObject) -> None:
    row_count, cols = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 300))
    dtype = data.draw(st.sampled_from(DTYPES))
    make = data.draw(st.sampled_from([make_pair, tied_pair]))
    base, tuned, c = make(row_count, cols, seed=data.draw(st.integers(0, 10**6)))
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
    assert_mask(
        pair, scoring, scope, density, bracket_from=data.draw(st.sampled_from([SAMPLED, 1 << 16]))
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("shape", "scope"), [((32, 512), "tensor"), ((48, 256), "block"), ((49, 300), "block")]
)
def test_the_sample_takes_one_pass(
    shape: tuple[int, int], normalize: str, scope: str, descents: list[int]
) -> None:
    pair = make_pair(*shape, torch.bfloat16)
    assert_mask(pair, Scoring("obs", 0.5, normalize), scope, 0.1, bracket_from=SAMPLED)
    assert not descents


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.5, 0.999, 1.0])
def test_one_pass_at_any_density(density: float, descents: list[int]) -> None:
    base, tuned, _ = make_pair(64, 256)
    scoring = Scoring("obs", 1.0, "none")
    assert_mask((base, tuned, None), scoring, "tensor", density, bracket_from=SAMPLED)
    assert not descents


LEAST = -NO_KEY


@pytest.mark.parametrize(
    ("bracket", "expected"),
    [
        ((0, 5), 1),  # too low
        ((0x7F000000, 0x7F7FFFFF), 1),  # too high
        ((LEAST, NO_KEY), 1),  # all: more than the lists hold
        ((NO_KEY, LEAST), 1),  # inverted
        ((0, 0), 0),  # about the threshold, in every block: set below
    ],
)
@pytest.mark.parametrize("scope", ["tensor", "block"])
def test_a_bracket_costs_passes_only(
    scope: str, bracket: tuple[int, int], expected: int, descents: list[int]
) -> None:
    base, tuned, _ = make_pair(33, 300)
    scoring = Scoring("obs", 1.0, "none")
    bracket = bracket if expected else keys_about(base, tuned, 0.1, 0.02)
    assert_mask((base, tuned, None), scoring, scope, 0.1, bracket=bracket)
    assert len(descents) == expected


def keys_about(
    base: torch.Tensor, tuned: torch.Tensor, density: float, width: float
) -> tuple[int, int]:
    """Keys of salience around a density."""
    keys = float_keys((tuned - base).abs()).flatten().sort().values
    at = [int(len(keys) * (1 - density + side)) for side in (-width, width)]
    return int(keys[at[0]]), int(keys[at[1]])


@pytest.mark.parametrize(
    ("kept", "by_block"), [(1, False), (40, False), (41, True), (119, False), (120, False)]
)
def test_ties_in_lists_go_to_the_lowest_index(
    kept: int, by_block: bool, descents: list[int]
) -> None:
    # 120 equal scores in many tiles, ten higher ones; the interval holds the ties alone.
    base, tuned = torch.zeros(100, 256), torch.rand(100, 256) / 2
    places = torch.randperm(100 * 128)[:130]
    column = places % 128
    tuned[places // 128, column] = 1.0
    tuned[places[:10] // 128, column[:10]] = 2.0
    n = 100 * 128 if by_block else tuned.numel()
    key = int(float_keys(torch.tensor([1.0])))
    scope = "block" if by_block else "tensor"
    # Where the second block has no ties, its own counts do not prove its interval.
    scoring = Scoring("diag", 1.0, "none")
    density = (10 + kept + 0.5) / n
    assert_mask((base, tuned, None), scoring, scope, density, bracket=(key, key))
    assert len(descents) == by_block


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("scope", SCOPES)
def test_heavy_ties(scope: str, density: float) -> None:
    pair = tied_pair(60, 300)
    assert_mask(pair, Scoring("diag", 1.0, "none"), scope, density, bracket_from=SAMPLED)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_numbers_of_segments_beyond_32_bits(normalize: str) -> None:
    pair, scoring = make_pair(20, 300), Scoring("weight", 0.5, normalize)
    with mock.patch.object(Pair, "wide", True):
        for scope in ("tensor", "block"):
            assert_mask(pair, scoring, scope, 0.1, bracket_from=SAMPLED)


def test_offsets_beyond_32_bits() -> None:
    @triton.jit
    def probe(tuned_ptr, out_ptr, rows, cols, tile, order: tl.constexpr, wide: tl.constexpr):
        blocks = (cols + 127) // 128
        tile = tile + tl.program_id(0)
        x, _, _, valid, offset, _ = scores.tile_keys(
            None, tuned_ptr, None, None, rows, cols, rows * cols, blocks, 0, 0, tile, 0,
            scores.SCORES, scores.NO_NORM, True, False, order, wide, 16, True,
        )  # fmt: skip
        # The highest bits of the offset of the only score that is not 0.
        tl.store(out_ptr, tl.sum(tl.where(valid & (x > 0), offset >> 4, 0).to(tl.int64)))

    rows_, cols = 2**23 + 1, 512
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, 2 * rows_ * cols, flags=flags)  # unwritten pages take no memory
    values = torch.frombuffer(memory, dtype=torch.bfloat16)
    place = rows_ * cols - 100
    assert place > 2**32
    values[place] = 3.0
    out = torch.zeros(1, dtype=torch.int64)
    for order, wide in ((scores.BY_ROW.value, True), (scores.BY_ROW.value, False)):
        probe[(1,)](values, out, rows_, cols, place // 2048, order=order, wide=wide)
        assert int(out) == place >> 4


def test_long_rows_and_parts_of_them() -> None:
    base, tuned, c = make_pair(5, 300)
    tuned[:, ::3] = base[:, ::3] + 0.125
    with mock.patch.multiple(rows, LONGEST=128, SHORT=2048, KEPT=5000):
        for density, normalize in ((0.1, "row"), (0.34, "row_block")):
            assert_mask((base, tuned, c), Scoring("diag", 1.0, normalize), "row", density)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2048, 5000])
def test_scores_of_every_kind(dtype: torch.dtype, count: int) -> None:
    special = [0.0, -0.0, INF, -INF, 2.0**-149, -(2.0**-149), 6e-8, 1e-40, 65504.0, -1.0, 1.0]
    values = torch.tensor(special).to(dtype).repeat(999)[:count]
    for k in (0, 900, count - 1):
        for tuning in (Tuning(), Tuning(bracket_from=SAMPLED)):
            assert torch.equal(fast.topk_mask(values, k, tuning), reference.topk_mask(values, k))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (2, 3, 4)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    values = torch.randint(-3, 4, shape).half()
    for k in {0, 1, values.numel() // 2, values.numel()} & set(range(values.numel() + 1)):
        assert torch.equal(fast.topk_mask(values, k), reference.topk_mask(values, k))


def message_of(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(ValueError, match="must be") as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("bracket_from", [SAMPLED, 1 << 60])
def test_the_first_fault_is_named(bracket_from: int) -> None:
    tuning, weights = Tuning(bracket_from=bracket_from), itertools.cycle([0.5, 0.0, 1.0, 0.0, 0.7])
    faults = [(0, NAN), (1, INF), (0, -INF), (1, NAN)]
    for (normalize, scope), (where, value) in zip(
        itertools.product(NORMALIZATIONS, SCOPES), faults * 3, strict=True
    ):
        pair = [x.clone() for x in make_pair(20, 300)]
        pair[where][15, 299] = value
        pair[where][19, 0] = NAN
        scoring = Scoring("weight", next(weights), normalize, name="q_proj", first_index=1000)
        args = *pair, scoring, scope, 0.1
        ours = message_of(fast.select_patch, *args, tuning)
        assert ours == message_of(reference.select_patch, *args)
        assert "of 'q_proj' must be finite" in ours
        assert f"at linear index {1000 + 15 * 300 + 299}." in ours


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_overflow_is_refused(normalize: str) -> None:
    base, tuned, c = make_pair(5, 200)
    tuned[3, 7] = 1e30  # the delta is finite, its square is not
    args = base, tuned, c, Scoring("obs", 0.5, normalize), "tensor", 0.1
    assert message_of(fast.select_patch, *args) == message_of(reference.select_patch, *args)
    tuned[3, 7], base[3, 7] = 2e38, 0  # both terms are finite, their sum is not
    args = base, tuned, c / c * 2, Scoring("diag", 0.5, "none"), "tensor", 0.1
    assert "got inf at linear index 607" in message_of(fast.select_patch, *args)


def test_nan_scores_are_named() -> None:
    values = torch.zeros(5, 1000)
    values[2, 3] = values[4, 1] = -NAN
    for tuning in (Tuning(), Tuning(bracket_from=SAMPLED)):
        message = message_of(fast.topk_mask, values, 9, tuning)
        assert message == "topk_mask: scores must be free of NaN; got nan at linear index 2003"


@pytest.mark.parametrize(
    ("make", "normalize"), [*((make_pair, unit) for unit in NORMALIZATIONS), (tied_pair, "none")]
)
def test_what_the_selector_calls(make: Callable[..., Any], normalize: str) -> None:
    base, tuned, c = make(10, 300)
    scoring = Scoring("obs", 0.5, normalize)
    if normalize == "tensor":
        affine = fast.tensor_affine(base, tuned, c, scoring)
        assert torch.equal(affine, reference.tensor_affine(base, tuned, c, scoring))
        scoring = scoring._replace(affine=affine)
    keys = float_keys(reference.score_pair(base, tuned, c, scoring)).flatten()
    low, high = (int(x) for x in keys.sort().values[[2000, 2500]])
    for interval in (
        KeyInterval(None, low, high),
        KeyInterval(low >> 16, low, low),
        KeyInterval(None, NO_KEY, NO_KEY - 1),
        KeyInterval(None, LEAST, NO_KEY),
    ):
        counts = [torch.ones(65536, dtype=torch.int64) for _ in range(2)]
        rooms = [torch.empty(base.numel(), dtype=torch.int32) for _ in range(2)]
        (found, above), other = (
            module.count_keys_(mine, room, base, tuned, c, scoring, interval)
            for module, mine, room in zip((fast, reference), counts, rooms, strict=True)
        )
        assert torch.equal(*counts)
        assert (found, above) == other
        assert torch.equal(*(room[:found] for room in rooms))
    for key, take in itertools.product((low, high, NO_KEY), (0, 5, 10**6)):
        left = [torch.tensor([take]), torch.tensor([take])]
        threshold = torch.tensor([key], dtype=torch.int32)
        marked = [
            module.mark_pair_(base, tuned, c, scoring, threshold, ties)
            for module, ties in zip((fast, reference), left, strict=True)
        ]
        assert torch.equal(*marked)
        assert torch.equal(*left)


def test_faults_of_what_the_selector_calls() -> None:
    base, tuned, c = make_pair(20, 300)
    tuned[7, 70] = NAN
    scoring, counts = Scoring("obs", 0.5, "tensor"), torch.zeros(65536, dtype=torch.int64)
    plain = scoring._replace(normalize="none")
    threshold, ties = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    for name, args in (
        ("tensor_affine", (scoring,)),
        ("score_pair", (plain,)),
        ("mark_pair_", (plain, threshold, ties)),
    ):
        assert "nan at linear index 2170" in message_of(getattr(fast, name), base, tuned, c, *args)
    room = torch.empty(base.numel(), dtype=torch.int32)
    args = counts, room, base, tuned, c, plain, KeyInterval(None, 0, 1)
    assert "nan at linear index 2170" in message_of(fast.count_keys_, *args)


def test_the_selector() -> None:
    tensors = {f"{i}": make_pair(12, 150, DTYPES[i % 3], seed=i) for i in range(4)}
    found = {name: TopKSelector(0.1, backend=name) for name in ("triton", "reference")}
    for selector in found.values():
        for name, triple in tensors.items():
            selector.observe(name, *triple)
        assert selector.finish()
    for name, triple in tensors.items():
        ours, expected = (selector.mask(name, *triple) for selector in found.values())
        assert torch.equal(ours, expected)


def test_opcheck() -> None:
    base, tuned, c = make_pair(6, 140, torch.bfloat16)
    torch.library.opcheck(OPS.topk_mask.default, (base, 9, "triton"))
    options = "obs", 0.1, 0.5, "row_block", "tensor", "w", "triton"
    torch.library.opcheck(OPS.select_patch.default, (base, tuned, c, *options))
    mask = select_patch(base, tuned, c, backend="triton")
    assert torch.equal(mask, select_patch(base, tuned, c, backend="reference"))
