"""The ``select`` op on CUDA tensors: the masks of the CPU, bit for bit, on every backend."""

import itertools

import pytest
import torch

from tailor_fast.ops.select import TopKSelector, select_patch, topk_mask
from tailor_fast.ops.select.options import NORMALIZATIONS, SCOPES, SENSITIVITIES
from tests.ops.select.cases import DTYPES, make_pair, tied_pair

pytestmark = pytest.mark.gpu
BACKENDS = ["triton", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_same_mask_as_on_the_cpu(normalize: str, scope: str, backend: str) -> None:
    shapes = [(1, 1), (3, 129), (100, 1000), (512, 2048)]
    cases = itertools.product(shapes, (make_pair, tied_pair), SENSITIVITIES)
    for (shape, make, sensitivity), dtype in zip(cases, itertools.cycle(DTYPES), strict=False):
        pair = make(*shape)
        pair = [pair[0].to(dtype), pair[1].to(dtype), pair[2]]
        for w in (0.0, 0.5, 1.0):
            options = {
                "sensitivity": sensitivity,
                "salience_weight": w,
                "normalize": normalize,
                "scope": scope,
            }
            expected = select_patch(*pair, **options)
            ours = select_patch(*(x.cuda() for x in pair), **options, backend=backend)
            assert ours.is_cuda
            assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_shapes_of_a_layer(normalize: str, scope: str) -> None:
    pair = [x.cuda() for x in make_pair(4096, 11008, torch.bfloat16)]
    ours = select_patch(*pair, normalize=normalize, scope=scope, backend="triton")
    expected = select_patch(*pair, normalize=normalize, scope=scope, backend="reference")
    assert torch.equal(ours, expected)


def test_more_elements_than_32_bits_count() -> None:
    size = 2**32 + 5000
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip("needs 32 GiB of free GPU memory")
    values = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([3, 2**31, 2**32 - 1, 2**32, size - 1], device="cuda")
    values[places] = torch.tensor([5.0, 4, 3, 2, 1], device="cuda").bfloat16()
    for k in range(1, 6):
        mask = topk_mask(values, k, backend="triton")
        assert torch.equal(mask.nonzero()[:, 0], places[:k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype: torch.dtype) -> None:
    for values in (torch.randn(300_001), torch.randint(-4, 5, (70_000,)).float()):
        scores = values.to(dtype)
        for k in (0, 1, 7001, scores.numel()):
            ours = topk_mask(scores.cuda(), k, backend="triton")
            assert torch.equal(ours.cpu(), topk_mask(scores, k))


def test_same_bits_from_run_to_run() -> None:
    pair = [x.cuda() for x in make_pair(1024, 4096, torch.bfloat16)]
    first = select_patch(*pair, backend="triton")
    for _ in range(20):
        assert torch.equal(select_patch(*pair, backend="triton"), first)


def test_selector() -> None:
    tensors = {f"{i}": make_pair(300, 1150, DTYPES[i % 3], seed=i) for i in range(6)}
    found = {device: TopKSelector(0.1) for device in ("cpu", "cuda")}
    for device, selector in found.items():
        for name, triple in tensors.items():
            selector.observe(name, *(x.to(device) for x in triple))
        assert selector.finish()
    for name, triple in tensors.items():
        masks = [
            selector.mask(name, *(x.to(device) for x in triple)).cpu()
            for device, selector in found.items()
        ]
        assert torch.equal(*masks)


def test_poison_is_named() -> None:
    base, tuned, c = (x.cuda() for x in make_pair(600, 1000))
    tuned[500, 3] = float("nan")
    for normalize, scope in itertools.product(NORMALIZATIONS, SCOPES):
        with pytest.raises(ValueError, match=r"scores of 'w' must be finite; got nan at .* 500003"):
            select_patch(base, tuned, c, normalize=normalize, scope=scope, name="w")
