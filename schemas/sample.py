"""Sample months with a known truth: an inventory of ads, its pictures and, beside them, the click probabilities behind the clicks.

The true log-odds of a click at the reference position have standard deviation 1 over the rows. `SHARES` splits their variance: a third
is the creative's, most of it from properties planted in the picture, a fifth from what no picture shows, a tenth from properties that
work differently by device and placement. Two thirds are the columns', some of it from pairs of them.

A month follows from the month before it: advertisers, creatives and ads leave and others come, and what stays keeps its name and its
effects. So a month is the same whatever months are asked for after it, and the outcomes of a month judge the scores of the one before.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from schemas import lake
from schemas.hashing import hash64, hash64_column
from schemas.sample_images import Picture, write_pictures
from schemas.storage import Storage

VERSION = 1  # changes with the bytes that the same arguments give
CLICK_RATE = 0.02
MEAN_IMPRESSIONS, IMPRESSIONS_SPREAD = 8.0, 1.2  # the spread is the standard deviation of an ad's log impressions
NEW_ADVERTISERS, NEW_CREATIVES, KEPT_ADS = 0.05, 0.25, 0.70
MISSING_IMAGES, UNLABELLED, MONTHLY_SHIFT = 0.02, 0.10, 0.1
ROWS_PER_FILE = 250_000

DEVICES, DEVICE_ODDS = ("mobile", "desktop", "tablet", "tv"), (0.55, 0.3, 0.1, 0.05)
FORMATS = ("banner", "rectangle", "skyscraper", "leaderboard", "native")
PLACEMENTS, MAX_CAMPAIGNS = 48, 8
# Log-odds at positions 1 to 6 against the reference position 1, and what share of a month's rows is there.
POSITION_EFFECTS = (0.0, -0.25, -0.45, -0.6, -0.75, -0.9)
POSITION_SHARES = (0.25, 0.22, 0.18, 0.15, 0.12, 0.08)

SHARES = {
    "advertiser": 0.14,
    "campaign": 0.11,
    "placement": 0.11,
    "device": 0.05,
    "format": 0.04,
    "hour": 0.05,
    "bid": 0.06,
    "advertiser_device": 0.05,
    "format_placement": 0.17 / 3,
    "visible": 0.7 / 3,
    "interaction": 0.1 / 3,
    "invisible": 0.2 / 3,
}
PROPERTIES = ("call_to_action", "face", "clutter", "text", "hue")
# The visible effect by property: mean, variance and signed share of the visible variance.
VISIBLE = {
    "call_to_action": (0.5, 0.25, 0.30),
    "face": (0.4, 0.24, 0.30),
    "clutter": (4.0, 80 / 12, -0.15),
    "text": (2.0, 2.0, -0.15),
    "warmth": (0.0, 0.5, 0.10),
}

# Columns of equal length, shape (n,) or (n, k), by name.
Table = dict[str, np.ndarray]


def write_months(storage: Storage, months: Sequence[str], ads: int, creatives: int, seed: int, progress: Callable[[str], None]) -> None:
    """Write seeded sample months into a lake: raw files as an agency delivers them, and the truth beside them.

    A month that is there already, whole and with the same arguments, is left alone. Pictures are drawn in spawned processes.

    Args:
        months: YYYY-MM, in order; gaps are allowed.
        ads: rows a month.
        creatives: images a month, at most `ads`.
        seed: not negative; with the other arguments it decides every byte.
        progress: called now and then with a short line.

    Raises:
        ValueError: an argument out of range, or a month's folder holds something else; nothing is written.
    """
    for month in months:
        lake.check_month(month)
    if not months or list(months) != sorted(set(months)):
        raise ValueError(f"months {list(months)} are empty or out of order; expected each once, the earliest first")
    if not 20 <= creatives <= ads:
        raise ValueError(f"{creatives} creatives for {ads} ads; expected at least 20 creatives and at least one ad for each")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; expected 0 or more")
    # A month depends on those before it, so they are among its parameters.
    shared = {"version": VERSION, "seed": seed, "ads": ads, "creatives": creatives}
    parameters = {month: {**shared, "months": list(months[: i + 1])} for i, month in enumerate(months)}
    written = {month for month in months if _is_written(storage, month, parameters[month])}
    population = world = None
    for month in months:
        rng = _rng(seed, month)
        population = _next_population(population, rng, ads, creatives)
        world = world or _calibrated(_rng(seed, "world"), population)
        if month in written:
            progress(f"{month}: already there")
            continue
        _write_rows(storage, month, population, _outcome(world, population, rng))
        _write_creatives(storage, month, population.creatives, world.scaled(_creative_parts(population.creatives)))
        for drawn in write_pictures(storage, _pictures(month, population.creatives, seed)):
            progress(f"{month}: {ads:,} rows, {drawn:,} images")
        files = len(storage.names(f"raw/{month}/"))
        storage.write_json(f"truth/sample-{month}.json", {**parameters[month], "files": files})


def _is_written(storage: Storage, month: str, parameters: dict[str, Any]) -> bool:
    """Whether the month is there, whole and the same; its record, written last, says so."""
    folder, record = f"raw/{month}/", storage.read_json(f"truth/sample-{month}.json")
    files = len(storage.names(folder))
    if not files:
        return False
    if record == {**parameters, "files": files} and storage.names(lake.truth(month)):
        return True
    expected = f"expected no file, or the sample month {parameters}; remove the folder or name another month"
    raise ValueError(f"{storage.url(folder)} holds {files:,} files of which the record is {record}; {expected}")


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, hash64(purpose.encode())])


@dataclasses.dataclass(frozen=True)
class _Population:
    """A month's inventory.

    Attributes:
        month: 0 for the first. A `number` below is unique over all months.
        shift: the month's shift of all log-odds.
        advertisers: number, weight, campaigns (how many), effect, effects by campaign (n, MAX_CAMPAIGNS) and by device (n, devices).
        creatives: number, advertiser (a row of `advertisers`), weight, delivered, invisible effect, and the planted properties.
        ads: number, creative (a row of `creatives`), campaign (counted within the advertiser), the categories, hour, bid, volume.
    """

    month: int
    shift: float
    advertisers: Table
    creatives: Table
    ads: Table


def _next_population(before: _Population | None, rng: np.random.Generator, ads: int, creatives: int) -> _Population:
    """The inventory of the month after `before`, or of the first month."""
    none = np.empty(0, np.int64)
    if before is None:
        before = _Population(-1, 0.0, _new_advertisers(rng, none), _new_creatives(rng, none, none), _new_ads(rng, none, none, none))
    month = before.month + 1
    step = rng.uniform(-MONTHLY_SHIFT, MONTHLY_SHIFT) if month else 0.0
    shift = float(np.clip(before.shift + step, -MONTHLY_SHIFT, MONTHLY_SHIFT))

    size = max(5, creatives // 12)
    stay, moved = _staying(rng, np.ones(len(before.advertisers["number"]), bool), size - round(NEW_ADVERTISERS * size))
    advertiser_table = _append(before.advertisers, stay, _new_advertisers(rng, month * size + np.arange(size - len(stay))))

    owner = moved[before.creatives["advertiser"]]
    stay, moved = _staying(rng, owner >= 0, creatives - round(NEW_CREATIVES * creatives))
    owners = _share_out(rng, creatives - len(stay), advertiser_table["weight"], owner[stay])
    brought = _new_creatives(rng, month * creatives + np.arange(len(owners)), owners)
    creative_table = _append({**before.creatives, "advertiser": owner}, stay, brought)

    shown = moved[before.ads["creative"]]
    stay, _ = _staying(rng, shown >= 0, round(KEPT_ADS * ads))
    drawn = _share_out(rng, ads - len(stay), creative_table["weight"], shown[stay])
    campaigns = advertiser_table["campaigns"][creative_table["advertiser"][drawn]]
    ad_table = _append({**before.ads, "creative": shown}, stay, _new_ads(rng, month * ads + np.arange(len(drawn)), drawn, campaigns))
    return _Population(month, shift, advertiser_table, creative_table, _take(ad_table, rng.permutation(ads)))


def _take(table: Table, rows: np.ndarray) -> Table:
    return {name: column[rows] for name, column in table.items()}


def _append(old: Table, stay: np.ndarray, new: Table) -> Table:
    return {name: np.concatenate([old[name][stay], column]) for name, column in new.items()}


def _staying(rng: np.random.Generator, able: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` random rows that are `able` to stay; and, for every old row, its new one or -1."""
    stay = np.sort(rng.permutation(np.flatnonzero(able))[:count])
    moved = np.full(len(able), -1)
    moved[stay] = np.arange(len(stay))
    return stay, moved


def _share_out(rng: np.random.Generator, count: int, weight: np.ndarray, holders: np.ndarray) -> np.ndarray:
    """Owners of `count` new things: first whoever holds none, then in proportion to what `holders` lack of their share by weight."""
    held = np.bincount(holders, minlength=len(weight))
    lacking = np.flatnonzero(held == 0)
    room = np.maximum((count + len(holders)) * weight / weight.sum() - np.maximum(held, 1), 1e-9)
    return np.concatenate([lacking, rng.choice(len(weight), count - len(lacking), p=room / room.sum())])


def _new_advertisers(rng: np.random.Generator, numbers: np.ndarray) -> Table:
    count = len(numbers)
    return {
        "number": numbers,
        "weight": np.exp(0.7 * rng.standard_normal(count)),
        "campaigns": np.minimum(1 + rng.poisson(3.0, count), MAX_CAMPAIGNS),
        "effect": rng.standard_normal(count),
        "by_campaign": rng.standard_normal((count, MAX_CAMPAIGNS)),
        "by_device": rng.standard_normal((count, len(DEVICES))),
    }


def _new_creatives(rng: np.random.Generator, numbers: np.ndarray, advertisers: np.ndarray) -> Table:
    count = len(numbers)
    hue = rng.random(count)
    return {
        "number": numbers,
        "advertiser": advertisers,
        "weight": np.exp(1.1 * rng.standard_normal(count)),
        "delivered": rng.permutation(count) >= round(MISSING_IMAGES * count),
        "invisible": rng.standard_normal(count),
        "call_to_action": (rng.random(count) < 0.5).astype(np.int64),
        "face": (rng.random(count) < 0.4).astype(np.int64),
        "clutter": rng.integers(0, 9, count),
        "text": rng.integers(0, 5, count),
        "hue": hue,
        "warmth": np.cos(2 * np.pi * hue),  # how near the hue is to red, which is what counts of it
    }


def _new_ads(rng: np.random.Generator, numbers: np.ndarray, creatives: np.ndarray, campaigns: np.ndarray) -> Table:
    """Ads of given creatives, each in one of the `campaigns` (how many, shape (n,)) of its advertiser."""
    count = len(numbers)
    crowd = 1 / (8 + np.arange(PLACEMENTS))
    return {
        "number": numbers,
        "creative": creatives,
        "campaign": (campaigns * rng.random(count) ** 1.3).astype(np.int64),
        "format": rng.integers(0, len(FORMATS), count),
        "placement": rng.choice(PLACEMENTS, count, p=crowd / crowd.sum()),
        "device": rng.choice(len(DEVICES), count, p=DEVICE_ODDS),
        "hour": rng.triangular(0, 17, 24, count).astype(np.int64),
        "bid": np.round(0.01 + 0.6 * np.exp(0.6 * rng.standard_normal(count)), 2),
        "volume": rng.standard_normal(count),
    }


@dataclasses.dataclass(frozen=True)
class _World:
    """What is the same in every month.

    Attributes:
        tables: effects of formats, placements and so on, before scaling.
        mean, scale: by part of `SHARES`, what turns it into log-odds; set by the first month.
        intercept: log-odds of an average row at the reference position, before the month's shift.
    """

    tables: Table
    mean: dict[str, float] = dataclasses.field(default_factory=dict)
    scale: dict[str, float] = dataclasses.field(default_factory=dict)
    intercept: float = 0.0

    def scaled(self, parts: Table) -> Table:
        return {name: (part - self.mean.get(name, 0.0)) * self.scale.get(name, 1.0) for name, part in parts.items()}

    def parts(self, population: _Population) -> Table:
        """Log-odds of every row by part, shape (ads,) each."""
        advertisers, creatives, ads, tables = population.advertisers, population.creatives, population.ads, self.tables
        creative, placement, device = ads["creative"], ads["placement"], ads["device"]
        advertiser = creatives["advertiser"][creative]
        angle = 2 * np.pi * ads["hour"] / 24
        face, button = (creatives["face"] - 0.4)[creative], (creatives["call_to_action"] - 0.5)[creative]
        parts = {
            "advertiser": advertisers["effect"][advertiser],
            "campaign": advertisers["by_campaign"][advertiser, ads["campaign"]],
            "placement": tables["placement"][placement],
            "device": tables["device"][device],
            "format": tables["format"][ads["format"]],
            "hour": np.cos(angle - 5.2) + 0.4 * np.cos(2 * angle - 1.0),
            "bid": np.tanh(1.3 * np.log(ads["bid"] / 0.6)),
            "advertiser_device": advertisers["by_device"][advertiser, device],
            "format_placement": tables["format_placement"][ads["format"], placement],
            "interaction": 2 * face * ((device == 0) - DEVICE_ODDS[0]) + button * tables["button_placement"][placement],
            **_take(_creative_parts(creatives), creative),
        }
        return self.scaled(parts)


def _creative_parts(creatives: Table) -> Table:
    """What a creative has by itself, before scaling, shape (creatives,) each."""
    visible = np.zeros(len(creatives["number"]))
    for name, (mean, variance, share) in VISIBLE.items():
        visible += np.sign(share) * np.sqrt(abs(share) / variance) * (creatives[name] - mean)
    return {"visible": visible, "invisible": creatives["invisible"]}


def _probability(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


def _calibrated(rng: np.random.Generator, first: _Population) -> _World:
    """A world in which the first month has the variances of `SHARES`, 1 in all, and the click rate."""
    singles = {"placement": PLACEMENTS, "device": len(DEVICES), "format": len(FORMATS), "button_placement": PLACEMENTS}
    tables = {name: rng.standard_normal(size) for name, size in singles.items()}
    tables["format_placement"] = rng.standard_normal((len(FORMATS), PLACEMENTS))
    parts = _World(tables).parts(first)
    mean = {name: float(part.mean()) for name, part in parts.items()}
    scale = {name: float(np.sqrt(SHARES[name]) / max(part.std(), 1e-9)) for name, part in parts.items()}
    # The parts are nearly but not quite uncorrelated, so their sum is scaled once more.
    spread = float(np.sum(list(_World(tables, mean, scale).parts(first).values()), axis=0).std())
    world = _World(tables, mean, {name: value / spread for name, value in scale.items()})
    log_odds = np.sum(list(world.parts(first).values()), axis=0)
    log_odds += np.asarray(POSITION_EFFECTS)[_positions(rng, first, log_odds)]
    volume, intercept = np.exp(IMPRESSIONS_SPREAD * first.ads["volume"]), 0.0
    for _ in range(20):
        intercept += float(np.log(CLICK_RATE / np.average(_probability(log_odds + intercept), weights=volume)))
    return dataclasses.replace(world, intercept=intercept)


def _positions(rng: np.random.Generator, population: _Population, log_odds: np.ndarray) -> np.ndarray:
    """Position of every ad, 0 the best: an auction by bid and by a quality that is known in part."""
    score = np.log(population.ads["bid"] / 0.6) + 0.3 * log_odds + 0.7 * rng.standard_normal(len(log_odds))
    rank = np.argsort(np.argsort(-score, kind="stable"), kind="stable")
    return np.searchsorted(np.cumsum(POSITION_SHARES)[:-1], (rank + 0.5) / len(score))


def _outcome(world: _World, population: _Population, rng: np.random.Generator) -> Table:
    """What happens to every ad of the month, and why, shape (ads,) each."""
    parts = world.parts(population)
    total = np.sum(list(parts.values()), axis=0)
    reference = total + world.intercept + population.shift
    position = _positions(rng, population, total)
    p_click = _probability(reference + np.asarray(POSITION_EFFECTS)[position])
    impressions = rng.poisson(MEAN_IMPRESSIONS * np.exp(IMPRESSIONS_SPREAD * population.ads["volume"] - IMPRESSIONS_SPREAD**2 / 2))
    of_creative = {name: parts[name] for name in ("visible", "interaction", "invisible")}
    return {
        "position": position + 1,
        "impressions": impressions,
        "clicks": rng.binomial(impressions, p_click),
        "unlabelled": rng.permutation(len(total)) < round(UNLABELLED * len(total)),
        "p_click": p_click,
        "p_click_reference": _probability(reference),
        "columns": reference - sum(of_creative.values()),
        **of_creative,
    }


def _names(prefix: str, numbers: np.ndarray, digits: int, suffix: str = "") -> pa.Array:
    return pc.binary_join_element_wise(prefix, pc.utf8_lpad(pc.cast(pa.array(numbers), pa.string()), digits, "0"), suffix, "")


def _image_names(creatives: Table) -> pa.Array:
    return _names("cr", creatives["number"], 8, ".jpg")


def _write_rows(storage: Storage, month: str, population: _Population, outcome: Table) -> None:
    """The CSV files, and the truth of their rows: probabilities, impressions (of unlabelled rows too) and parts of the log-odds."""
    parts = np.array_split(np.arange(len(outcome["position"])), max(2, -(-len(outcome["position"]) // ROWS_PER_FILE)))
    truths, unquoted = [], pyarrow.csv.WriteOptions(quoting_style="none", quoting_header="none")
    for part, rows in enumerate(parts):
        ads, seen = _take(population.ads, rows), _take(outcome, rows)
        creatives = _take({name: population.creatives[name] for name in ("number", "advertiser")}, ads["creative"])
        advertiser = population.advertisers["number"][creatives["advertiser"]]
        columns = {
            "ad_id": _names("ad", ads["number"], 9),
            "advertiser": _names("adv", advertiser, 6),
            "campaign": _names("cmp", advertiser * MAX_CAMPAIGNS + ads["campaign"], 7),
            "format": pa.array(FORMATS).take(pa.array(ads["format"])),
            "placement": _names("slot", ads["placement"], 2),
            "device": pa.array(DEVICES).take(pa.array(ads["device"])),
            "hour": ads["hour"],
            "bid": ads["bid"],
            "position": seen["position"],
            "image": _image_names(creatives),
            "impressions": pa.array(seen["impressions"], mask=seen["unlabelled"]),
            "clicks": pa.array(seen["clicks"], mask=seen["unlabelled"]),
        }
        pyarrow.csv.write_csv(pa.table(columns), stream := io.BytesIO(), unquoted)
        storage.write(f"{lake.raw_ads(month)}ads-{part:05d}-of-{len(parts):05d}.csv", stream.getvalue())
        known = ("p_click", "p_click_reference", "impressions", "columns", "visible", "interaction", "invisible")
        truths.append(pa.table({**{name: columns[name] for name in ("ad_id", "image")}, **{name: seen[name] for name in known}}))
    storage.write(lake.truth(month), _parquet(pa.concat_tables(truths)))


def _write_creatives(storage: Storage, month: str, creatives: Table, effects: Table) -> None:
    """The truth of the month's pictures: properties, whether delivered, and effects in log-odds."""
    properties = {name: creatives[name] for name in (*PROPERTIES, "warmth", "delivered")}
    storage.write(f"truth/creatives-{month}.parquet", _parquet(pa.table({"name": _image_names(creatives), **properties, **effects})))


def _parquet(table: pa.Table) -> bytes:
    pq.write_table(table, stream := io.BytesIO())
    return stream.getvalue()


def _pictures(month: str, creatives: Table, seed: int) -> list[Picture]:
    """The month's delivered pictures. A picture's seed is its number's, so it is drawn the same in every month."""
    there = _take(creatives, creatives["delivered"])
    names = [lake.raw_images(month) + name for name in _image_names(there).to_pylist()]
    seeds = hash64_column(pa.array([f"{seed} {number}" for number in there["number"]])).tolist()
    return [Picture(*values) for values in zip(names, seeds, *(there[name].tolist() for name in PROPERTIES), strict=True)]
