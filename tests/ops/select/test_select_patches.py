"""``select_patches`` beside ``select_patch``: the same masks, the same refusals."""

import pytest
import torch

from tailor_fast.ops.select import select_patch, select_patches
from tests.ops.select.cases import DTYPES, make_pair

OPS = torch.ops.tailor_fast
SHAPES = [(40, 300), (3, 130), (0, 7), (64, 128)]


def layers() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    triples = [make_pair(*shape, DTYPES[i % 3], seed=i) for i, shape in enumerate(SHAPES)]
    bases, tuneds, weights = zip(*triples, strict=True)
    return list(bases), list(tuneds), list(weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "block", "normalize": "tensor", "sensitivity": "weight", "density": 0.3},
        {"scope": "row", "salience_weight": 0.0, "normalize": "none", "sensitivity": "diag"},
        {"salience_weight": 1.0, "normalize": "tensor"},  # which ranks as "none" does
    ],
)
def test_each_mask_is_its_own(options) -> None:
    triples = layers()
    found = select_patches(*triples, **options)
    assert len(found) == len(SHAPES)
    for mask, base, tuned, weight in zip(found, *triples, strict=True):
        assert torch.equal(mask, select_patch(base, tuned, weight, **options))
    assert select_patches([], [], []) == []


def test_salience_needs_no_weights() -> None:
    bases, tuneds, _ = layers()
    found = select_patches(bases, tuneds, salience_weight=1.0)
    for mask, base, tuned in zip(found, bases, tuneds, strict=True):
        assert torch.equal(mask, select_patch(base, tuned, salience_weight=1.0))


def test_what_is_refused() -> None:
    bases, tuneds, weights = layers()
    for change, message in [
        ({"tuneds": tuneds[:2]}, "select_patches: tuneds must be 4 like bases; got 2"),
        ({"column_weights": weights[:1]}, "select_patches: column_weights must be 4 like bases"),
        ({"names": ["q"]}, "select_patches: names must be 4 like bases; got 1"),
        ({"density": 1.5}, "select_patches: density must be"),
        ({"scope": "layer"}, "TopKSelector finds one k over several tensors"),
        ({"column_weights": [-w for w in weights]}, "column_weight of 'b' must be finite and >= 0"),
    ]:
        given = {"bases": bases, "tuneds": tuneds, "column_weights": weights, "names": list("bcde")}
        with pytest.raises(ValueError, match="select_patches: ") as caught:
            select_patches(**given | change)
        assert message in str(caught.value)
    with pytest.raises(TypeError, match="select_patches: column_weight must be"):
        select_patches(bases, tuneds)
    elsewhere = [bases[0], *(base.to("meta") for base in bases[1:])]
    with pytest.raises(ValueError, match="select_patches: bases must be all on cpu; got one on m"):
        select_patches(elsewhere, [tuneds[0], *elsewhere[1:]], salience_weight=1.0)
    tuneds[1][2, 5] = float("inf")
    with pytest.raises(ValueError, match="select_patches: scores of 'c' must be finite; got inf"):
        select_patches(bases, tuneds, weights, names=list("bcde"))


def test_opcheck() -> None:
    bases, tuneds, weights = layers()
    options = "obs", 0.1, 0.5, "row_block", "tensor", ["a", "b", "c", "d"], "reference"
    torch.library.opcheck(OPS.select_patches.default, (bases, tuneds, weights, *options))
