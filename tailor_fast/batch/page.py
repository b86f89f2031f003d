"""The tables that people read: a CSV, and an HTML page that needs nothing beside it."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence

from tailor_fast._version import __version__
from tailor_fast.batch.state import JobState

TABLE_NAME = "batch.csv"
PAGE_NAME = "batch.html"
_HEAD = (
    *("name", "status", "kept", "targeted", "loss_p10", "loss_median", "loss_p90"),
    *("loss_bare_mask", "seconds", "exit_code", "out", "error"),
)
_INK, _PATCH, _BARE, _FAINT = "#222222", "#0072B2", "#E69F00", "#BBBBBB"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>tailor-fast batch</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 70rem;
       padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.done { color: #00704d; } .failed { color: #b3261e; } .waiting { color: #777; }
.path, .note { color: #666; font-size: .85em; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
</style></head><body>
<h1>{{ title }}</h1>
<table><thead><tr><th>model</th><th>status</th><th class="n">kept</th>
<th class="n">loss</th><th class="n">bare mask</th><th class="n">seconds</th></tr></thead><tbody>
{% for s in states %}<tr>
<td>{{ s.name }}<div class="path">{{ s.out }}</div></td>
<td class="{{ s.status }}">{{ s.status }}
{% if s.error %}<div class="note">{{ s.error }}</div>{% endif %}
{% for note in s.notes %}<div class="note">{{ note }}</div>{% endfor %}</td>
<td class="n">{% if s.targeted %}{{ "%.2f%%"|format(100 * s.kept / s.targeted) }}{% endif %}</td>
<td class="n">{% if s.loss %}{{ "%.3f"|format(s.loss[1]) }}{% endif %}</td>
<td class="n">{% if s.loss_bare is not none %}{{ "%.3f"|format(s.loss_bare) }}{% endif %}</td>
<td class="n">{% if s.seconds %}{{ "%.1f"|format(s.seconds) }}{% endif %}</td>
</tr>{% endfor %}
</tbody></table>
{% if picture %}<p>Loss: how far a layer's answers are from the tuned ones, relative to reverting
the layer to base; median over the layers, with the 10th to 90th percentile. Lower is better.</p>
{{ picture|safe }}{% endif %}
<p class="note">tailor_fast {{ version }}</p>
</body></html>
"""


def make_table(states: Sequence[JobState]) -> str:
    """A CSV with a line per job."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_HEAD)
    for state in states:
        loss = [f"{value:.6g}" for value in state.loss] or [""] * 3
        bare = "" if state.loss_bare is None else f"{state.loss_bare:.6g}"
        table.writerow(
            (
                *(state.name, state.status, state.kept, state.targeted, *loss, bare),
                *(state.seconds, state.exit_code, state.out, state.error),
            )
        )
    return text.getvalue()


def make_page(states: Sequence[JobState]) -> str:
    """The HTML page: the table, and a picture of losses where statistics were used."""
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    counts = Counter(state.status for state in states)
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return page.render(
        states=states,
        title=f"{counts['done']} of {len(states)} models patched{failed}",
        picture=_picture([state for state in states if state.loss]),
        version=__version__,
    )


def _picture(states: Sequence[JobState]) -> str:
    """A line per job: spread and median of the loss, and the bare mask's median; SVG."""
    if not states:
        return ""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.1 + 0.32 * len(states)), layout="constrained")
    axis = figure.subplots()
    places = range(len(states))
    low, middle, high = zip(*(state.loss for state in states), strict=True)
    axis.hlines(places, low, high, color=_PATCH, linewidth=2, alpha=0.4)
    axis.scatter(middle, places, s=36, color=_PATCH, label="patch", zorder=3)
    bare = [state.loss_bare or 0.0 for state in states]
    axis.scatter(bare, places, s=36, marker="|", color=_BARE, label="bare mask", zorder=3)
    axis.set_yticks(list(places), [_shortened(state.name) for state in states])
    axis.set_ylim(len(states) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.axvline(1.0, color=_FAINT, linewidth=1)
    axis.set_xlabel("loss relative to reverting to base", color=_INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    text = io.StringIO()
    # The same states give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "tailor_fast", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _shortened(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
