"""What a month's scores tell a person: their distribution, who moved since the month before, the best and worst creatives.

The scores are streamed. Of the month before one hash and one probability a key are held, of up to `_KEYS_HELD` keys: of a larger
month a fixed share of all keys, the same in both months, is compared.
"""

import base64
import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from beam_jobs.run import MonthRun, StageError
from model import images
from schemas import lake
from schemas.contract import Contract
from schemas.hashing import hash64_column
from schemas.lake import Manifest
from schemas.parquet import NARROW_CHUNK, read_columns
from schemas.storage import Storage

# Impressions below which little is known of a key or a creative.
LOW_EVIDENCE = 100
EDGES = np.logspace(-5, 0, 101)
EVIDENCE = ("never shown", f"fewer than {LOW_EVIDENCE} impressions", f"{LOW_EVIDENCE} impressions or more")
_COLUMNS = ["key", "p_click", "creative", "image_status", "evidence_key", "evidence_creative"]
# Of each fault.
EXAMPLES = 6
_KEYS_HELD = 8_000_000
_MOVERS, _GALLERY, _GROUPS, _GROUPS_HELD = 8, 12, 2, 2_000_000
# A group of fewer ads moves by chance.
_GROUP_ADS = 30


@dataclasses.dataclass
class Month:
    """One run's scores.

    Attributes:
        month: which.
        rows, mean: how many, and their mean probability.
        histogram: rows by probability, int64, in the bins of `EDGES`.
        evidence: rows and summed probability by what is known of the key, and in the last column the rows whose creative was never shown
            either: float64 (3, 3).
        creatives: of each creative `ads`, `mean`, `evidence`, and an example of a `key`.
        groups: by column, of each value `ads`, `mean` and an example of a `creative`.
        missing: some images that rows name and that are not there, with a row's key.
        hashes, probabilities: of the keys that are held, sorted by hash.
        step: one key in so many is held.
        moved: who moved since the month before; None without one.
    """

    month: str
    rows: int
    mean: float
    histogram: np.ndarray
    evidence: np.ndarray
    creatives: pa.Table
    groups: dict[str, pa.Table]
    missing: dict[str, str]
    hashes: np.ndarray
    probabilities: np.ndarray
    step: int
    moved: "Moved | None" = None


@dataclasses.dataclass
class Moved:
    """Who moved since the month before.

    Attributes:
        up, down: of the keys that moved most, what `_COLUMNS` say and `before`.
        both, new, gone: keys that are in both months, in this one alone, and in that one alone; of the keys that are compared.
        groups: by column, of the values that moved most `value`, `ads`, `mean`, `before` and `creative`.
    """

    up: list[dict]
    down: list[dict]
    both: int
    new: int
    gone: int
    groups: dict[str, list[dict]]


def grouping(contract: Contract) -> list[str]:
    """The columns that ads are grouped by: those with a history, such as the advertiser, else the first names that are no segment."""
    tagged = [column.name for column in contract.columns if "history" in column.tags]
    plain = [column.name for column in contract.features if column.kind == "bytes" and column not in contract.segments]
    return (tagged or plain)[:_GROUPS]


def read(run: MonthRun, before: Month | None = None, missing_images: bool = True) -> Month | None:
    """A run's scores, against those of the month before; None where they are not there, whole."""
    scores, rows = run.left("scores"), run.left("rows")
    if not scores or not scores.rows:
        return None
    columns, image = grouping(run.contract), run.contract.image if missing_images else None
    # The same share in both months, and by the larger: what is held of one is looked for in the other.
    step = max(before.step if before else 1, -(-scores.rows // _KEYS_HELD))
    total, histogram, evidence = 0.0, np.zeros(len(EDGES) - 1, np.int64), np.zeros((3, 3))
    creatives, held, moved = [], [], []
    groups: dict[str, list[pa.Table]] = {name: [] for name in columns}
    missing: dict[str, str] = {}
    both = compared = 0
    for batch, of_rows in _batches(run.storage, scores, rows, [*columns, *([image.name] if image else [])]):
        p, known = batch["p_click"].to_numpy(), batch["evidence_key"].to_numpy()
        total += float(p.sum())
        histogram += np.histogram(p.clip(EDGES[0], EDGES[-1]), EDGES)[0]
        classes = np.minimum(known, 1) + (known >= LOW_EVIDENCE)
        unseen = batch["evidence_creative"].to_numpy() == 0
        evidence += np.stack([np.bincount(classes, weights, 3) for weights in (np.ones(len(p)), p, unseen)], axis=1)
        table = pa.Table.from_batches([batch])
        creatives.append(_summed(table, "creative", [("evidence_creative", "max"), ("key", "first")]))
        for name in of_rows.keys() & groups.keys():
            groups[name].append(_summed(table.append_column("value", of_rows[name]), "value", [("creative", "first")]))
            if sum(map(len, groups[name])) > _GROUPS_HELD:
                groups[name] = [_compacted(groups[name], "value")]
                if 2 * len(groups[name][0]) > _GROUPS_HELD:
                    del groups[name]  # Too many to hold.
        if image and image.name in of_rows and len(missing) < EXAMPLES:
            absent = pc.equal(batch["image_status"], images.MISSING)
            named = zip(of_rows[image.name].filter(absent).to_pylist(), batch["key"].filter(absent).to_pylist(), strict=True)
            missing |= dict(itertools.islice(named, EXAMPLES))
        hashes = hash64_column(batch["key"])
        chosen = np.flatnonzero(hashes % np.uint64(step) == 0) if step > 1 else np.arange(len(hashes))
        held.append((hashes[chosen], p[chosen]))
        if before:
            compared += len(chosen)
            at = np.searchsorted(before.hashes, hashes[chosen]).clip(max=len(before.hashes) - 1)
            there = before.hashes[at] == hashes[chosen]
            chosen, earlier = chosen[there], before.probabilities[at[there]]
            both += len(chosen)
            moved.append(_extremes(table, chosen, earlier))
    hashes, probabilities = (np.concatenate(arrays) for arrays in zip(*held, strict=True))
    order = np.argsort(hashes)
    found = Month(
        run.month,
        scores.rows,
        total / scores.rows,
        histogram,
        evidence,
        _merged(creatives, "creative", {"evidence_creative_max": "evidence", "key_first": "key"}),
        {name: _merged(tables, "value", {"creative_first": "creative"}) for name, tables in groups.items() if tables},
        dict(itertools.islice(missing.items(), EXAMPLES)),
        hashes[order],
        probabilities[order],
        step,
    )
    if not before:
        return found
    all_moved = pa.concat_tables(moved)
    difference = pc.subtract(all_moved["p_click"], all_moved["before"])
    order = pc.sort_indices(difference)
    some = min(_MOVERS, len(order) // 2)
    gone = int((before.hashes % np.uint64(step) == 0).sum()) - both
    found.moved = Moved(
        all_moved.take(order[len(order) - some :][::-1]).to_pylist(),
        all_moved.take(order[:some]).to_pylist(),
        both,
        compared - both,
        gone,
        {name: _moved_groups(found.groups[name], before.groups[name]) for name in columns if {name} <= found.groups.keys() & before.groups},
    )
    return found


def _batches(storage: Storage, scores: Manifest, rows: Manifest | None, columns: Sequence[str]) -> Iterator[tuple]:
    """Batches of scores, each with those columns of its rows; none of them where the rows are gone."""
    files = {receipt.unit: receipt.file for receipt in rows.receipts} if rows else {}
    unit, of_unit = "", None
    for receipt in sorted(scores.receipts, key=lambda receipt: receipt.unit):
        name, _, start = receipt.unit.rpartition("@")
        if name != unit:
            unit, of_unit = name, None
            if columns and files.get(name):
                of_unit = pa.Table.from_batches(read_columns(storage, files[name], ["key", *columns]))
        at = int(start)
        for batch in read_columns(storage, receipt.file, _COLUMNS):
            part = of_unit.slice(at, len(batch)).combine_chunks() if of_unit else None
            if part and not part["key"].combine_chunks().equals(batch["key"]):
                raise StageError(f"{storage.url(receipt.file)} has other keys than {storage.url(files[name])} from row {at} on")
            yield batch, {column: part[column] for column in columns} if part else {}
            at += len(batch)


def _summed(table: pa.Table, by: str, more: Sequence[tuple[str, str]]) -> pa.Table:
    return table.group_by(by, use_threads=False).aggregate([("p_click", "count"), ("p_click", "sum"), *more])


def _compacted(tables: list[pa.Table], by: str) -> pa.Table:
    """Several parts of `_summed` as one: counts and sums add up, the first and the greatest stay what they are."""
    columns = [name for name in tables[0].column_names if name != by]
    kept = {name: suffix for name in columns if (suffix := name.rpartition("_")[2]) in ("first", "max")}
    how = [(name, kept.get(name, "sum")) for name in columns]
    found = pa.concat_tables(tables).group_by(by, use_threads=False).aggregate(how)
    return found.select([by, *map("_".join, how)]).rename_columns([by, *columns])


def _merged(tables: list[pa.Table], by: str, named: Mapping[str, str]) -> pa.Table:
    """The parts as one table, by `by`: `ads`, `mean`, and of the parts' columns those that `named` has, under the names it gives."""
    table = _compacted(tables, by)
    table = table.filter(pc.is_valid(table[by]))
    ads = table["p_click_count"]
    more = {new: table[name] for name, new in named.items()}
    return pa.table({by: table[by], "ads": ads, "mean": pc.divide(table["p_click_sum"], ads.cast(pa.float64())), **more})


def _extremes(table: pa.Table, chosen: np.ndarray, before: np.ndarray) -> pa.Table:
    """Of the chosen rows those that moved most, either way, with what they had `before`."""
    difference = table["p_click"].to_numpy()[chosen] - before
    order = np.argsort(difference)
    ends = order if len(order) <= 2 * _MOVERS else np.concatenate([order[:_MOVERS], order[-_MOVERS:]])
    return table.take(pa.array(chosen[ends])).append_column("before", pa.array(before[ends]))


def _moved_groups(this: pa.Table, last: pa.Table) -> list[dict]:
    both = this.join(last.select(["value", "ads", "mean"]), "value", join_type="inner", right_suffix="_before")
    both = both.filter(pc.greater_equal(pc.min_element_wise(both["ads"], both["ads_before"]), _GROUP_ADS))
    by = pc.negate(pc.abs(pc.subtract(both["mean"], both["mean_before"])))
    both = both.append_column("by", by).sort_by([("by", "ascending"), ("value", "ascending")]).slice(0, 2 * _MOVERS)
    return both.rename_columns({"mean_before": "before"}).to_pylist()


def galleries(creatives: pa.Table) -> dict[str, list[dict]]:
    """Creatives to look at: the `best` and `worst` of those with evidence, and the best of those `low` in it and of those `never` shown."""
    known = creatives.filter(pc.greater_equal(creatives["evidence"], LOW_EVIDENCE))
    low = creatives.filter(pc.and_(pc.greater(creatives["evidence"], 0), pc.less(creatives["evidence"], LOW_EVIDENCE)))
    never = creatives.filter(pc.equal(creatives["evidence"], 0))
    few = min(_GALLERY, len(known) // 2)

    def first(table: pa.Table, order: str, some: int) -> list[dict]:
        return table.sort_by([("mean", order), ("creative", "ascending")]).slice(0, some).to_pylist()

    return {
        "best": first(known, "descending", few),
        "worst": first(known, "ascending", few),
        "low": first(low, "descending", _GALLERY // 2),
        "never": first(never, "descending", _GALLERY // 2),
    }


def thumbnails(storage: Storage, creatives: set[str]) -> dict[str, str]:
    """The pictures of creatives as data URIs; those that have none are left out."""
    from PIL import Image

    found: dict[str, str] = {}
    wanted = pa.array(sorted(creatives), pa.string())
    receipts = lake.pack_receipts(storage, "creatives/") if creatives else []
    # The newest first: what is asked for was mostly delivered lately.
    for receipt in sorted((receipt for receipt in receipts if receipt.file), key=lambda receipt: receipt.file, reverse=True):
        if len(found) == len(creatives):
            break
        with storage.open(receipt.file, NARROW_CHUNK) as stream, pq.ParquetFile(pa.PythonFile(stream, "r")) as pack:
            for i in range(pack.num_row_groups):
                names = pack.read_row_group(i, ["creative"])["creative"]
                hits = pc.is_in(names, wanted)
                if not pc.any(hits).as_py():
                    continue
                pixels = pack.read_row_group(i, ["thumbnail"])["thumbnail"].filter(hits)
                for creative, data in zip(names.filter(hits).to_pylist(), pixels, strict=True):
                    if data.is_valid and creative not in found:
                        out = io.BytesIO()
                        size = (images.THUMBNAIL_SIZE, images.THUMBNAIL_SIZE)
                        Image.frombytes("RGB", size, data.as_py()).save(out, "WEBP", quality=70)
                        found[creative] = f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
    return found
