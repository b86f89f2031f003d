"""The picture shows what the report says: read back from the figure and from the pixels."""

import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tailor_fast.patching.picture import draw_report

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def report(names: list[str], *, losses: bool = True) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "density": 0.05 + 0.001 * index,
            "loss": 0.2 * (index + 1) if losses else None,
            "loss_undecorated": 0.6 * (index + 1) if losses else None,
            "loss_reverted": 1.0 * (index + 1) if losses else None,
        }
        for index, name in enumerate(names)
    ]
    recipe = {"scope": "tensor", "decorate": "exact", "propagate": "asymmetric"}
    return {"recipe": recipe, "linears": rows, "targeted": 12345, "density": 0.07}


def blocks(count: int) -> list[str]:
    return [f"model.layers.{block}.mlp.{kind}" for block in range(count) for kind in KINDS]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_it_is_a_png_and_the_same_for_the_same_report() -> None:
    picture = draw_report(report(blocks(2)))
    assert picture == draw_report(report(blocks(2)))
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    assert pixels.shape[1] >= 1000
    assert (pixels != 255).any(axis=2).mean() > 0.05  # something is drawn


def test_every_layer_has_its_bar_and_its_two_points(figures: list[Figure]) -> None:
    body = report(["projector.linear_1", *blocks(2)])
    draw_report(body)
    density, loss = figures[0].axes
    heights = {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height()
        for container in density.containers
        for bar in container
    }
    assert [heights[place] for place in range(15)] == [
        pytest.approx(100 * row["density"]) for row in body["linears"]
    ]
    bare, patch = (points.get_offsets() for points in loss.collections[1:])
    assert np.asarray(bare)[:, 1].tolist() == pytest.approx([0.6] * 15)
    assert np.asarray(patch)[:, 1].tolist() == pytest.approx([0.2] * 15)
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["bare mask, median 0.600", "patch, median 0.200"]
    assert [tick.get_text() for tick in loss.get_xticklabels()] == ["", "0", "1"]
    assert {"projector", "model.layers"} <= {text.get_text() for text in loss.texts}
    title = figures[0].get_suptitle()
    assert title.startswith("7.00% of 12,345 weights kept in 15 layers")


def test_layers_without_losses_are_left_out_below(figures: list[Figure]) -> None:
    body = report(blocks(1))
    body["linears"][2].update(loss=None, loss_undecorated=None, loss_reverted=None)
    body["linears"][3].update(loss=0.0, loss_undecorated=0.0, loss_reverted=0.0)
    draw_report(body)
    places = np.asarray(figures[0].axes[1].collections[1].get_offsets())[:, 0]
    assert places.tolist() == [0, 1, 4, 5, 6]


def test_without_statistics_there_is_one_part(figures: list[Figure]) -> None:
    body = report(blocks(1), losses=False)
    body["recipe"]["decorate"] = "none"
    draw_report(body)
    assert len(figures[0].axes) == 1
    assert "propagate" not in figures[0].get_suptitle()


def test_a_large_model_stays_readable(figures: list[Figure]) -> None:
    towers = [f"vision.layers.{block}.{kind}" for block in range(24) for kind in ("fc1", "fc2")]
    draw_report(report([*towers, *blocks(80)]))
    figure = figures[0]
    assert figure.get_size_inches()[0] <= 22
    ticks = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert len(ticks) <= 45
    assert ticks.count("0") == 2  # each list of blocks begins with its first


def test_many_kinds_of_layers_share_the_last_colour(figures: list[Figure]) -> None:
    draw_report(report([f"part_{index}" for index in range(40)]))
    density = figures[0].axes[0]
    labels = [text.get_text() for text in density.get_legend().get_texts()]
    assert len(labels) == 12
    assert labels[-1] == "others"
    assert sum(len(container) for container in density.containers) == 40


def test_a_run_that_changes_nothing_has_a_picture_too() -> None:
    empty = {**report([]), "density": 0.0, "targeted": 0}
    assert draw_report(empty).startswith(b"\x89PNG")


def test_no_global_state_of_matplotlib_is_touched() -> None:
    script = (
        "import json, sys; from tailor_fast.patching.picture import draw_report;"
        " assert not any(name.startswith('matplotlib') for name in sys.modules);"
        " draw_report(json.load(sys.stdin)); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    body = json.dumps(report(blocks(1)))
    subprocess.run([sys.executable, "-c", script], input=body, text=True, check=True)


@pytest.mark.parametrize("name", ["a$\\frac{$.$\\nothing$", "$x$.$y$", "_hidden.$", "{}%s.\\"])
def test_a_name_is_no_formula(name: str) -> None:
    assert draw_report(report([f"{name}.0.q_proj", name])).startswith(b"\x89PNG")
