"""``python -m benchmarks.gpu.picture``: ``results/<card>/<part>.csv`` drawn as ``<part>.svg``.

Run where matplotlib is; the tables come from the machine that has the card.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.gpu.readme import OURS, RESULTS, read
from benchmarks.gpu.table import slug

Rows = Sequence[dict[str, str]]
_OURS, _OTHERS, _BAR = "#1f6f5c", "#b9c2c9", "#c0392b"
# Same bytes for the same tables.
mpl.rcParams.update({"svg.hashsalt": "tailor_fast", "svg.fonttype": "none", "font.size": 9})
_METADATA = {"Date": None, "Creator": None}


def draw(results: Path = RESULTS) -> list[Path]:
    """Draw what there is; returns the files that were written."""
    written = []
    for part, kinds in (("kernels", ("share", "ratio")), ("block", ("seconds", "ratio"))):
        for card, rows in read(results, part).items():
            figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 0.3 * _most(rows, kinds)))
            for axis, kind in zip(axes, kinds, strict=True):
                _bars(axis, rows, kind)
            figure.suptitle(f"{card}, {part}: torch {rows[0]['torch']}, triton {rows[0]['triton']}")
            figure.tight_layout()
            path = results / slug(card) / f"{part}.svg"
            figure.savefig(path, metadata=_METADATA)
            plt.close(figure)
            written.append(path)
    return written


def _most(rows: Rows, kinds: Sequence[str]) -> int:
    return max(1, *(len(_shown(rows, kind)) for kind in kinds))


def _shown(rows: Rows, kind: str) -> list[dict[str, str]]:
    """Rows with a figure of this kind: every provider's time, our shares and ratios."""
    return [
        row
        for row in rows
        if row[kind] and (kind == "seconds" or row["provider"] in OURS) and not row["error"]
    ]


def _bars(axis: Axes, rows: Rows, kind: str) -> None:
    shown = _shown(rows, kind)
    values = [float(row[kind]) for row in shown]
    places = range(len(shown), 0, -1)
    colours = [_OURS if row["provider"] in OURS else _OTHERS for row in shown]
    drawn = axis.barh(places, values, color=colours, height=0.6)
    axis.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3)
    for place, row in zip(places, shown, strict=True):
        for bar in row["bar"].split(", "):
            name, _, limit = bar.replace(">=", "<=").partition(" <= ")
            if name == kind:
                axis.plot([float(limit)] * 2, [place - 0.4, place + 0.4], color=_BAR)
    axis.set_yticks(list(places), [f"{row['work']} {row['shape']}" for row in shown])
    labels = {
        "share": "share of the floor (line: the bar)",
        "ratio": "times the baseline's speed (line: the bar)",
        "seconds": "seconds (line: the bar; grey: baselines)",
    }
    axis.set_xlabel(labels[kind])
    if kind == "seconds":
        axis.set_xscale("log")
    axis.margins(x=0.15)


def main(arguments: list[str] | None = None) -> int:
    """Draw every table; 1 where there is none."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.picture", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the cards' folders"
    )
    written = draw(parser.parse_args(arguments).results)
    for path in written:
        print(path)
    return 0 if written else 1


if __name__ == "__main__":
    raise SystemExit(main())
