"""A patch on a model in memory: all tensors or none, there and back, from task to task."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tailor_fast import Patch
from tailor_fast.checkpoint import ChangedError, MalformedError, MismatchError, TransferError
from tailor_fast.patchfile import WrongStateError, diff_checkpoints, modules
from tailor_fast.patchfile.parts import StoredParts
from tests.models.processors import text_tokenizer
from tests.ops.codec.words import random_pair
from tests.patchfile.pairs import FORMS, Tensors, pair, save
from tests.patchfile.test_damage import rewritten
from tests.patching.disk import llama, moved
from tests.patching.disk import save_pair as save_models

Made = tuple[Path, Path, Path]


class Holder(nn.Module):
    """A module whose state dict is the given tensors, parameters where they can be."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            if tensor.is_floating_point():
                place.register_parameter(last, nn.Parameter(tensor.clone()))
            else:
                place.register_buffer(last, tensor.clone())


def raw(module: nn.Module) -> dict[str, bytes]:
    """Every bit of a module."""
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in module.state_dict().items()
    }


@pytest.fixture
def patch(made: Made) -> Iterator[Patch]:
    with Patch.open(made[2]) as opened:
        yield opened


def test_there_and_back(patch: Patch) -> None:
    base, target = (Holder(tensors) for tensors in pair())
    model = Holder(pair()[0])
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        assert patch.apply_(model)
        assert raw(model) == raw(target)
        assert not patch.apply_(model)
        assert raw(model) == raw(target)
        assert patch.remove_(model)
        assert raw(model) == raw(base)
        assert not patch.remove_(model)
        assert raw(model) == raw(base)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == places
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_patch_is_taken_off_a_target_that_it_did_not_make(patch: Patch) -> None:
    model = Holder(pair()[1])
    assert patch.remove_(model)
    assert raw(model) == raw(Holder(pair()[0]))


def test_three_tasks_on_one_model_a_hundred_times(tmp_path: Path) -> None:
    shapes = {"layers.0.weight": (64, 48), "layers.1.weight": (300, 257), "norm": (64,)}
    base = {name: random_pair(shape, torch.bfloat16, 0)[0] for name, shape in shapes.items()}
    save(tmp_path / "base.safetensors", base)
    expected, patches = [], []
    for task in range(3):
        tuned = {}
        for name, tensor in base.items():
            flip = torch.rand(tensor.shape) < 0.1 * (task + 1)
            words = tensor.view(torch.int16)
            tuned[name] = torch.where(flip, words ^ (task + 1), words).view(torch.bfloat16)
        files = tmp_path / f"task{task}.safetensors", tmp_path / f"{task}.tailor.safetensors"
        save(files[0], tuned)
        diff_checkpoints(tmp_path / "base.safetensors", *files)
        patches.append(Patch.open(files[1]))
        expected.append(raw(Holder(tuned)))
    model = Holder(base)
    untouched = raw(model)
    order = torch.randint(0, 3, (100,)).tolist()
    for task in order:
        assert patches[task].apply_(model)
        assert raw(model) == expected[task]
        with pytest.raises(WrongStateError):  # one task at a time
            patches[(task + 1) % 3].apply_(model)
        assert patches[task].remove_(model)
    assert raw(model) == untouched
    for opened in patches:
        opened.close()


def test_what_was_proven_is_not_computed_again(
    patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Holder(pair()[0])
    calls: list[int] = []
    real = StoredParts.xor_

    def counted(self: StoredParts, words: torch.Tensor, begin: int) -> object:
        calls.append(begin)
        return real(self, words, begin)

    monkeypatch.setattr(StoredParts, "xor_", counted)
    patch.apply_(model)
    first = len(calls)
    patch.remove_(model)
    assert len(calls) - first == first / 2 == len(patch)


@pytest.mark.parametrize("name", ["layers.1.weight", "same", "scale", "steps"])
def test_one_wrong_bit_and_nothing_is_touched(patch: Patch, name: str) -> None:
    tensors = pair()[0]
    tensors[name].view(-1)[-1:].view(torch.uint8)[0] ^= 1
    model = Holder(tensors)
    before = raw(model)
    for run in (patch.apply_, patch.remove_):
        with pytest.raises(WrongStateError, match="digest must be"):
            run(model)
        assert raw(model) == before
    with pytest.raises(
        WrongStateError, match=f"tensor '{name}': digest must be [0-9a-f]+, that of"
    ):
        patch.apply_(model)


def test_half_patched_is_refused(patch: Patch) -> None:
    base, target = pair()
    model = Holder(base | {"bias": target["bias"]})
    before = raw(model)
    told = "tensor 'bias': is the patch's target already, but 'eight.weight' is still its base"
    with pytest.raises(WrongStateError, match=told):
        patch.apply_(model)
    assert raw(model) == before


def test_a_damaged_patch_touches_nothing(made: Made) -> None:
    """The last tensor's words flipped: found before the first tensor is changed."""

    def change(header: object, plan: object, data: bytearray) -> None:
        data[-5] ^= 1  # the last word of the last tensor; its count comes behind it

    model = Holder(pair()[0])
    before = raw(model)
    with Patch.open(rewritten(made[2], change)) as opened:
        with pytest.raises(MalformedError, match="tensor 'steps': the patch must turn it into"):
            opened.apply_(model)
        assert raw(model) == before


@pytest.mark.parametrize("error", [TransferError("reading failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_what_fails_half_way_is_undone(
    patch: Patch, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    monkeypatch.setattr(modules, "_RANGE", 65536)  # several ranges of the larger tensor
    model = Holder(pair()[0])
    patch.apply_(model)
    patch.remove_(model)  # proven: from here on, reading the words means changing the model
    before = raw(model)
    calls = 0
    real = StoredParts.xor_

    def failing(self: StoredParts, words: torch.Tensor, begin: int) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(self, words, begin)

    monkeypatch.setattr(StoredParts, "xor_", failing)
    with pytest.raises(type(error)):
        patch.apply_(model)
    assert calls == 2 * at - 1
    assert raw(model) == before


def test_an_undo_that_fails_says_so(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Holder(pair()[0])
    patch.apply_(model)
    calls = 0
    real = StoredParts.xor_

    def failing(self: StoredParts, words: torch.Tensor, begin: int) -> object:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise TransferError("the disk is gone")
        return real(self, words, begin)

    monkeypatch.setattr(StoredParts, "xor_", failing)
    with pytest.raises(TransferError, match="the module is half changed: load it again"):
        patch.remove_(model)


def test_a_patch_file_that_was_changed_is_not_used(made: Made) -> None:
    model = Holder(pair()[0])
    before = raw(model)
    opened = Patch.open(made[2])
    opened.apply_(model)
    opened.remove_(model)
    with made[2].open("r+b") as file:  # in place, not by a new file under the name
        file.seek(-8, 2)
        file.write(b"1")
    with pytest.raises(ChangedError, match="was changed while it was being read"):
        opened.apply_(model)
    assert raw(model) == before
    with pytest.raises(ChangedError):
        opened.close()


def test_other_forms_are_refused(patch: Patch) -> None:
    base = pair()[0]
    turned = base["layers.0.weight"].T.contiguous().T
    for tensors, sentence in (
        ({k: v for k, v in base.items() if k != "bias"}, "Holder has none of 1 tensors .* 'bias'"),
        (
            base | {"bias": torch.zeros(7)},
            r"'bias': must be F32 \[77\].*; got \[7\] float32 on cpu",
        ),
        (base | {"bias": base["bias"].double()}, r"got \[77\] float64 on cpu in Holder; load the"),
        (base | {"same": base["same"].float()}, "'same': must be F16"),
        (base | {"bias": base["bias"].to("meta")}, r"got \[77\] float32 on meta"),
    ):
        with pytest.raises(MismatchError, match=sentence):
            patch.apply_(Holder(tensors))
    model = Holder(base)
    model.layers.get_submodule("0").weight.data = turned
    with pytest.raises(MismatchError, match=r"got \[40, 33\] bfloat16 on cpu, strides \(1, 40\)"):
        patch.apply_(model)


def test_tensors_that_the_patch_leaves_may_be_missing(patch: Patch) -> None:
    left = {name for name in FORMS if name not in patch}
    base, target = pair()
    model = Holder({k: v for k, v in base.items() if k not in left} | {"own": torch.zeros(3)})
    assert patch.apply_(model)
    assert raw(model)["bias"] == raw(Holder(target))["bias"]


class TestSharedMemory:
    """Tensors of a module that are one in memory, and two on disk."""

    def pair(self, folder: Path, *, alike: bool) -> Patch:
        words = torch.arange(6, dtype=torch.float32)
        base = {"embed": words, "head": words.clone()}
        target = {"embed": words + 1, "head": words + 1 if alike else words + 2}
        save(folder / "base.safetensors", base)
        save(folder / "target.safetensors", target)
        out = folder / "p.safetensors"
        diff_checkpoints(folder / "base.safetensors", folder / "target.safetensors", out)
        return Patch.open(out)

    def module(self) -> nn.Module:
        module = Holder({"embed": torch.arange(6, dtype=torch.float32)})
        module.head = module.embed
        return module

    def test_are_changed_once(self, tmp_path: Path) -> None:
        model = self.module()
        with self.pair(tmp_path, alike=True) as patch:
            assert patch.apply_(model)
            assert model.embed.tolist() == [1, 2, 3, 4, 5, 6]
            assert patch.remove_(model)
            assert model.embed.tolist() == [0, 1, 2, 3, 4, 5]

    def test_are_refused_when_they_part(self, tmp_path: Path) -> None:
        model = self.module()
        told = "'head': shares memory with 'embed', but the patch changes them apart; untie them"
        with self.pair(tmp_path, alike=False) as patch, pytest.raises(MismatchError, match=told):
            patch.apply_(model)
        assert model.embed.tolist() == [0, 1, 2, 3, 4, 5]

    def test_are_refused_when_they_overlap(self, tmp_path: Path) -> None:
        model = Holder({})
        memory = torch.arange(9, dtype=torch.float32)
        model.register_buffer("embed", memory[:6])
        model.register_buffer("head", memory[3:])
        told = "'head': shares memory with 'embed'"
        with self.pair(tmp_path, alike=True) as patch, pytest.raises(MismatchError, match=told):
            patch.apply_(model)


def test_a_transformers_model_by_its_own_rules(tmp_path: Path) -> None:
    """Names on disk are those of ``save_pretrained``, tied and renamed as transformers does."""
    model = llama(dtype=torch.bfloat16)
    tuned = moved(model)
    base_dir, tuned_dir = save_models(tmp_path, model, tuned, text_tokenizer())
    out = tmp_path / "p.tailor.safetensors"
    diff_checkpoints(base_dir, tuned_dir, out)
    before = raw(model)
    with Patch.open(out) as patch:
        assert patch.apply_(model)
        assert raw(model) == raw(tuned)
        inner = model.model  # without its head, under other names than on disk
        with pytest.raises(MismatchError, match=r"has none of 1 tensors .*'lm_head.weight'"):
            patch.remove_(inner)
        assert patch.remove_(model)
    assert raw(model) == before


@pytest.mark.gpu
def test_on_a_gpu(patch: Patch) -> None:
    model = Holder(pair()[0]).cuda()
    assert patch.apply_(model)
    assert raw(model.cpu()) == raw(Holder(pair()[1]))
    assert patch.remove_(model.cuda())
    assert raw(model.cpu()) == raw(Holder(pair()[0]))
