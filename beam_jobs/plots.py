"""Charts of the report as SVG for inside a page: lines and text in the page's own colour, series in its variables --a and --b.

Each is a picture of its own to a screen reader, told by one sentence; its numbers stand beside it as a table.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import matplotlib.axis
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

# Colours that Matplotlib writes out as they are, each put into the page's afterwards.
_INK, _FAINT, _A, _B = "#010203", "#040506", "#070809", "#0a0b0c"
_PAGE = {_INK: "currentColor", _FAINT: "var(--line)", _A: "var(--a)", _B: "var(--b)"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_INCHES = 5.0
Interval = tuple[float, float | None, float | None]  # a value, and the ends of its interval


def reliability(bins: dict[str, list[list[float]]], told: str) -> str:
    """Predicted against actual click rate of up to two models, on logarithmic axes.

    Args:
        bins: by model, of each bin impressions, clicks and predicted clicks.
    """

    def draw(axes: Axes) -> None:
        ends = []
        for (name, rows), colour, marker in zip(bins.items(), (_A, _B), "os", strict=False):
            shown, clicks, predicted = np.array([row for row in rows if row[1] > 0 and row[2] > 0]).reshape(-1, 3).T
            # Clicks that came by chance alone.
            error = np.minimum(1.96 / np.sqrt(clicks), 0.99) * clicks / shown
            x, y = predicted / shown, clicks / shown
            axes.errorbar(x, y, error, fmt=marker, markersize=4, linewidth=1, color=colour, label=name)
            ends += [*x, *y]
        if ends:
            axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=_INK, linewidth=1, linestyle="--")
            axes.legend()
            axes.set_ylim(min(ends) / 1.5, max(ends) * 1.5)
        for axis in (axes.xaxis, axes.yaxis):
            _logarithmic(axes, axis)
        axes.set(xlabel="predicted click rate", ylabel="actual click rate")

    return _svg("reliability", told, 3.4, draw)


def distribution(edges: np.ndarray, series: dict[str, np.ndarray], told: str) -> str:
    """Shares of rows by probability, of up to two months: `edges` (bins + 1,), each of `series` (bins,)."""

    def draw(axes: Axes) -> None:
        for (name, counts), colour, fill in zip(series.items(), (_A, _B), (True, False), strict=False):
            axes.stairs(counts / max(counts.sum(), 1), edges, color=colour, fill=fill, alpha=0.5 if fill else 1, linewidth=1.5, label=name)
        there = np.flatnonzero(sum(series.values()))
        if len(there):
            axes.set_xlim(edges[there[0]], edges[there[-1] + 1])
        _logarithmic(axes, axes.xaxis)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set(xlabel="p_click", ylabel="share of ads")
        axes.legend()

    return _svg("distribution", told, 2.8, draw)


def intervals(name: str, labels: Sequence[str], series: dict[str, Sequence[Interval | None]], at: float, label: str, told: str) -> str:
    """Dots with intervals, a line each: of each of up to two series a value for each label; `at` is where nothing differs."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(labels))
        axes.axvline(at, color=_INK, linewidth=1, linestyle="--")
        for i, ((legend, values), colour, marker) in enumerate(zip(series.items(), (_A, _B), "os", strict=False)):
            y = places + (0.16 if i else -0.16) * (len(series) > 1)
            there = [(place, *value) for place, value in zip(y, values, strict=True) if value]
            for place, value, low, high in there:
                axes.plot([value if low is None else low, value if high is None else high], [place, place], color=colour, linewidth=1.5)
            axes.plot([row[1] for row in there], [row[0] for row in there], marker, color=colour, markersize=5, label=legend)
        axes.set_yticks(places, [_short(text) for text in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel=label)
        if len(series) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)

    return _svg(name, told, 0.9 + 0.3 * len(labels), draw)


def over_time(months: Sequence[str], values: Sequence[Interval], at: float, label: str, told: str) -> str:
    """One value a month, with its interval."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(months))
        axes.axhline(at, color=_INK, linewidth=1, linestyle="--")
        for place, (value, low, high) in zip(places, values, strict=True):
            axes.plot([place, place], [value if low is None else low, value if high is None else high], color=_A, linewidth=1.5)
        axes.plot(places, [value for value, _, _ in values], "o-", color=_A, markersize=5)
        step = -(-len(months) // 6)
        axes.set_xticks(places[::step], months[::step])
        axes.set(ylabel=label)

    return _svg(f"over-time-{label}", told, 2.4, draw)


def small_multiples(pairs: Sequence[tuple[str, float, float, bool]], told: str) -> str:
    """Last month and this one, a small chart for each of (title, last, this, whether it is an alarm)."""

    def draw(figure: Figure) -> None:
        columns = 3
        lines = -(-len(pairs) // columns)
        for i, (title, last, this, alarm) in enumerate(pairs):
            axes = figure.add_subplot(lines, columns, i + 1)
            axes.bar([0, 1], [last, this], color=[_B, _A], width=0.6)
            axes.set_xticks([0, 1], ["last", "this"])
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.grid(axis="x", visible=False)
            axes.set_title(f"{'! ' if alarm else ''}{_short(title, 20)}", fontsize=8, fontweight="bold" if alarm else "normal")

    return _page_svg("small-multiples", told, 0.3 + 1.15 * -(-len(pairs) // 3), draw)


def _svg(name: str, told: str, inches: float, draw: Callable[[Axes], None]) -> str:
    return _page_svg(name, told, inches, lambda figure: draw(figure.add_subplot()))


def _page_svg(name: str, told: str, inches: float, draw: Callable[[Figure], None]) -> str:
    """The figure as an element of a page: without fonts, sizes and names that are the page's to give."""
    out = io.StringIO()
    # A salt of its own, so that what a chart refers to has a name that no other chart on the page uses.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_INCHES, inches))
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg ") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*;", "", text)
    for ours, page in _PAGE.items():
        text = text.replace(ours, page)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view
    return text.replace(text[: text.index(">") + 1], f'<svg role="img" aria-label="{html.escape(told)}" {view[0]}>', 1)


def _logarithmic(axes: Axes, axis: matplotlib.axis.Axis) -> None:
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    marks = [m * 10.0**e for e in range(-7, 1) for m in ((1, 2, 5) if high / low < 300 else (1,))]
    axis.set_major_locator(matplotlib.ticker.FixedLocator([mark for mark in marks if low <= mark <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_percent))


def _percent(value: float, _: int = 0) -> str:
    return f"{value * 100:g} %"


def _short(text: str, most: int = 26) -> str:
    # Matplotlib takes what stands between dollars for mathematics.
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")
