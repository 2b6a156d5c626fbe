"""Drift: this month's statistics against last month's, and what is scored against what is trained on.

    adstocrat drift 2026-10 --lake gs://bucket

Writes `statistics/<month>/<run>/` and `runs/<month>/<run>/drift.json`. An alarm needs both: a difference beyond what chance makes of so
many rows, at 1 % for all comparisons of a month together, and beyond the limit of the contract's comparator or of the settings.
"""

import dataclasses
import logging
import math
import statistics as numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from beam_jobs import statistics
from beam_jobs.config import ALARMS
from beam_jobs.run import AlarmError, MonthRun, kept
from beam_jobs.statistics import IMAGES, LABELLED, Sketch, Sketches
from model.features import embedding_matrix
from schemas import lake
from schemas.contract import Column, Contract
from schemas.parquet import read_parquet
from schemas.storage import Storage

log = logging.getLogger("adstocrat")

DRIFT, SKEW, MISSING, FAULTS, EMBEDDING, CHURN = KINDS = ALARMS
_FAMILY_WISE = 0.01
# Limits where the contract has none: of the difference of a value's share, and of a number's Jensen-Shannon divergence in bits.
_NAMES_LIMIT, _NUMBERS_LIMIT, _SKEW_TO_DRIFT = 0.05, 0.02, 2.0
# Of a click rate, as the logarithm of its change; of embeddings, in standard deviations, and as a share.
_CLICKS_LIMIT, _MEAN_LIMIT, _FAR_LIMIT = 0.35, 0.2, 0.05
# Churn up to so many times its trailing median is ordinary; below this it always is: of the logarithm of a count's change, and of a share.
_ORDINARY, _TRAILING, _COUNT_FLOOR, _CHURN_FLOOR = 1.5, 6, 0.2, 0.05
_BINS, _SURE = 32, 1e9
_SEEN, _ASKED, _FAR = 8_192, 2_048, 0.01


@dataclasses.dataclass(frozen=True)
class Compared:
    """One comparison.

    Attributes:
        kind: one of `KINDS`.
        column, value: of what; the value is None where it is the column as a whole.
        last, this: what is told of last month and of this one: a share, a mean, a rate or a count.
        distance, threshold: how far they are apart, and the limit of that.
        z: how far beyond chance, in standard errors.
        told: the comparison in words.
        tests: of how many differences it is the greatest.
    """

    kind: str
    column: str
    value: str | None
    last: float
    this: float
    distance: float
    threshold: float
    z: float
    told: str
    tests: int = 1


# What a comparison's distances were in earlier months, by kind, column and, for churn, value.
Usual = Callable[[str, str, str | None], Sequence[float]]


def compare(before: Sketches, now: Sketches, contract: Contract, missing_limit: float, usual: Usual) -> Iterator[Compared]:
    """This month's rows and images against those of last month. Names come and go: as far as is `usual` of a column, that is no drift."""
    old, new = statistics.of_all(before), statistics.of_all(now)
    for column in (column for column in contract.kept if column.name in old.keys() & new.keys()):
        a, b = old[column.name], new[column.name]
        yield _share(MISSING, column.name, None, (a.missing, a.rows), (b.missing, b.rows), missing_limit, "of the rows have no value")
        if not column.tags & {"key", "image", "mature_before"} and a.known and b.known:
            ordinary = _ordinary(usual(DRIFT, column.name, None)) if column.categorical else 0.0
            yield _distribution(DRIFT, column, a, b, max(column.drift or _limit(column), ordinary))
    yield from _clicks(before, now, contract)
    if contract.image:
        name, old, new = contract.image.name, statistics.in_slice(before, IMAGES), statistics.in_slice(now, IMAGES)
        if old and new:
            for value in ("size", "aspect", "brightness"):
                if old[value].known and new[value].known:
                    compared = _distribution(DRIFT, Column(f"{value} of {name}", "float"), old[value], new[value], _NUMBERS_LIMIT)
                    yield dataclasses.replace(compared, column=name, value=value)
            a, b = old["fault"], new["fault"]
            for fault in sorted((a.counts.keys() | b.counts.keys()) - {"ok"}):
                faults = (a.counts.get(fault, 0), a.rows), (b.counts.get(fault, 0), b.rows)
                yield _share(FAULTS, name, fault, *faults, missing_limit, f"of the images are {fault}")
        yield from _undelivered(before, now, name, missing_limit)


def skew(trained: Sequence[Sketches], now: Sketches, contract: Contract) -> Iterator[Compared]:
    """The rows that are scored against those of the window that are trained on."""
    parts = [statistics.in_slice(month, LABELLED) for month in trained]
    scored = statistics.of_all(now)
    for column in contract.features:
        a = statistics.added([part[column.name] for part in parts if column.name in part] or [Sketch()])
        if a.known and scored[column.name].known:
            yield _distribution(SKEW, column, a, scored[column.name], column.skew or _SKEW_TO_DRIFT * _limit(column))


def churn(before: Sketches, now: Sketches, contract: Contract, usual: Usual) -> Iterator[Compared]:
    """How many rows, keys and images came and went, against what is usual."""
    named = [(statistics.key_of(contract), "rows")] + ([(contract.image.name, "images")] if contract.image else [])
    old, new = statistics.of_all(before), statistics.of_all(now)
    for name, what in named:
        a, b = old.get(name, Sketch()), new[name]
        counts = (a.rows, b.rows) if what == "rows" else (a.unique, b.unique)
        if not all(counts):
            continue
        distance = abs(math.log(counts[1] / counts[0]))
        limit = max(_COUNT_FLOOR, _ordinary(usual(CHURN, name, what)))
        told = f"{counts[1]:,} {what}, {counts[0]:,} last month"
        yield Compared(CHURN, name, what, *counts, distance, limit, _SURE if what == "rows" else distance / _unique_error(a, b), told)
        for value, share, of in zip(("new", "gone"), statistics.exchanged(a, b), (b, a), strict=True):
            earlier = usual(CHURN, name, value)
            # Without a month to compare with, nothing is out of the ordinary.
            ordinary = numbers.median(earlier) if earlier else 1.0
            error = math.hypot(math.sqrt(share * (1 - share) / of.unique), _unique_error(a, b))
            told = f"{share:.1%} of {'this' if value == 'new' else 'last'} month's are {value}, {ordinary:.1%} is usual"
            over = (share - _ORDINARY * ordinary) / max(error, 1 / of.unique)
            yield Compared(CHURN, name, value, ordinary, share, share, max(_CHURN_FLOOR, _ORDINARY * ordinary), over, told)


def embeddings(column: str, before: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]) -> Iterator[Compared]:
    """Embeddings by creative, float32 (width,) each: whether their mean moved, and whether some are far from all that were seen."""
    if min(len(before), len(now)) < _BINS:
        return
    old, new = np.stack(list(before.values())), np.stack(list(now.values()))
    spread = np.cov(np.concatenate([old - old.mean(0), new - new.mean(0)]), rowvar=False)
    total = max(float(np.trace(spread)), 1e-12)
    moved = float(np.sum((new.mean(0) - old.mean(0)) ** 2))
    z = (moved / (1 / len(old) + 1 / len(new)) - total) / math.sqrt(2 * max(float(np.sum(spread**2)), 1e-24))
    distance = math.sqrt(moved / total)
    told = f"the mean of the images' embeddings moved by {distance:.2f} standard deviations"
    yield Compared(EMBEDDING, column, "mean", 0.0, distance, distance, _MEAN_LIMIT, z, told)
    fresh = new[[creative not in before for creative in now]][:_ASKED]
    if len(fresh) >= _BINS:
        # The nearest of a creative that is among those seen is itself.
        limit = float(np.quantile(_nearest(old[:_ASKED], old, 1), 1 - _FAR))
        share = float(np.mean(_nearest(fresh, old, 0) > limit * (1 + 1e-6)))
        error = math.sqrt(max(share * (1 - share), _FAR * (1 - _FAR)) / len(fresh))
        told = f"{share:.1%} of the new creatives are far from any seen, {_FAR:.1%} would be usual"
        yield Compared(EMBEDDING, column, "far", _FAR, share, share - _FAR, _FAR_LIMIT, (share - _FAR) / error, told)


def ruled(compared: Sequence[Compared], stops: Sequence[str]) -> dict[str, Any]:
    """What is written of comparisons: alarms first, the worst first. `stops` are kinds and columns whose alarms stop the month."""
    tests = sum(found.tests for found in compared)
    critical = numbers.NormalDist().inv_cdf(1 - _FAMILY_WISE / (2 * tests)) if tests else 0.0
    ordered = sorted(compared, key=lambda found: (not _alarms(found, critical), -found.distance / max(found.threshold, 1e-9)))
    rows = []
    for found in ordered:
        row = {name: value for name, value in vars(found).items() if name not in ("z", "told", "tests")}
        what = found.column if found.value is None else f"{found.column} ({found.value})"
        sentence = f"{found.kind} {printable(what)}: {found.told}; distance {found.distance:.3f}, limit {found.threshold:.3f}"
        action = "stop" if {found.kind, found.column} & set(stops) else "warn"
        rows.append({**row, "alarm": _alarms(found, critical), "action": action, "sentence": sentence})
    return {"compared": rows, "alarms": [row["sentence"] for row in rows if row["alarm"]]}


def execute(run: MonthRun) -> None:
    """Bring the run's statistics together, compare them and write what was found.

    Raises:
        AlarmError: an alarm stops the month.
    """
    now, window = statistics.merge(run), dict(run.window[:-1])
    month, id, before = _latest(run)
    follows = month == lake.month_after(run.month, -1)
    found: list[Compared] = []
    if before:
        usual = _usual(run.storage, run.month)
        found += compare(before, now, run.contract, run.config.monitor_missing, usual)
        if follows:  # In two months more comes and goes than is usual of one.
            found += churn(before, now, run.contract, usual)
    if month in window and run.contract.image:
        found += embeddings(run.contract.image.name, *(_embedded(run, *pair) for pair in ((month, id), (run.month, run.id))))
    if not follows:
        found = [dataclasses.replace(one, told=f"{one.told}; last month: {month}") for one in found]
    if window:
        found += skew([*(statistics.of_run(run.storage, *pair) for pair in window.items()), now], now, run.contract)
    document = {"previous": month or None, **ruled(found, run.config.monitor_stop)}
    run.storage.write_json(f"{run.folder}/drift.json", document)
    check(run)


def check(run: MonthRun) -> None:
    """Stop where an alarm says so, as the settings are now.

    Raises:
        AlarmError: with the alarms that stop the month.
    """
    rows = (run.document("drift") or {"compared": []})["compared"]
    stopping = [row["sentence"] for row in rows if row["alarm"] and {row["kind"], row["column"]} & set(run.config.monitor_stop)]
    if stopping:
        raise AlarmError(f"{run.month} is stopped before anything is trained: {'; '.join(stopping)}")


def is_complete(run: MonthRun) -> bool:
    found = run.document("drift")
    return found is not None and not any(row["alarm"] and row["action"] == "stop" for row in found["compared"])


def printable(text: str) -> str:
    """Text of rows as a terminal may have it: control characters as their escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def headlines(run: MonthRun) -> list[str]:
    """What a person must see first of a run: its alarms, the worst first, and what outcomes say of last month's run if that is not well."""
    drifted, realised = run.document("drift") or {"alarms": []}, run.document("realised") or {"action": "ok"}
    return [*drifted["alarms"], *([f"realised {realised['action']}: {realised['verdict']}"] if realised["action"] != "ok" else [])]


def previous(run: MonthRun) -> tuple[str, str]:
    """The month before and the run that was last published of it, with rows of this contract; ("", "") where there is none."""
    month = lake.month_after(run.month, -1)
    last = lake.last_publication(run.storage, month, run.contract.fingerprint)
    return (month, dict(run.earlier).get(month, last.run)) if last else ("", "")


def _latest(run: MonthRun) -> tuple[str, str, Sketches]:
    """The last month before with a published run, that run and its sketches, of columns that are still what they were; or nothing."""
    for back in range(1, _TRAILING + 1):
        month = lake.month_after(run.month, -back)
        last = lake.last_publication(run.storage, month)
        id = dict(run.earlier).get(month, last.run) if last else ""
        if last and (found := statistics.of_run(run.storage, month, id)):
            then, now = _meanings(kept(run.config, month, id).contract), _meanings(run.contract)
            same = {name for name, meaning in now.items() if then.get(name) == meaning}
            return month, id, {key: sketch for key, sketch in found.items() if key[0] == IMAGES or key[1] in same}
    return "", "", {}


def _meanings(contract: Contract) -> dict[str, Any]:
    """Of each column that is sketched, what has to be the same for months to be compared."""
    columns = {column.name: (column.kind, column.tags) for column in contract.columns}
    return {**columns, statistics.key_of(contract): [column.name for column in contract.key]}


def _alarms(found: Compared, critical: float) -> bool:
    return found.distance > found.threshold and found.z > critical


def _ordinary(earlier: Sequence[float]) -> float:
    """How far apart months may be where they were so far apart before; 0 where that is not known."""
    return _ORDINARY * numbers.median(earlier) if earlier else 0.0


def _limit(column: Column) -> float:
    return _NAMES_LIMIT if column.categorical else _NUMBERS_LIMIT


def _share(kind: str, column: str, value: str | None, a: tuple[float, int], b: tuple[float, int], limit: float, what: str) -> Compared:
    """A share of so many, against that of last month."""
    last, this = a[0] / max(a[1], 1), b[0] / max(b[1], 1)
    return Compared(kind, column, value, last, this, abs(this - last), limit, _z(a, b), f"{this:.1%} {what}, {last:.1%} last month")


def _z(a: tuple[float, int], b: tuple[float, int]) -> float:
    """Of two proportions, counts and of how many."""
    if not (a[1] and b[1]) or not 0 < (pooled := (a[0] + b[0]) / (a[1] + b[1])) < 1:
        return 0.0
    return abs(a[0] / a[1] - b[0] / b[1]) / math.sqrt(pooled * (1 - pooled) * (1 / a[1] + 1 / b[1]))


def _distribution(kind: str, column: Column, a: Sketch, b: Sketch, limit: float) -> Compared:
    """How the values of a column are distributed, missing ones apart."""
    against = "last month" if kind == DRIFT else "in training"
    if column.categorical:
        counts = a.counts, b.counts
        values = counts[0].keys() | counts[1].keys()
        value = max(values, key=lambda value: (abs(counts[1].get(value, 0) / b.known - counts[0].get(value, 0) / a.known), value))
        old, new = (count.get(value, 0) for count in counts)
        last, this, z = old / a.known, new / b.known, _z((old, a.known), (new, b.known))
        told = f"{value!r} is {this:.1%} of the rows, {last:.1%} {against}"
        return Compared(kind, column.name, value, last, this, abs(this - last), limit, z, told, len(values))
    edges = np.unique((a + b).ranks[:: 1000 // _BINS])
    p, q = (np.diff(statistics.shares_up_to(sketch, edges[:-1]), prepend=0, append=1) for sketch in (a, b))
    last, this = a.total / a.known, b.total / b.known
    distance = _divergence(p, q, 0.5) / math.log(2)
    # The likelihood ratio of the two being one; as chi-squared, by Wilson and Hilferty's cube root.
    ratio, freedom = 2 * (a.known + b.known) * _divergence(p, q, a.known / (a.known + b.known)), max(len(edges) - 1, 1)
    z = ((ratio / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    told = f"mean {this:.4g}, {last:.4g} {against}"
    return Compared(kind, column.name, None, last, this, distance, limit, z, told)


def _divergence(p: np.ndarray, q: np.ndarray, weight: float) -> float:
    """Jensen-Shannon divergence in nats, with that weight of the first."""
    middle = weight * p + (1 - weight) * q
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = weight * np.nan_to_num(p * np.log(p / middle)) + (1 - weight) * np.nan_to_num(q * np.log(q / middle))
    return max(float(parts.sum()), 0.0)


def _clicks(before: Sketches, now: Sketches, contract: Contract) -> Iterator[Compared]:
    """Click rates, of all labelled rows and by the values of segments and position."""
    outcome = contract.clicked or contract.clicks
    if not outcome or any(column and (LABELLED, column.name, None) not in before for column in (outcome, contract.impressions)):
        return
    for key in [key for key in now if key[0] == LABELLED and key in before and (key[2] is not None or key[1] == outcome.name)]:
        (old, old_squared, old_shown), (new, new_squared, new_shown) = (_told(sketches, key, contract) for sketches in (before, now))
        if old_shown and new_shown:
            last, this = old / old_shown, new / new_shown
            # Half a click more, so that there is a logarithm of none.
            distance = abs(math.log((new + 0.5) / new_shown * old_shown / (old + 0.5)))
            # As if both were of one rate; clicks that come in lots are as many fewer.
            lots, rate = max(old_squared + new_squared, 1) / max(old + new, 1), (old + new) / (old_shown + new_shown)
            error = math.sqrt(rate * max(lots, 1) * (1 / old_shown + 1 / new_shown)) or math.inf
            value = None if key[2] is None else f"{key[1]}={key[2]}"
            told = f"{this:.3%} of impressions are clicked, {last:.3%} last month"
            yield Compared(DRIFT, outcome.name, value, last, this, distance, _CLICKS_LIMIT, abs(this - last) / error, told)


def _told(sketches: Sketches, key: statistics.Key, contract: Contract) -> tuple[float, float, float]:
    """Clicks, the sum of their squares, and impressions."""
    sketch = sketches[key]
    if key[2] is not None:
        return sketch.clicks, sketch.clicks_squared, sketch.impressions
    shown = sketches[LABELLED, contract.impressions.name, None].total if contract.impressions else sketch.known
    return sketch.total, sketch.squares, shown


def _undelivered(before: Sketches, now: Sketches, image: str, limit: float) -> Iterator[Compared]:
    """Of the image names in rows, those that were not delivered."""
    shares, error = [], 0.0
    for month in (before, now):
        named, delivered = statistics.of_all(month).get(image, Sketch()), statistics.in_slice(month, IMAGES).get("name", Sketch())
        if not named.unique:
            return
        shares.append(statistics.exchanged(delivered, named)[0])
        error = math.hypot(error, _unique_error(named, delivered), math.sqrt(shares[-1] * (1 - shares[-1]) / named.unique))
    told = f"{shares[1]:.1%} of the images that rows name were not delivered, {shares[0]:.1%} last month"
    distance = abs(shares[1] - shares[0])
    yield Compared(FAULTS, image, "missing", shares[0], shares[1], distance, limit, distance / max(error, 1e-9), told)


def _unique_error(a: Sketch, b: Sketch) -> float:
    """Standard error of what is told of three distinct counts, relative; 0 where they are exact."""
    return math.sqrt(3 / statistics.DISTINCT) if (a + b).unique >= statistics.DISTINCT else 1e-9


def _nearest(asked: np.ndarray, seen: np.ndarray, rank: int) -> np.ndarray:
    """The distance of each to the nearest that was seen, or the one of that rank from it; float (asked,)."""
    out = []
    for start in range(0, len(asked), 512):
        some = asked[start : start + 512]
        squared = np.sum(some**2, 1)[:, None] - 2 * some @ seen.T + np.sum(seen**2, 1)
        out.append(np.partition(squared, rank, axis=1)[:, rank])
    return np.sqrt(np.maximum(np.concatenate(out), 0))


def _embedded(run: MonthRun, month: str, id: str) -> dict[str, np.ndarray]:
    """Embeddings by creative of some of a month's images, by the run's encoder: shards in order until there are enough."""
    manifest = lake.read_manifest(run.storage, lake.embeddings_folder(run.encoder, month, id))
    found: dict[str, np.ndarray] = {}
    for receipt in manifest.receipts if manifest else ():
        for batch in read_parquet(run.storage, receipt.file) if receipt.file and len(found) < _SEEN else ():
            known = batch.filter(batch["embedding"].is_valid())
            found.update(zip(known["creative"].to_pylist(), embedding_matrix(known["embedding"]), strict=True))
    return {creative: found[creative] for creative in sorted(found)[:_SEEN]}


def _usual(storage: Storage, month: str) -> Usual:
    """As the runs that were last published of the months before have it."""
    months = [lake.month_after(month, -back) for back in range(1, _TRAILING + 1)]
    published = [last for earlier in months if (last := lake.last_publication(storage, earlier))]
    documents = [storage.read_json(f"{lake.run_folder(last.month, last.run)}/drift.json") for last in published]
    rows = [row for document in documents if document for row in document["compared"]]
    return lambda kind, column, value: [
        row["distance"] for row in rows if (row["kind"], row["column"]) == (kind, column) and value in (None, row["value"])
    ]
