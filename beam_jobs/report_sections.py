"""The sections of a run's page on models and scores, as tables and charts: gate, distribution, who moved, drift, realised quality."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from beam_jobs import plots, statistics
from beam_jobs.report_scores import EDGES, EVIDENCE, Month, Moved
from beam_jobs.statistics import IMAGES, Sketch, Sketches
from model.gate import CANDIDATE, CHAMPION
from schemas.contract import Contract
from schemas.lake import Manifest
from schemas.parquet import read_parquet
from schemas.storage import Storage

# Lines of a chart that can still be read, and of a table that a page can hold.
_CHART_LINES, TABLE_LINES, _FIRST, _MULTIPLES, _BARS, _QUANTILES = 24, 200, 20, 12, 5, 20


@dataclasses.dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: as it is read.
        sort: as it is sorted; None by its text.
        creative: whose picture stands beside it.
        link: where it leads.
        alarm: whether it is to be noticed.
    """

    text: str
    sort: float | int | None = None
    creative: str | None = None
    link: str = ""
    alarm: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under named columns."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture, what it shows in a sentence, and its numbers."""

    svg: Markup
    told: str
    numbers: Table | None


def number(value: float | None, form: str = ",.0f", **more: Any) -> Cell:
    return Cell("–" if value is None else format(value, form), value, **more)


def table(caption: str, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table of values: those that are no cells yet are texts, or numbers to be shown whole."""

    def cell(value: Any) -> Cell:
        return value if isinstance(value, Cell) else Cell(value) if isinstance(value, str) else number(value)

    return Table(caption, columns, [[cell(value) for value in row] for row in rows])


def ends(values: Mapping[str, Any] | None, name: str) -> plots.Interval:
    """A value with the ends of its interval; None where there is none."""
    return (values[name], values[f"{name}_low"], values[f"{name}_high"]) if values else (None, None, None)


def overall(realised: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of realised quality the row of all impressions; None where there was nothing to judge by."""
    return next((row for row in realised["rows"] if row["value"] is None), None) if realised else None


def interval(values: Mapping[str, Any] | None, name: str, form: str) -> Cell:
    value, low, high = ends(values, name)
    told = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
    return Cell("–" if value is None else f"{value:{form}}{told}", value)


def named(segment: str | None, value: str | None) -> str:
    return (segment or "overall") if value is None else f"{segment} = {value or '(empty)'}"


def gate(storage: Storage, evaluation: Manifest) -> dict:
    """The verdict, and the candidate and the champion by segment."""
    info = evaluation.info
    rows = [row for file in evaluation.files for batch in read_parquet(storage, file) for row in batch.to_pylist()]
    judged = {(row["model"], row["segment"], row["value"]): row for row in rows}
    compared = {(row["segment"], row["value"]): row for row in info.get("compared", ())}
    fixed = [key for key in (("overall", None), ("warm", None), ("cold", None)) if (CANDIDATE, *key) in judged]
    others = sorted({key[1:] for key in judged if key[0] == CANDIDATE} - set(fixed), key=lambda key: -judged[CANDIDATE, *key]["clicks"])
    lines = []
    for key in [*fixed, *others][:TABLE_LINES]:
        ours, theirs, against = judged[CANDIDATE, *key], judged.get((CHAMPION, *key)), compared.get(key)
        entropies = [interval(row, "normalized_entropy", ".4f") for row in (ours, theirs)]
        rest = (interval(against, "difference", "+.2%"), interval(ours, "calibration", ".3f"))
        lines.append([named(*key), ours["clicks"], *entropies, *rest])
    columns = ("segment", "clicks", "NE of the candidate", "NE of the champion", "difference", "calibration")
    shown, charts = [*fixed, *others][:_CHART_LINES], []
    if compared:
        values, at, label = [ends(compared.get(key), "difference") for key in shown], 0.0, "difference of normalized entropy"
        told = "How much more normalized entropy the candidate has than the champion, by segment, with 95 % intervals; below 0 is better."
    else:
        values, at, label = [ends(judged[CANDIDATE, *key], "normalized_entropy") for key in shown], 1.0, "normalized entropy"
        told = "Normalized entropy of the candidate by segment, with 95 % intervals; below 1 it is better than the mean click rate."
    if shown:
        svg = plots.intervals("gate", [named(*key) for key in shown], values, at, label, told)
        charts.append(Chart(svg, told, None))
    if bins := {name: found for name in (CANDIDATE, CHAMPION) if (found := info.get("reliability", {}).get(name))}:
        told = "Reliability on the gate rows: predicted and actual click rate in bins of equal impressions, on the dashed line where they "
        told += "agree. Whiskers: 95 %, by the number of clicks alone."
        cells = [
            [name, shown, number(predicted / shown, ".3%"), number(clicks / shown, ".3%")]
            for name, found in bins.items()
            for shown, clicks, predicted in found
        ]
        numbers = table("Reliability", ("model", "impressions", "predicted", "actual"), cells)
        charts.append(Chart(plots.reliability(bins, told), told, numbers))
    return {"why": info["why"], "charts": charts, "table": table("Gate rows by segment", columns, lines)}


def distribution(scored: Month, before: Month | None) -> Chart:
    months = [scored, *([before] if before else [])]
    told = f"How the probabilities of {scored.month} are spread" + (f", against {before.month}. " if before else ". ")
    told += "; ".join(f"{month.month}: {month.rows:,} ads, mean {month.mean:.3%}" for month in months) + "."
    # Coarser in the table: five bins of the chart.
    coarse = {month.month: month.histogram.reshape(-1, 5).sum(axis=1) for month in months}
    there = [i for i in range(len(EDGES) // 5) if any(counts[i] for counts in coarse.values())]
    cells = [[number(EDGES[5 * i], ".3%"), number(EDGES[5 * i + 5], ".3%"), *(counts[i] for counts in coarse.values())] for i in there]
    numbers = table("Ads by p_click", ("from", "to", *coarse), cells)
    return Chart(plots.distribution(EDGES, {month.month: month.histogram for month in months}, told), told, numbers)


def moved(moved: Moved, before: Month) -> dict:
    told = f"Against {before.month}: {moved.both:,} ads are in both months, {moved.new:,} are new and {moved.gone:,} are gone"
    told += f"; of one key in {before.step}." if before.step > 1 else "."

    def change(row: Mapping[str, Any], now: str) -> list[Cell]:
        return [number(row["before"], ".2%"), number(row[now], ".2%"), number(row[now] - row["before"], "+.2%")]

    tables, columns = [], ("ad", before.month, "now", "change", "trained on")
    for name, rows in (("Ads that rose most", moved.up), ("Ads that fell most", moved.down)):
        lines = [[Cell(row["key"], creative=row["creative"]), *change(row, "p_click"), row["evidence_key"]] for row in rows]
        tables.append(table(name, columns, lines))
    for name, rows in moved.groups.items():
        lines = [[Cell(str(row["value"]), creative=row["creative"]), *change(row, "mean"), row["ads"]] for row in rows]
        tables += [table(f"By {name}, mean p_click", (name, before.month, "now", "change", "ads"), lines)] if lines else []
    return {"told": told, "tables": tables}


def creative(row: Mapping[str, Any]) -> dict:
    p, ads, shown = f"{row['mean']:.2%}", f"{row['ads']:,} ads" if row["ads"] > 1 else "1 ad", f"{row['evidence']:,} impressions trained on"
    return {"creative": row["creative"], "p": p, "ads": ads, "evidence": shown, "key": row["key"]}


def evidence(scored: Month) -> Table:
    """Ads by what is known of their keys."""
    cells = [
        [name, rows, number(rows / scored.rows, ".1%"), number(p / rows if rows else None, ".3%"), unseen]
        for name, (rows, p, unseen) in zip(EVIDENCE, scored.evidence.tolist(), strict=True)
    ]
    return table(
        "Ads by how often the model was trained on them", ("the ad was", "ads", "share", "mean p_click", "creative never shown"), cells
    )


# Sketches by column, and those of images by the image's column and the property.
Known = Mapping[tuple[str, str | None], Sketch]


def known_of(sketches: Sketches, contract: Contract) -> Known:
    known: dict[tuple[str, str | None], Sketch] = {(name, None): sketch for name, sketch in statistics.of_all(sketches).items()}
    if contract.image:
        known |= {(contract.image.name, name): sketch for name, sketch in statistics.in_slice(sketches, IMAGES).items()}
    return known


def panels(compared: Sequence[Mapping[str, Any]], last: Known, this: Known) -> list[plots.Panel]:
    """A small chart of each column that was compared, once: from the months' sketches, or else of what the comparison tells."""
    found: dict[tuple, plots.Panel] = {}
    for row in compared:
        told, alarm = str(row["value"] or row["kind"]), row["alarm"]
        keys = [key for key in ((row["column"], row["value"]), (row["column"], None)) if key in last and key in this]
        key = keys[0] if keys else (row["column"], told)
        if key in found or len(found) == _MULTIPLES:
            continue
        both, title = [month[key] for month in (last, this) if keys], " ".join(filter(None, key))
        if both and all(len(each.ranks) for each in both):
            # The ends may be far out.
            a, b = (each.ranks[:: len(each.ranks) // _QUANTILES][1:-1].tolist() for each in both)
            found[key] = plots.Panel(title, [], a, b, alarm)
        elif both and all(each.counts for each in both):
            old, new = ({value: count / each.known for value, count in each.counts.items()} for each in both)
            # What was told of stands first.
            labels = sorted({*old, *new}, key=lambda label: (label != told, -max(old.get(label, 0.0), new.get(label, 0.0))))[:_BARS]
            a, b = ([shares.get(label, 0.0) for label in labels] for shares in (old, new))
            found[key] = plots.Panel(title, labels, a, b, alarm)
        else:
            found[key] = plots.Panel(row["column"], [told], [row["last"]], [row["this"]], alarm)
    return list(found.values())


def drift(drift: Mapping[str, Any], last: Known, this: Known) -> dict:
    """What was compared with the month before, alarms first; with both months' sketches where they are there."""
    rows = sorted(drift["compared"], key=lambda row: (not row["alarm"], -row["distance"] / (row["threshold"] or 1)))
    cells = [
        [
            Cell(row["column"], alarm=row["alarm"]),
            row["kind"],
            "" if row["value"] is None else str(row["value"]),
            *(number(row[name], ",.4g") for name in ("last", "this", "distance", "threshold")),
            Cell(f"alarm: {row['action']}" if row["alarm"] else "", alarm=row["alarm"]),
        ]
        for row in rows[:TABLE_LINES]
    ]
    columns = ("column", "what", "value", drift["previous"] or "last", "this", "distance", "threshold", "alarm")
    drawn = panels(rows, last, this)
    lines = [
        [each.title, label or f"{(i + 1) / (len(each.last) + 1):.0%} are below", number(a, ",.4g"), number(b, ",.4g")]
        for each in drawn
        for i, (label, a, b) in enumerate(zip(each.labels or [""] * len(each.last), each.last, each.this, strict=True))
    ]
    last_month = drift["previous"] or "last month"
    told = (
        f"This month and {last_month}, what moved most against its threshold first: shares of the commonest values, quantiles of numbers. "
    )
    told += "An alarm has an exclamation mark."
    numbers = table("Both months", ("of", "value", "last", "this"), lines)
    chart = Chart(plots.small_multiples(drawn, told), told, numbers) if drawn else None
    first = table(f"Compared with {last_month}", columns, cells[:_FIRST])
    rest = table(f"Compared with {last_month}, the rest", columns, cells[_FIRST:])
    return {"chart": chart, "table": first, "rest": rest if rest.rows else None}


def realised(realised: Mapping[str, Any]) -> dict:
    """The month before, as it was published, by its outcomes."""
    rows = realised["rows"][:TABLE_LINES]
    names = [named(row["segment"], row["value"]) for row in rows]
    lines = [
        [name, row["impressions"], row["clicks"], interval(row, "ne", ".4f"), interval(row, "calibration", ".3f")]
        for name, row in zip(names, rows, strict=True)
    ]
    told = f"Not judged: {realised['verdict']}."
    if rows:
        told = f"{realised['month']}, as run {realised['run']} published it, by what then happened: {realised['verdict'].rstrip('.')}. "
        told += f"{realised['matched_share']:.1%} of the impressions are of ads that it had scored."
    values = [ends(row, "calibration") for row in rows[:_CHART_LINES]]
    text = "Calibration, predicted over actual clicks, by segment, with 95 % intervals; at 1 they agree."
    columns = ("segment", "impressions", "clicks", "normalized entropy", "calibration")
    chart = Chart(plots.intervals("realised", names[:_CHART_LINES], values, 1.0, "calibration", text), text, None) if rows else None
    return {"told": told, "chart": chart, "table": table("By segment", columns, lines)}
