"""The table of ``target_old``, from the lines of ``benchmarks.quality.target``."""

from collections.abc import Mapping, Sequence

from benchmarks.quality.report import Spread

Row = Mapping[str, str]


def table(rows: Sequence[Row]) -> str:
    """Return Markdown: one line for each protocol, target and density asked for.

    Kept shares are those of accuracies on test scenes, in percent, mean and deviation over the
    pairs for which a recipe was found; *least* is the smallest of the old ones.
    """
    head = "| protocol | target | density | found | old kept | least | new kept | models tried |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    names = ("protocol", "target", "asked_density")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        asked = [row for row in rows if tuple(row[name] for name in names) == key]
        found = [row for row in asked if row["old_kept"]]
        protocol, target, density = key
        cells = [f"`{protocol}`", target or "defaults", density or "searched"]
        cells += [f"{len(found)} of {len(asked)}" if target else ""]
        lines.append(f"| {' | '.join([*cells, *_kept(found)])} |")
    return "\n".join(lines)


def _kept(found: Sequence[Row]) -> list[str]:
    if not found:
        return [""] * 4
    old, new = ([100 * float(row[name]) for row in found] for name in ("old_kept", "new_kept"))
    shown = [f"{spread.mean:.1f} ± {spread.deviation:.1f}" for spread in map(Spread.of, (old, new))]
    tried = sorted({row["models_tried"] for row in found if row["models_tried"]})
    return [shown[0], f"{min(old):.1f}", shown[1], " to ".join(tried[:: max(1, len(tried) - 1)])]
