"""The trade-off of every method: accuracy on old tasks against the new one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.report import Line
from benchmarks.quality.rows import ROWS

_WISE = "WiSE-FT, every weight, from 0 to 1"
# What is drawn, in this order, with its look; the table has the rest.
_STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "dare": ("DARE", {"color": "#9aa0a6", "marker": "v"}),
    "della": ("DELLA", {"color": "#c49c6b", "marker": "^"}),
    "breadcrumbs": ("Breadcrumbs", {"color": "#8d6e63", "marker": "D"}),
    "wanda": ("Wanda on the delta", {"color": "#6aa6a6", "marker": "P"}),
    "fisher": ("Fisher on the delta", {"color": "#5b8c5a", "marker": "X"}),
    "grafting": ("Grafting", {"color": "#b07aa1", "marker": "<"}),
    "magnitude": ("Magnitude", {"color": "#bcbd22", "marker": ">"}),
    "official": ("Model Tailor, authors' code", {"color": "#d62728", "marker": "x"}),
    "obs": ("Model Tailor, OBS sweep", {"color": "#ff7f0e", "marker": "s"}),
    "default": ("tailor_fast, new data only", {"color": "#1f77b4", "marker": "o"}),
    "default-retain": (
        "tailor_fast, defaults with old data",
        {"color": "#0b3d91", "marker": "*", "markersize": 12, "linewidth": 2.2},
    ),
}


def trade_off(lines: Sequence[Line], path: Path) -> None:
    """Draw one protocol's methods, a point a density, mean over pairs of models.

    Args:
        lines: of one protocol.
        path: the PNG file.
    """
    figure = Figure(figsize=(8.4, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    wise = [line for line in lines if line.row.startswith("wise-ft-")]
    ends = [line for line in lines if line.row in ("base", "tuned")]
    _draw(axes, sorted(wise + ends, key=_new), _WISE, {"color": "black", "linestyle": "--"})
    for name, (label, style) in _STYLES.items():
        chosen = [line for line in lines if line.row == name]
        _draw(axes, sorted(chosen, key=lambda line: line.density), label, style)
    for line in ends:
        is_base = line.row == "base"
        axes.annotate(
            "base" if is_base else "fine-tuned",
            (_new(line), line.spreads["old"].mean),
            xytext=(5, -13) if is_base else (-6, -11),
            textcoords="offset points",
            horizontalalignment="left" if is_base else "right",
            fontsize=9,
        )
    densities = sorted({line.density for line in lines if ROWS[line.row].has_density})
    shares = ", ".join(f"{100 * density:g}%" for density in densities)
    pairs = max(line.count for line in lines)
    axes.set_title(
        f"{PROTOCOLS[lines[0].protocol].title}\nkept weights: {shares}; mean of {pairs}"
        f" {'pair' if pairs == 1 else 'pairs'} of models",
        fontsize=11,
    )
    axes.set_xlabel("new task, % right")
    axes.set_ylabel("old tasks, % right")
    axes.margins(x=0.1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, metadata={"Software": None})


def _new(line: Line) -> float:
    return line.spreads["new"].mean


def _draw(axes: Any, lines: Sequence[Line], label: str, style: dict[str, Any]) -> None:
    if not lines:
        return
    axes.plot(
        [_new(line) for line in lines],
        [line.spreads["old"].mean for line in lines],
        label=label,
        **{"linewidth": 1.2, "markersize": 6, **style},
    )
