"""Suspended forward passes: same results as plain ones, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tailor_fast._core.errors import InputError
from tailor_fast.calibration.groups import discover
from tailor_fast.calibration.lockstep import Lockstep, Site, Stream
from tailor_fast.calibration.spill import ActivationSpill
from tailor_fast.models import caller
from tests.patching.toys import Toy, pair, token_batches

NAMES = [f"layers.{i}.{name}" for i in range(3) for name in ("gate", "up", "down")]


def stream(model: nn.Module, batches=None, name: str = "toy") -> Stream:
    return Stream(name, model, batches or token_batches(), lambda m, batch: m(**batch))


def plain_inputs(model: nn.Module, name: str, batches) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hook = lambda _m, args: seen.append(args[0].clone())  # noqa: E731  a hook of one line
    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    handle.remove()
    return seen


def test_groups_are_layers_with_one_live_input() -> None:
    groups = discover(stream(Toy()), NAMES)
    assert [site.modules for site in groups.sites] == [
        pair_
        for i in range(3)
        for pair_ in ((f"layers.{i}.gate", f"layers.{i}.up"), (f"layers.{i}.down",))
    ]
    assert groups.repeated == groups.uncalled == ()


def test_equal_values_in_two_tensors_are_two_groups() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = self.a(x) + self.b(x.clone())
            x.add_(1.0)
            return y + self.c(x)  # the same tensor object, but changed in between

    groups = discover(Stream("c", Copies(), [torch.ones(2, 4)], lambda m, x: m(x)), ["a", "b", "c"])
    assert [site.modules for site in groups.sites] == [("a",), ("b",), ("c",)]


def test_batches_of_another_kind_add_their_groups_in_place() -> None:
    class Optional(Toy):
        def forward(self, input_ids, attention_mask=None, extra=None):
            x = self.embed(input_ids)
            x = self.layers[0](x)
            if extra is not None:
                x = self.layers[1](x)
            return self.head(self.layers[2](x))

    batches = token_batches(2)
    batches[1]["extra"] = torch.ones(1)
    groups = discover(stream(Optional(), batches), NAMES)
    order = [site.modules[0] for site in groups.sites]
    assert order == [f"layers.{i}.{name}" for i in range(3) for name in ("gate", "down")]


@pytest.mark.parametrize("on_device", [None, 0, 2000])
@pytest.mark.parametrize("budget", [None, 0, 1 << 20])
def test_every_lane_stops_with_the_input_of_a_plain_pass(
    budget: int | None, on_device: int | None, tmp_path: Path
) -> None:
    model, batches = Toy(), token_batches()
    one = stream(model, batches)
    sites = discover(one, NAMES, [f"layers.{i}" for i in range(3)]).sites
    spill = None if budget is None else ActivationSpill(budget, tmp_path, on_device)
    with Lockstep([one], sites, spill=spill) as lockstep:
        for site in sites:
            if not site.modules:
                lockstep.gather(site)
                continue
            expected = plain_inputs(model, site.modules[0], batches)
            for lane in lockstep.arrive("toy", site):
                assert torch.equal(lane.x, expected[lane.batch_index])
    if spill is not None:
        assert (spill.spilled_bytes > 0) == (budget == 0)
        assert (spill.parked_bytes > 0) == (budget != 0 and on_device is not None)
        assert spill.peak_waiting <= budget
        if budget == 0 or on_device is not None:
            assert spill.peak_resident <= (on_device or 0)
        assert list(tmp_path.iterdir()) == []
        spill.close()


def test_a_change_at_a_site_is_seen_behind_it() -> None:
    model, batches = Toy(), token_batches()
    one = stream(model, batches)
    sites = discover(one, NAMES).sites
    with Lockstep([one], sites) as lockstep:
        first = sites[0]
        assert len(list(lockstep.arrive("toy", first))) == len(batches)
        with torch.no_grad():
            model.layers[0].gate.weight.mul_(0.5)
        stopped = [lane.x.clone() for lane in lockstep.arrive("toy", sites[1])]
    for ours, expected in zip(stopped, plain_inputs(model, "layers.0.down", batches), strict=True):
        assert torch.equal(ours, expected)


def test_two_streams_go_side_by_side() -> None:
    base, tuned = pair(Toy())
    streams = [stream(base, name="base"), stream(tuned, name="tuned")]
    sites = discover(streams[1], NAMES).sites
    with Lockstep(streams, sites) as lockstep:
        for site in sites:
            pairs = list(lockstep.arrive_paired("base", "tuned", site))
            assert [(a.batch_index, b.batch_index) for a, b in pairs] == [(0, 0), (1, 1), (2, 2)]


def test_hooks_modes_and_lanes_are_gone_afterwards() -> None:
    model = Toy().train()
    one = stream(model)
    sites = (*discover(one, NAMES).sites, Site(6, behind="layers.2"))

    def interrupted() -> None:
        with Lockstep([one], sites, rerun=model) as lockstep:
            list(lockstep.arrive("toy", sites[2]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert one.lanes == []
    assert model.training
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model.layers[2])


def test_a_rerun_block_computes_its_output_anew() -> None:
    model, batches = Toy(), token_batches()
    one = stream(model, batches)
    sites = (
        Site(0, ("layers.0.gate", "layers.0.up")),
        Site(1, behind="layers.0"),
        Site(2, ("layers.1.gate", "layers.1.up")),
    )
    with Lockstep([one], sites, rerun=model) as lockstep:
        list(lockstep.arrive("toy", sites[0]))
        lockstep.gather(sites[1])
        with torch.no_grad():
            model.layers[0].down.weight.mul_(-1.0)
        stopped = [lane.x.clone() for lane in lockstep.arrive("toy", sites[2])]
    for ours, expected in zip(stopped, plain_inputs(model, "layers.1.gate", batches), strict=True):
        assert torch.equal(ours, expected)


def test_autocast_of_a_suspended_lane_does_not_leak() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.inside(x)
            return self.outside(y.float())

    batches = [torch.randn(3, 4) for _ in range(2)]
    one = Stream("casts", Casts(), batches, lambda m, x: m(x))
    sites = (Site(0, ("inside",)), Site(1, ("outside",)))
    with Lockstep([one], sites) as lockstep:
        for _ in lockstep.arrive("casts", sites[0]):
            assert not torch.is_autocast_enabled("cpu")
        list(lockstep.arrive("casts", sites[1]))
    assert not torch.is_autocast_enabled("cpu")


def test_another_order_in_a_later_batch_is_an_error() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.a(self.b(x))

    batches = [torch.ones(1, 4), -torch.ones(1, 4)]
    one = Stream("turns", Turns(), batches, lambda m, x: m(x))
    sites = discover(one, ["a", "b"]).sites
    with Lockstep([one], sites) as lockstep:
        list(lockstep.arrive("turns", sites[0]))
        with pytest.raises(InputError, match="batch 1: a is called again or out of order"):
            list(lockstep.arrive("turns", Site(2)))


def test_a_shared_input_that_is_shared_no_more_is_an_error() -> None:
    class Splits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + self.b(x if x.sum() > 0 else x + 1)

    batches = [torch.ones(1, 4), -torch.ones(1, 4)]
    one = Stream("splits", Splits(), batches, lambda m, x: m(x))
    sites = discover(one, ["a", "b"]).sites
    with Lockstep([one], sites) as lockstep:
        list(lockstep.arrive("splits", sites[0]))
        with pytest.raises(InputError, match="b was expected to read the same input as a"):
            list(lockstep.arrive("splits", Site(1)))


def test_a_pass_ends_where_the_head_begins() -> None:
    model = Toy()
    seen: list[str] = []
    for name in ("layers.2.down", "head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _m, _a, name=name: seen.append(name))
    call = caller(model)
    with torch.no_grad():
        assert call(model, token_batches(1)[0]) is None
    assert seen == ["layers.2.down"]
    assert len(model.head._forward_pre_hooks) == 1
