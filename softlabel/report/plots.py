"""The report's plots as inline SVG: curves and bars.

Nothing here decides what is shown (page.py and search.py do) and nothing carries a title: words stand in the page,
where they reflow. Colours are CSS variables of the page (``--ink``, ``--line``, ``--s0`` ...), so one drawing serves
light, dark and print. The same input gives the same bytes: no dates, ids hashed with a fixed salt, no pyplot state.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

NUM_COLOURS = 6
"""How many ``--s<i>`` the page defines; more series reuse them with another dash."""

_INK, _GRID = "#fe0100", "#fe0101"
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.3, 1.3), (6, 1.8, 1.3, 1.8), (9, 2.5), (3, 1, 1.3, 1, 1.3, 1))
_MAX_POINTS = 140


@dataclass(frozen=True)
class Style:
    """How one series looks: palette index (None is ink), dash index (0 is solid), width in points, bar opacity."""

    colour: int | None = None
    dash: int = 0
    width: float = 1.5
    opacity: float = 1.0


@dataclass(frozen=True)
class Line:
    """One curve with coordinates in [0, 1]; ``marks`` are the x where a dot is set on it."""

    x: ArrayLike
    y: ArrayLike
    style: Style
    marks: tuple[float, ...] = ()


def line_panel(lines: Sequence[Line], *, x_label: str, y_label: str, key: str) -> str:
    """Curves in the unit square as SVG; ``key`` must be unique in the page (it prefixes the ids)."""
    figure = Figure(figsize=(3.5, 2.65), facecolor="none")
    axes = _axes(figure, (0.13, 0.165, 0.855, 0.815))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02), xlabel=x_label, ylabel=y_label)
    ticks = np.linspace(0, 1, 6)
    axes.set_xticks(ticks, [f"{tick:.1g}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:.1g}" for tick in ticks])
    for line in lines:
        _draw_line(axes, line)
    return _svg(figure, key)


def curve_panel(
    at: Sequence[float],
    mean: Sequence[float],
    band: tuple[Sequence[float], Sequence[float]],
    points: Sequence[tuple[float, float, bool]],
    *,
    peak: tuple[float, float] | None,
    best: float,
    x_label: str,
    y_label: str,
    key: str,
) -> str:
    """A measured curve as SVG: its mean, the band it lies in, and the points that were measured.

    Args:
        at: X of the curve.
        mean: Y of the curve.
        band: Lower and upper end at each x.
        points: x, y and whether it was measured to the end (else it is drawn hollow).
        peak: Where the highest point lies, as an interval of x; drawn along the x axis.
        best: X of what was chosen.
        x_label: Under the plot.
        y_label: Beside it.
        key: Unique in the page.
    """
    figure = Figure(figsize=(6.4, 3.4), facecolor="none")
    axes = _axes(figure, (0.09, 0.14, 0.9, 0.84))
    axes.set(xlabel=x_label, ylabel=y_label)
    colour = _sentinel(0)
    axes.fill_between(at, band[0], band[1], color=colour, alpha=0.18, linewidth=0)
    axes.plot(at, mean, color=colour, linewidth=1.6)
    axes.axvline(best, color=_INK, linewidth=0.9, linestyle=(0, (4, 2)))
    for is_whole in (True, False):
        chosen = [(x, y) for x, y, whole in points if whole == is_whole]
        face = _sentinel(1) if is_whole else "none"
        axes.plot(*zip(*chosen, strict=True), "o", ms=5, mfc=face, mec=_sentinel(1), ls="none") if chosen else None
    if peak:
        low, _ = axes.get_ylim()
        axes.plot(peak, (low, low), color=_INK, linewidth=5, solid_capstyle="butt", alpha=0.45, clip_on=False)
        axes.set_ylim(bottom=low)
    return _svg(figure, key)


def bar_panel(
    groups: Sequence[str],
    values_GS: Sequence[Sequence[float | None]],
    styles_S: Sequence[Style],
    *,
    form: str,
    key: str,
) -> str:
    """Grouped horizontal bars as SVG, the first group on top; each bar carries its value.

    Args:
        groups: G names, drawn literally.
        values_GS: A value per group and series; null and NaN show an en dash.
        styles_S: One style per series.
        form: A format specification for the values, such as ``.3f``.
        key: Unique in the page.
    """
    num_series = max(len(styles_S), 1)
    height_in = 0.35 + len(groups) * (num_series * 0.155 + 0.13)
    figure = Figure(figsize=(4.6, height_in), facecolor="none")
    axes = _axes(figure, (0.25, 0.25 / height_in, 0.73, 1 - 0.3 / height_in))
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_xlim(*_bar_limits(values_GS))
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_yticks(range(len(groups)), [_shorten(name) for name in groups], parse_math=False)
    thickness = 0.8 / num_series
    for row, values_S in enumerate(values_GS):
        for column, (value, style) in enumerate(zip(values_S, styles_S, strict=True)):
            _draw_bar(axes, row - 0.4 + (column + 0.5) * thickness, value, style, thickness, form)
    return _svg(figure, key)


def interval_panel(
    names: Sequence[str],
    intervals: Sequence[tuple[float | None, float | None, float | None]],
    points: Sequence[Sequence[float]],
    *,
    marks: Sequence[float | None],
    x_label: str,
    key: str,
) -> str:
    """Values with their intervals as SVG, a row each, the first on top.

    Args:
        names: Drawn literally.
        intervals: Value, low and high of each; what is null is not drawn.
        points: For each, the values that its value is the mean of.
        marks: X of vertical lines.
        x_label: Under the plot.
        key: Unique in the page.
    """
    height_in = 0.6 + 0.24 * len(names)
    figure = Figure(figsize=(6.4, height_in), facecolor="none")
    axes = _axes(figure, (0.24, 0.45 / height_in, 0.74, 1 - 0.5 / height_in))
    axes.set(xlabel=x_label, ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(range(len(names)), [_shorten(name, 24) for name in names], parse_math=False)
    for mark in marks:
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=0.9, linestyle=(0, (4, 2)))
    for row, ((value, low, high), some) in enumerate(zip(intervals, points, strict=True)):
        axes.plot(some, [row] * len(some), "o", ms=3, color=_sentinel(1), alpha=0.6)
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color=_sentinel(0), linewidth=2)
        if value is not None:
            axes.plot([value], [row], "o", ms=6, color=_sentinel(0))
    return _svg(figure, key)


def line_swatch(style: Style) -> str:
    """A legend's sample of a line."""
    dashes = " ".join(f"{part * style.width:g}" for part in _DASHES[style.dash % len(_DASHES)])
    return (
        f'<svg class="swatch" width="30" height="10" viewBox="0 0 30 10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="30" y2="5" stroke="{_css(style.colour)}" stroke-width="{style.width * 1.3:g}" '
        f'stroke-dasharray="{dashes}"/></svg>'
    )


def bar_swatch(style: Style) -> str:
    """A legend's sample of a bar."""
    return (
        '<svg class="swatch" width="14" height="12" viewBox="0 0 14 12" aria-hidden="true">'
        f'<rect width="14" height="12" fill="{_css(style.colour)}" fill-opacity="{style.opacity:g}"/></svg>'
    )


def _axes(figure: Figure, rectangle: tuple[float, float, float, float]) -> Axes:
    axes = figure.add_axes(rectangle, facecolor="none")
    axes.grid(visible=True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.xaxis.label.set(color=_INK, size=8.5)
    axes.yaxis.label.set(color=_INK, size=8.5)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=_INK, linewidth=0.8)
    return axes


def _draw_line(axes: Axes, line: Line) -> None:
    x, y = _thinned(line.x, line.y)
    colour, dashes = _sentinel(line.style.colour), _DASHES[line.style.dash % len(_DASHES)]
    linestyle = (0, dashes) if dashes else "-"
    axes.plot(x, y, color=colour, linewidth=line.style.width, linestyle=linestyle)
    known = np.isfinite(x) & np.isfinite(y)
    if line.marks and known.any():
        order = np.argsort(x[known], kind="stable")
        heights = np.interp(line.marks, x[known][order], y[known][order])
        axes.plot(line.marks, heights, color=colour, linestyle="none", marker="o", markersize=4.5)


def _thinned(x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    """At most 140 points of a curve, both ends included; null becomes NaN, where the line breaks."""
    points = np.array([x, y], dtype=float)
    if points.shape[1] > _MAX_POINTS:
        points = points[:, np.linspace(0, points.shape[1] - 1, _MAX_POINTS).round().astype(int)]
    return points[0], points[1]


def _draw_bar(axes: Axes, y: float, value: float | None, style: Style, thickness: float, form: str) -> None:
    known = value is not None and np.isfinite(value)
    length = float(value) if known and value is not None else 0.0
    axes.barh(y, length, thickness * 0.88, color=_sentinel(style.colour), alpha=style.opacity)
    text = f"{length:{form}}".replace("-", "\N{MINUS SIGN}") if known else "\N{EN DASH}"
    axes.annotate(
        text, (length, y), (-3 if length < 0 else 3, 0), textcoords="offset points", color=_INK, size=7,
        va="center_baseline", ha="right" if length < 0 else "left",
    )  # fmt: skip


def _bar_limits(values_GS: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Limits with room for the numbers at the bars' ends."""
    known = [value for values in values_GS for value in values if value is not None and np.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    room = 0.2 * (high - low) or 1.0
    return (low - room if low < 0 else 0.0), high + room


def _shorten(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def _sentinel(colour: int | None) -> str:
    """A placeholder for a colour, which ``_svg`` swaps for a CSS variable."""
    return _INK if colour is None else f"#fe00{colour % NUM_COLOURS:02x}"


def _css(colour: int | None) -> str:
    return "var(--ink)" if colour is None else f"var(--s{colour % NUM_COLOURS})"


def _svg(figure: Figure, key: str) -> str:
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": key, "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    return _inlined(buffer.getvalue(), key)


def _inlined(text: str, key: str) -> str:
    """Make a stand-alone SVG fit to stand in HTML beside others: no prologue, own ids, the page's font and colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 class="plot">', text, count=1)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r"(font: [^\"';]*?px|font-family:) '?DejaVu Sans[^;\"]*", r"\1 var(--sans)", text)
    text = text.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")
    text = re.sub(r"#fe00(\d\d)", lambda match: f"var(--s{int(match[1])})", text)
    return re.sub(r"\n\s*", "\n", text)
