"""Charts of the report as SVG for inside a page: lines and text in the page's own colour, series in its variables --a and --b.

Each is a picture of its own to a screen reader, told by one sentence; its numbers stand beside it as a table.
"""

import dataclasses
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import matplotlib.axis
import matplotlib.ticker
import numpy as np
from markupsafe import Markup
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
Interval = tuple[float | None, float | None, float | None]  # a value, and the ends of its interval


def reliability(bins: dict[str, list[list[float]]], told: str) -> Markup:
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


def distribution(edges: np.ndarray, series: dict[str, np.ndarray], told: str) -> Markup:
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


def intervals(name: str, labels: Sequence[str], values: Sequence[Interval], at: float, label: str, told: str) -> Markup:
    """Dots with intervals, a line each; `at` is where nothing differs: 1 for ratios, 0 for relative differences, which are shown in %."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(labels))
        middle, error = _with_error(values)
        axes.axvline(at, color=_INK, linewidth=1, linestyle="--")
        axes.errorbar(middle, places, xerr=error, fmt="o", color=_A, markersize=5, linewidth=1.5)
        axes.set_yticks(places, [_short(text) for text in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if not at:
            axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set(xlabel=label)

    return _svg(name, told, 0.9 + 0.3 * len(labels), draw)


def over_time(months: Sequence[str], values: Sequence[Interval], at: float, label: str, told: str) -> Markup:
    """One value a month, with its interval."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(months))
        axes.axhline(at, color=_INK, linewidth=1, linestyle="--")
        middle, error = _with_error(values)
        axes.errorbar(places, middle, error, fmt="o-", color=_A, markersize=5, linewidth=1.5)
        step = -(-len(months) // 6)
        axes.set_xticks(places[::step], months[::step])
        axes.set(ylabel=label)

    return _svg(f"over-time-{label}", told, 2.4, draw)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small chart of a month against the last.

    Attributes:
        title: of what.
        labels: of its bars; empty where `last` and `this` are quantiles, from that of 5 % to that of 95 %.
        last, this: the months' values.
        alarm: whether it is to be noticed.
    """

    title: str
    labels: list[str]
    last: list[float]
    this: list[float]
    alarm: bool


def small_multiples(panels: Sequence[Panel], told: str) -> Markup:
    """Last month and this one: bars by value, or a number's quantiles."""
    lines = -(-len(panels) // 2)

    def draw(figure: Figure) -> None:
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(lines, 2, i + 1)
            for values, name, colour, shift in ((panel.last, "last", _B, -0.2), (panel.this, "this", _A, 0.2)):
                places = np.arange(len(values))
                if panel.labels:
                    axes.barh(places + shift, values, 0.4, color=colour, label=name)
                else:
                    axes.plot(places / max(len(values) - 1, 1), values, color=colour, label=name)
            if panel.labels:
                axes.set_yticks(range(len(panel.labels)), [_short(label, 10) for label in panel.labels])
                axes.invert_yaxis()
            else:
                axes.set_xticks([0, 0.5, 1], ["5 %", "median", "95 %"])
            (axes.xaxis if panel.labels else axes.yaxis).set_major_locator(MaxNLocator(3))
            axes.set_title(
                f"{'! ' if panel.alarm else ''}{_short(panel.title)}", fontsize=9, fontweight="bold" if panel.alarm else "normal"
            )
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return _page_svg("small-multiples", told, 0.5 + 1.5 * lines, draw)


def _svg(name: str, told: str, inches: float, draw: Callable[[Axes], None]) -> Markup:
    return _page_svg(name, told, inches, lambda figure: draw(figure.add_subplot()))


def _page_svg(name: str, told: str, inches: float, draw: Callable[[Figure], None]) -> Markup:
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
    return Markup(text.replace(text[: text.index(">") + 1], f'<svg role="img" aria-label="{html.escape(told)}" {view[0]}>', 1))


def _with_error(values: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray]:
    """The values, shape (n,), and how far their intervals reach to both sides, shape (2, n); NaN where there is none."""
    middle, low, high = np.array(values, float).reshape(-1, 3).T
    return middle, np.stack([middle - low, high - middle])


def _logarithmic(axes: Axes, axis: matplotlib.axis.Axis) -> None:
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    marks = [m * 10.0**e for e in range(-7, 1) for m in ((1, 2, 5) if high / low < 300 else (1,))]
    axis.set_major_locator(matplotlib.ticker.FixedLocator([mark for mark in marks if low <= mark <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_percent))


def _percent(value: float, _: int = 0) -> str:
    return f"{value * 100:.4g} %"


def _short(text: str, most: int = 26) -> str:
    # Matplotlib takes what stands between dollars for mathematics.
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$").replace("\n", " ")
