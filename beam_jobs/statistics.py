"""Statistics of a month's rows and images: mergeable sketches, a small file beside each unit of work, and the proto that they become.

The units' files lie under `statistics/<month>/<run>/units/`, named as the files of rows and of the creatives' index that they tell of; so a
receipt that counts says which of them count. `merge` makes of them `statistics.pb`, a `DatasetFeatureStatisticsList` that TFDV and
Facets read, and `sketches.parquet`, which later months are compared with and the run's page draws.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.run import MonthRun
from model.features import outcomes
from schemas import lake
from schemas.ahead import each_ahead
from schemas.contract import Contract
from schemas.parquet import ParquetFile, read_parquet
from schemas.storage import Storage

if TYPE_CHECKING:
    from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList

FOLDER, PROTO, SKETCHES = "statistics", "statistics.pb", "sketches.parquet"
# Rows with an outcome, rows without, and the images that the month has.
LABELLED, UNLABELLED, IMAGES = "labelled", "unlabelled", "images"
# A quantile's rank is off by less than this share of the rows; of a column with more values than this many, counts are off by less than
# one in so many rows; a distinct count is exact up to this many, and beyond off by 1.6 % or so.
QUANTILE_ERROR, TOP_VALUES, DISTINCT = 0.001, 16_384, 4_096
_TOP_SHOWN, _BUCKETS, _RANKS, _MOST_SLICES, _SAMPLE = 100, 20, 1_000, 1_000, 4_096


@dataclasses.dataclass(frozen=True)
class Sketch:
    """What is known of one column's values; immutable, and added with `+`.

    Attributes:
        rows, missing: how many, with and without a value; how many have none.
        zeros: numbers that are 0.
        total, squares: sums of the numbers and of their squares, or of the texts' lengths in bytes.
        low, high: the least and the greatest number.
        quantiles, top, distinct: serialized sketches of tfx-bsl; empty where there is none.
        clicks, clicks_squared, impressions: of a column's value: sums over its labelled rows.
    """

    rows: int = 0
    missing: int = 0
    zeros: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    quantiles: bytes = b""
    top: bytes = b""
    distinct: bytes = b""
    clicks: float = 0.0
    clicks_squared: float = 0.0
    impressions: float = 0.0

    def __add__(self, other: "Sketch") -> "Sketch":
        return added([self, other])

    @property
    def known(self) -> int:
        return self.rows - self.missing

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """Quantiles of the numbers at equal steps of rank, the first the least; empty where there is none."""
        if not self.known or not self.quantiles:
            return np.empty(0)
        return np.asarray(_quantiles(self.quantiles).GetQuantiles(_RANKS).flatten())

    @functools.cached_property
    def counts(self) -> dict[str, float]:
        """The commonest values and how often each is there, the commonest first."""
        if not self.top:
            return {}
        from tfx_bsl.sketches import MisraGriesSketch

        found = MisraGriesSketch.Deserialize(self.top).Estimate()
        return {value.decode(): count for value, count in zip(found.field(0).to_pylist(), found.field(1).to_pylist(), strict=True)}

    @property
    def unique(self) -> int:
        """About how many distinct values there are."""
        from tfx_bsl.sketches import KmvSketch

        return KmvSketch.Deserialize(self.distinct).Estimate() if self.distinct else 0


# By slice, column and, for what happened to the rows of one value, that value.
Key = tuple[str, str, str | None]
Sketches = dict[Key, Sketch]
_SKETCH: dict[Any, pa.DataType] = {int: pa.int64(), float: pa.float64(), bytes: pa.binary()}
_FIELDS = [(field.name, _SKETCH[field.type]) for field in dataclasses.fields(Sketch)]
_STATE = pa.schema([("slice", pa.string()), ("column", pa.string()), ("value", pa.string()), *_FIELDS])


def _quantiles(state: bytes = b"") -> Any:
    from tfx_bsl.sketches import QuantilesSketch

    if not state:
        return QuantilesSketch(QUANTILE_ERROR, 1 << 32, 1)
    # It has no other way back from its state.
    sketch = QuantilesSketch.__new__(QuantilesSketch)
    sketch.__setstate__(state)
    return sketch


def added(sketches: Iterable[Sketch]) -> Sketch:
    """The sketch of all their rows."""
    from tfx_bsl.sketches import KmvSketch, MisraGriesSketch

    parts = list(sketches)
    if len(parts) == 1:
        return parts[0]
    sums: dict[str, Any] = {
        name: (min if name == "low" else max if name == "high" else sum)(getattr(part, name) for part in parts)
        for name, kind in _FIELDS
        if kind != pa.binary()
    }
    for name, load in (("quantiles", _quantiles), ("top", MisraGriesSketch.Deserialize), ("distinct", KmvSketch.Deserialize)):
        first, *others = [load(getattr(part, name)) for part in parts if getattr(part, name)] or [None]
        for other in others:
            first.Merge(other)
        sums[name] = b"" if first is None else first.__getstate__() if name == "quantiles" else first.Serialize()
    return Sketch(**sums)


def of_column(values: pa.Array, categorical: bool, top: bool = True) -> Sketch:
    """Sketch one column; `top` is false of names that nearly all differ."""
    return _by_group(values, _coded(values), np.zeros(len(values), np.int64), 1, categorical, top)[0]


# The distinct values, and which of them each row has, from 1; 0 where it has none. Shape (rows,), int64.
_Coded = tuple[pa.Array, np.ndarray]


def _coded(values: pa.Array) -> _Coded | None:
    """A column that is cheaper to count than to sketch row by row; None where most values differ."""
    sample = values.slice(0, _SAMPLE)
    if 2 * len(pc.unique(sample)) > len(sample):
        return None
    coded = values.dictionary_encode()
    return coded.dictionary, pc.fill_null(coded.indices, -1).to_numpy().astype(np.int64) + 1


def _by_group(values: pa.Array, coded: _Coded | None, group: np.ndarray, groups: int, categorical: bool, top: bool) -> list[Sketch]:
    """Sketches of the values of each group of rows, by its number; `categorical` and `top` as `of_column` has them."""
    rows = np.bincount(group, minlength=groups).tolist()
    if coded is None:
        parts = [values.filter(pa.array(group == number)).drop_null() for number in range(groups)]
        return [_sketch(part, np.ones(len(part)), rows[number], categorical, top) for number, part in enumerate(parts)]
    distinct, codes = coded
    counts = np.bincount(codes * groups + group, minlength=groups * (len(distinct) + 1)).reshape(-1, groups)[1:]
    found = [np.flatnonzero(counts[:, number]) for number in range(groups)]
    return [_sketch(distinct.take(pa.array(at)), counts[at, number], rows[number], categorical, top) for number, at in enumerate(found)]


def _sketch(values: pa.Array, counts: np.ndarray, rows: int, categorical: bool, top: bool) -> Sketch:
    """Of values, none of them null, that are there so many times each, among so many rows."""
    from tfx_bsl.sketches import KmvSketch, MisraGriesSketch

    values = values.cast(pa.string()) if categorical else values
    distinct, known = KmvSketch(DISTINCT), int(counts.sum())
    distinct.AddValues(values)
    made = Sketch(rows, rows - known, distinct=distinct.Serialize())
    # Exact, as a unit has far fewer rows than a float32 can count.
    weights = pa.array(counts.astype(np.float32))
    if categorical:
        names = MisraGriesSketch(TOP_VALUES)
        if top:
            names.AddValues(values, weights)
        total = float(pc.binary_length(values).to_numpy() @ counts)
        return dataclasses.replace(made, total=total, top=names.Serialize() if top else b"")
    numbers, sketch = values.cast(pa.float64()), _quantiles()
    array = numbers.to_numpy()
    if len(array):
        sketch.AddValues(numbers, weights)
        made = dataclasses.replace(made, low=float(array.min()), high=float(array.max()))
    sketch.Compact()
    total, squares, zeros = float(array @ counts), float(array**2 @ counts), int(counts[array == 0].sum())
    return dataclasses.replace(made, zeros=zeros, total=total, squares=squares, quantiles=sketch.__getstate__())


def of_rows(table: pa.Table, contract: Contract) -> Sketches:
    """Sketch a unit's rows, as ingest has them, and count clicks by the values of segments and position."""
    batch = next(iter(table.combine_chunks().to_batches()), pa.RecordBatch.from_pylist([], table.schema))
    clicks, impressions = (array.astype(np.float64) for array in outcomes(batch, contract))
    group, out = (impressions <= 0).astype(np.int64), Sketches()
    sliced = (*contract.segments, contract.position)
    named = {column.name: (batch[column.name], column) for column in contract.kept}
    for name, (values, column) in (named | {key_of(contract): (batch["key"], contract.key[0])}).items():
        coded, names = _coded(values), bool(column.tags & {"key", "image"})
        made = _by_group(values, coded, group, 2, names or column.categorical, top=not names)
        out |= {(slice_, name, None): sketch for slice_, sketch in zip((LABELLED, UNLABELLED), made, strict=True)}
        if column in sliced and coded and len(coded[0]) < _MOST_SLICES:
            # What is not labelled has none of these.
            weights = (impressions > 0, clicks, clicks**2, impressions)
            sums = [np.bincount(coded[1], weight, len(coded[0]) + 1).tolist() for weight in weights]
            for value, rows, *told in zip(["", *coded[0].cast(pa.string()).to_pylist()], *sums, strict=True):
                if rows:
                    totals = dict(zip(("clicks", "clicks_squared", "impressions"), told, strict=True))
                    out[LABELLED, name, value] = Sketch(int(rows), **totals)
    return out


def key_of(contract: Contract) -> str:
    """What the key is called: as its column, or `key` where it has several."""
    return contract.key[0].name if len(contract.key) == 1 else "key"


def of_images(name: pa.Array, size: pa.Array, aspect: pa.Array, brightness: pa.Array, fault: pa.Array) -> Sketches:
    """Sketch a month's images: bytes, width over height, mean brightness (0 to 1), and what is wrong with them (`ok` where nothing is)."""
    numbers = {"size": size, "aspect": aspect, "brightness": brightness}
    return {
        **{(IMAGES, name, None): of_column(values, categorical=False) for name, values in numbers.items()},
        (IMAGES, "name", None): of_column(name, categorical=True, top=False),
        (IMAGES, "fault", None): of_column(fault, categorical=True),
    }


def unit_file(file: str) -> str:
    """Where the sketches of what is in a stage's file lie: `rows/2026-10/RUN/x.parquet` has those of its rows in
    `statistics/2026-10/RUN/units/rows/x.parquet`."""
    stage, month, run, name = file.split("/")
    return f"{lake.stage_folder(FOLDER, month, run)}/units/{stage}/{name}"


def write(storage: Storage, name: str, sketches: Mapping[Key, Sketch]) -> None:
    rows = [dict(zip(_STATE.names[:3], key, strict=True)) | vars(sketch) for key, sketch in sketches.items()]
    with tempfile.TemporaryDirectory(prefix="adstocrat-") as temporary:
        path = pathlib.Path(temporary) / SKETCHES
        batch = pa.RecordBatch.from_pylist(rows, _STATE)
        with ParquetFile(path, batch) as writer:
            writer.write(batch)
        storage.upload(path, name)


def read(storage: Storage, name: str) -> Sketches:
    rows = [row for batch in read_parquet(storage, name) for row in batch.to_pylist()]
    return {(row.pop("slice"), row.pop("column"), row.pop("value")): Sketch(**row) for row in rows}


def merged(parts: Iterable[Sketches]) -> Sketches:
    out: dict[Key, list[Sketch]] = {}
    for part in parts:
        for key, sketch in part.items():
            out.setdefault(key, []).append(sketch)
            # Few at a time in memory.
            if len(out[key]) == 16:
                out[key] = [added(out[key])]
    return {key: added(sketches) for key, sketches in out.items()}


def merge(run: MonthRun) -> Sketches:
    """Bring the units' sketches of the run together, unless that is done, and write them and the proto."""
    folder = run.stage(FOLDER)
    if not run.storage.names(f"{folder}/{PROTO}"):
        told = [receipt for stage in ("rows", "creatives") for receipt in run.manifest(run.stage(stage)).receipts]
        files = [receipt.file for receipt in told if receipt.file and not receipt.unit.startswith("file/")]
        threads = run.config.fetch_threads
        sketches = merged(each_ahead(functools.partial(read, run.storage), map(unit_file, files), threads, 2 * threads))
        write(run.storage, f"{folder}/{SKETCHES}", sketches)
        run.storage.write(f"{folder}/{PROTO}", to_proto(sketches, run.contract).SerializeToString())
    return of_run(run.storage, run.month, run.id)


def of_run(storage: Storage, month: str, id: str) -> Sketches:
    """The sketches of a run that `merge` has brought together; none where there are none."""
    name = f"{lake.stage_folder(FOLDER, month, id)}/{SKETCHES}"
    return read(storage, name) if storage.names(name) else {}


def of_all(sketches: Sketches) -> dict[str, Sketch]:
    """By column, of all rows, with an outcome or without."""
    columns = dict.fromkeys(column for slice_, column, value in sketches if slice_ != IMAGES and value is None)
    both = {column: [sketches.get((name, column, None)) for name in (LABELLED, UNLABELLED)] for column in columns}
    return {column: added(part for part in parts if part) for column, parts in both.items()}


def in_slice(sketches: Sketches, name: str) -> dict[str, Sketch]:
    """By column, of one slice."""
    return {column: sketch for (slice_, column, value), sketch in sketches.items() if slice_ == name and value is None}


def to_proto(sketches: Sketches, contract: Contract) -> "DatasetFeatureStatisticsList":
    """The statistics of all rows, of those with an outcome and those without, and of the images, as TFDV and Facets read them.

    A column's clicks and impressions by value are `custom_stats` of it: rank histograms with the values as labels.
    """
    from tensorflow_metadata.proto.v0 import statistics_pb2 as proto

    out = proto.DatasetFeatureStatisticsList()
    kind_of = {column.name: column.kind for column in contract.kept}
    kind_of_images = {"size": "int", "aspect": "float", "brightness": "float"}
    for name, by_column in (("rows", of_all(sketches)), *((name, in_slice(sketches, name)) for name in (LABELLED, UNLABELLED, IMAGES))):
        dataset = out.datasets.add(name=name, num_examples=max((sketch.rows for sketch in by_column.values()), default=0))
        for column, sketch in by_column.items():
            feature = dataset.features.add(name=column)
            if not sketch.quantiles:
                feature.type = proto.FeatureNameStatistics.STRING
                _string(feature.string_stats, sketch)
            else:
                kind = (kind_of_images if name == IMAGES else kind_of)[column]
                feature.type = proto.FeatureNameStatistics.Type.Value(kind.upper())
                _numeric(feature.num_stats, sketch)
                feature.custom_stats.add(name="distinct", num=sketch.unique)
            shown = {value: s for (slice_, of, value), s in sketches.items() if (slice_, of) == (name, column) and value is not None}
            for sums in ("impressions", "clicks") if shown else ():
                histogram = feature.custom_stats.add(name=sums).rank_histogram
                for rank, value in enumerate(sorted(shown, key=lambda value: -shown[value].impressions)):
                    histogram.buckets.add(low_rank=rank, high_rank=rank, label=value, sample_count=getattr(shown[value], sums))
    return out


def _common(stats: Any, sketch: Sketch) -> None:
    stats.num_non_missing, stats.num_missing, stats.tot_num_values = sketch.known, sketch.missing, sketch.known
    stats.min_num_values = stats.max_num_values = stats.avg_num_values = int(sketch.known > 0)


def _string(stats: Any, sketch: Sketch) -> None:
    _common(stats.common_stats, sketch)
    stats.unique, stats.avg_length = sketch.unique, sketch.total / max(sketch.known, 1)
    for rank, (value, count) in enumerate(list(sketch.counts.items())[:_TOP_SHOWN]):
        stats.top_values.add(value=value, frequency=count)
        stats.rank_histogram.buckets.add(low_rank=rank, high_rank=rank, label=value, sample_count=count)


def _numeric(stats: Any, sketch: Sketch) -> None:
    from tensorflow_metadata.proto.v0.statistics_pb2 import Histogram

    _common(stats.common_stats, sketch)
    if not sketch.known:
        return
    stats.mean, stats.num_zeros, stats.min, stats.max = sketch.total / sketch.known, sketch.zeros, sketch.low, sketch.high
    stats.std_dev, stats.median = float(np.sqrt(variance(sketch))), float(sketch.ranks[_RANKS // 2])
    equal, quantiles = np.linspace(sketch.low, sketch.high, _BUCKETS // 2 + 1), sketch.ranks[:: _RANKS // _BUCKETS]
    in_equal = np.diff(shares_up_to(sketch, equal[1:-1]), prepend=0, append=1)
    for kind, edges, shares in (
        (Histogram.STANDARD, equal, in_equal),
        (Histogram.QUANTILES, quantiles, np.full(_BUCKETS, 1 / _BUCKETS)),
    ):
        histogram = stats.histograms.add(type=kind)
        for low, high, share in zip(edges[:-1].tolist(), edges[1:].tolist(), shares.tolist(), strict=True):
            histogram.buckets.add(low_value=low, high_value=high, sample_count=share * sketch.known)


def variance(sketch: Sketch) -> float:
    """Of the numbers."""
    return max(sketch.squares / sketch.known - (sketch.total / sketch.known) ** 2, 0.0)


def shares_up_to(sketch: Sketch, edges: np.ndarray) -> np.ndarray:
    """The share of the numbers up to each edge, to within `QUANTILE_ERROR` and as much again."""
    return np.clip((np.searchsorted(sketch.ranks, edges, "right") - 1) / (len(sketch.ranks) - 1), 0, 1) if len(sketch.ranks) else edges * 0


def exchanged(before: Sketch, now: Sketch) -> tuple[float, float]:
    """Of a column of names: the share of this month's that are new, and the share of last month's that are gone."""
    both = max(before.unique + now.unique - (before + now).unique, 0)
    return 1 - min(both / max(now.unique, 1), 1), 1 - min(both / max(before.unique, 1), 1)
