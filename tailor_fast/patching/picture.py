"""The picture of a run: density and loss of every patched layer, in the order of the calls."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinct for colour-blind readers too, and four of Paul Tol's.
_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C6D31",
    "#332288",
    "#882255",
    "#44AA99",
    "#999933",
    "#7F7F7F",
)
_INK, _FAINT, _SHADE = "#222222", "#BBBBBB", "#F3F3F3"
_WIDTH, _WIDEST, _INCHES_PER_LAYER = 9.0, 22.0, 0.075
_MOST_TICKS = 42
_MOST_SECTIONS = 8
_DPI = 120


@dataclass(frozen=True)
class _Span:
    """Layers ``[begin, end)`` under one label."""

    label: str
    begin: int
    end: int

    @property
    def centre(self) -> float:
        return (self.begin + self.end - 1) / 2


def draw_report(report: Mapping[str, Any]) -> bytes:
    """Draw ``Report.to_dict()`` as a PNG; the same report gives the same bytes.

    Above, the share of each layer's weights that was kept. Below, how far the layer's answers are
    from the tuned ones (the objective of the solve) relative to reverting the layer to base: with
    the patch, and with the bare mask. Without statistics there is no lower part.

    Args:
        report: what ``tailor_report.json`` holds.

    Returns:
        The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    linears = report["linears"]
    measured = any(row["loss_reverted"] for row in linears)
    width = min(_WIDEST, max(_WIDTH, 2 + _INCHES_PER_LAYER * len(linears)))
    figure = Figure(figsize=(width, 6.4 if measured else 3.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=12, color=_INK)
    blocks = _runs([_split(row["name"]) for row in linears])
    for axis in axes:
        _prepare(axis, blocks)
    _draw_density(axes[0], report)
    if measured:
        _draw_loss(axes[1], linears)
    _label_layers(axes[-1], [row["name"] for row in linears])
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a layer's name is no formula, whatever it has between dollars
    picture = io.BytesIO()
    FigureCanvasAgg(figure)  # the figure's canvas from now on; no global state is touched
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _title(report: Mapping[str, Any]) -> str:
    recipe = report["recipe"]
    how = [f"scope {recipe['scope']}", f"decorate {recipe['decorate']}"]
    if recipe["decorate"] != "none":
        how.append(f"propagate {recipe['propagate']}")
    share, layers = 100 * report["density"], len(report["linears"])
    return (
        f"{share:.2f}% of {report['targeted']:,} weights kept in {layers} layers"
        f"   ({', '.join(how)})"
    )


def _draw_density(axis: Axes, report: Mapping[str, Any]) -> None:
    linears = report["linears"]
    kinds = [row["name"].rpartition(".")[2] for row in linears]
    named = list(dict.fromkeys(kinds))
    if len(named) > len(_COLOURS):  # one colour is left for all the rest
        named = [*named[: len(_COLOURS) - 1], "others"]
        kinds = [kind if kind in named else "others" for kind in kinds]
    for kind, colour in zip(named, _COLOURS, strict=False):
        places = [place for place, other in enumerate(kinds) if other == kind]
        heights = [100 * linears[place]["density"] for place in places]
        axis.bar(places, heights, width=0.82, color=colour, label=kind)
    mean = 100 * report["density"]
    _level(axis, mean, "all\nlayers")
    axis.set_ylabel("kept weights, %")
    axis.set_ylim(0, max([1.2 * mean, *(105 * row["density"] for row in linears)]) or 1)
    if named:
        _legend(axis, columns=len(named))


def _draw_loss(axis: Axes, linears: Sequence[Mapping[str, Any]]) -> None:
    places = [place for place, row in enumerate(linears) if row["loss_reverted"]]
    rows = [linears[place] for place in places]
    patch = [row["loss"] / row["loss_reverted"] for row in rows]
    bare = [row["loss_undecorated"] / row["loss_reverted"] for row in rows]
    size = 26 if len(linears) <= 120 else 12
    axis.vlines(places, patch, bare, color=_FAINT, linewidth=1.2, zorder=1)
    axis.scatter(
        places,
        bare,
        s=size,
        facecolors="white",
        edgecolors=_COLOURS[5],
        label=f"bare mask, median {median(bare):.3f}",
        zorder=2,
    )
    axis.scatter(
        places,
        patch,
        s=size,
        color=_COLOURS[0],
        label=f"patch, median {median(patch):.3f}",
        zorder=3,
    )
    _level(axis, 1.0, "reverted\nto base")
    axis.set_ylabel("loss / loss of reverting")
    axis.set_ylim(0, 1.08 * max(1.0, *patch, *bare))
    _legend(axis, columns=2)


def _level(axis: Axes, height: float, label: str) -> None:
    axis.axhline(height, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.annotate(
        label,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=_INK,
    )


def _legend(axis: Axes, columns: int) -> None:
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8,
        handlelength=1.0,
        columnspacing=1.2,
        borderaxespad=0.1,
    )


def _prepare(axis: Axes, blocks: Sequence[_Span]) -> None:
    for index, block in enumerate(blocks):
        if index % 2:
            axis.axvspan(block.begin - 0.5, block.end - 0.5, color=_SHADE, zorder=0, linewidth=0)
    axis.set_xlim(-0.7, (blocks[-1].end if blocks else 1) - 0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="both", labelsize=8, colors=_INK)
    axis.tick_params(axis="x", length=0)
    axis.yaxis.label.set_fontsize(9)


def _label_layers(axis: Axes, names: Sequence[str]) -> None:
    """Block numbers as ticks, and under them the list that the blocks belong to."""
    keys = [_split(name) for name in names]
    sections, blocks = _runs([key[:1] for key in keys]), _runs(keys)
    step = -(-len(blocks) // _MOST_TICKS) if blocks else 1
    shown = [
        block
        for section in sections
        for block in [b for b in blocks if section.begin <= b.begin < section.end][::step]
    ]
    axis.set_xticks([block.centre for block in shown], [block.label for block in shown])
    for section in sections:
        if len(sections) <= _MOST_SECTIONS or section.end - section.begin > len(names) / 20:
            axis.annotate(
                section.label,
                (section.centre, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, -17),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color=_INK,
            )
        if section.begin:
            for panel in axis.figure.axes:
                panel.axvline(section.begin - 0.5, color=_FAINT, linewidth=0.8)


def _split(name: str) -> tuple[str, str]:
    """``model.layers.10.mlp.up_proj`` is block ``10`` of ``model.layers``; two parts are enough."""
    match = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", name)
    path, number = (match[1] or "", match[2]) if match else (name.rpartition(".")[0], "")
    return ".".join(path.split(".")[-2:]), number


def _runs(keys: Sequence[tuple[str, ...]]) -> list[_Span]:
    """Runs of equal keys, each labelled with its key's last part."""
    spans, begin = [], 0
    for key, members in groupby(keys):
        end = begin + len(list(members))
        spans.append(_Span(key[-1], begin, end))
        begin = end
    return spans
