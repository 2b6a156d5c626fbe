"""Sketches against exact answers, and the proto against its own parser."""

import itertools
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tensorflow_metadata.proto.v0 import statistics_pb2
from test_drift import CONTRACT, pictures_of, rows_of, sketched_images

from beam_jobs import statistics
from beam_jobs.statistics import DISTINCT, IMAGES, LABELLED, QUANTILE_ERROR, TOP_VALUES, Sketch, Sketches
from model import images
from schemas import contract as contracts
from schemas.contract import Column, Contract
from schemas.sample import write_months
from schemas.storage import Folder

MONTH = "2026-08"
ADS, CREATIVES = (1_000_000, 3_000) if os.environ.get("ADSTOCRAT_LONG") else (30_000, 200)
PARTS = 7


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, dict[str, bytes], Sketches]:
    """Rows, pictures, and sketches that were merged from parts, written and read."""
    storage = Folder(str(tmp_path_factory.mktemp("sample")))
    write_months(storage, [MONTH], ADS, CREATIVES, 5, lambda line: None)
    rows, pictures = rows_of(storage, MONTH), pictures_of(storage, MONTH)
    edges = np.linspace(0, len(rows), PARTS + 1).astype(int).tolist()
    parts = [rows.slice(start, end - start) for start, end in itertools.pairwise(edges)]
    of_images = sketched_images(pictures)
    for number, part in enumerate(parts):
        statistics.write(storage, f"part-{number}", statistics.of_rows(part, CONTRACT) | (of_images if number == 0 else {}))
    return rows, pictures, statistics.merged(statistics.read(storage, f"part-{number}") for number in range(PARTS))


def numbers(values: pa.ChunkedArray) -> np.ndarray:
    return values.drop_null().cast(pa.float64()).to_numpy()


def check_ranks(sketch: Sketch, values: np.ndarray) -> None:
    """Each quantile lies where the exact ranks on either side of it say, to within the sketch's error."""
    ordered, error = np.sort(values), QUANTILE_ERROR + 1 / len(values)
    wanted = np.linspace(0, 1, len(sketch.ranks))
    assert (np.searchsorted(ordered, sketch.ranks, "left") / len(ordered) <= wanted + error).all()
    assert (np.searchsorted(ordered, sketch.ranks, "right") / len(ordered) >= wanted - error).all()


def test_sketches_of_rows_are_the_exact_answers(month: tuple[pa.Table, dict[str, bytes], Sketches]) -> None:
    rows, _, sketches = month
    for name, sketch in statistics.of_all(sketches).items():
        values, column = rows[name], next(column for column in CONTRACT.kept if column.name == name)
        assert (sketch.rows, sketch.missing) == (len(rows), values.null_count)
        exact = len(pc.unique(values.drop_null()))
        assert sketch.unique == exact if exact < DISTINCT else sketch.unique == pytest.approx(exact, rel=0.05)
        if column.categorical and not column.tags & {"key", "image"}:
            counts = {found["values"]: found["counts"] for found in values.cast(pa.string()).value_counts().to_pylist()}
            assert len(counts) > TOP_VALUES or sketch.counts == counts
            common = {value for value, count in counts.items() if count > len(rows) / 100}
            assert {value: sketch.counts[value] for value in common} == {value: counts[value] for value in common}
        elif not column.categorical:
            array = numbers(values)
            assert (sketch.low, sketch.high, sketch.zeros) == (array.min(), array.max(), (array == 0).sum())
            assert sketch.total / sketch.known == pytest.approx(array.mean())
            assert statistics.variance(sketch) == pytest.approx(array.var())
            check_ranks(sketch, array)


def test_outcomes_by_value_are_exact(month: tuple[pa.Table, dict[str, bytes], Sketches]) -> None:
    rows, _, sketches = month
    labelled = rows.filter(pc.and_(rows["clicks"].is_valid(), pc.greater(rows["impressions"], 0)))
    assert statistics.in_slice(sketches, LABELLED)["bid"].rows == len(labelled) < len(rows)
    for name in ("format", "placement", "device", "position"):
        sums = labelled.group_by(name).aggregate([("clicks", "sum"), ("impressions", "sum"), ("clicks", "count")]).to_pylist()
        told = {
            value: (s.clicks, s.impressions, s.rows) for (_, column, value), s in sketches.items() if column == name and value is not None
        }
        assert told == {str(row[name]): (row["clicks_sum"], row["impressions_sum"], row["clicks_count"]) for row in sums}


def test_sketches_of_images_are_the_exact_answers(month: tuple[pa.Table, dict[str, bytes], Sketches]) -> None:
    _, pictures, sketches = month
    found = statistics.in_slice(sketches, IMAGES)
    brightness = np.array([images.decode(data)[0].mean() / 255 for data in pictures.values()])
    assert found["fault"].counts == {"ok": len(pictures)} and found["name"].unique == len(pictures)
    assert found["size"].total == sum(map(len, pictures.values())) and found["aspect"].low == found["aspect"].high == pytest.approx(
        400 / 210
    )
    assert found["brightness"].total == pytest.approx(brightness.sum(), rel=1e-6)
    check_ranks(found["brightness"], brightness.astype(np.float32))


def test_numbers_that_all_differ_and_names_past_the_bound_keep_to_the_stated_error() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(300_000)
    parts = [statistics.of_column(pa.array(part), categorical=False) for part in np.array_split(values, 5)]
    check_ranks(statistics.added(parts), values)
    # One name in fifty, and so many others that they cannot all be counted.
    names = [f"n{number}" for number in range(4 * TOP_VALUES)] * 2
    names += ["often"] * (len(names) // 50)
    shuffled = pa.array(names).take(pa.array(rng.permutation(len(names))))
    merged = statistics.added(
        statistics.of_column(shuffled.slice(start, 30_000), categorical=True) for start in range(0, len(names), 30_000)
    )
    first = next(iter(merged.counts))
    assert first == "often" and abs(merged.counts[first] - len(names[8 * TOP_VALUES :])) <= len(names) / TOP_VALUES
    assert len(merged.counts) <= TOP_VALUES


def test_the_proto_is_read_back_by_its_own_parser(month: tuple[pa.Table, dict[str, bytes], Sketches], tmp_path: pathlib.Path) -> None:
    rows, pictures, sketches = month
    path = tmp_path / "statistics.pb"
    path.write_bytes(statistics.to_proto(sketches, CONTRACT).SerializeToString())
    found = statistics_pb2.DatasetFeatureStatisticsList()
    assert found.ParseFromString(path.read_bytes()) == path.stat().st_size and found.IsInitialized()
    datasets = {dataset.name: dataset for dataset in found.datasets}
    assert {name: dataset.num_examples for name, dataset in datasets.items()} == {
        "rows": len(rows),
        "labelled": len(rows) - datasets["unlabelled"].num_examples,
        "unlabelled": datasets["unlabelled"].num_examples,
        "images": len(pictures),
    }
    features = {feature.name: feature for feature in datasets["rows"].features}
    assert set(features) == {column.name for column in CONTRACT.kept}
    bid, device = features["bid"].num_stats, features["device"].string_stats
    assert bid.mean == pytest.approx(numbers(rows["bid"]).mean()) and bid.common_stats.num_non_missing == len(rows)
    for histogram in bid.histograms:
        assert sum(bucket.sample_count for bucket in histogram.buckets) == pytest.approx(len(rows))
        assert (histogram.buckets[0].low_value, histogram.buckets[-1].high_value) == (bid.min, bid.max)
    counts = {found["values"]: found["counts"] for found in rows["device"].value_counts().to_pylist()}
    assert {top.value: top.frequency for top in device.top_values} == counts and device.unique == len(counts)
    shown = next(custom for custom in {f.name: f for f in datasets["labelled"].features}["device"].custom_stats if custom.name == "clicks")
    assert {bucket.label for bucket in shown.rank_histogram.buckets} == set(counts)


def test_an_empty_unit_has_statistics_too() -> None:
    contract = Contract((Column("a", "bytes", frozenset({"key"})), Column("b", "bytes", frozenset({"key"})), Column("x", "float")))
    empty = statistics.of_rows(pa.table({"key": pa.array([], pa.string()), **{n: pa.array([], t) for n, t in types(contract)}}), contract)
    one = statistics.of_rows(pa.table({"key": ["1|2"], "a": ["1"], "b": ["2"], "x": [None]}, schema(contract)), contract)
    merged = statistics.of_all(statistics.merged([empty, one]))
    assert merged["key"].rows == merged["x"].missing == 1 and merged["key"].unique == 1
    assert statistics.to_proto(empty, contract).datasets[0].num_examples == 0


def types(contract: Contract) -> list[tuple[str, pa.DataType]]:
    return [(column.name, column.arrow_type) for column in contract.kept]


def schema(contract: Contract) -> pa.Schema:
    return pa.schema([("key", pa.string()), *types(contract)])


def test_a_comparator_of_the_wrong_kind_is_an_error_that_names_it() -> None:
    text = 'feature { name: "k" type: BYTES annotation { tag: "key" } }\nfeature { name: "bid" type: FLOAT %s }'
    with pytest.raises(contracts.ContractError, match=r"'bid' is a number, and its drift_comparator .* expected jensen_shannon_divergence"):
        contracts.parse(text % "drift_comparator { infinity_norm { threshold: 0.1 } }")
    with pytest.raises(contracts.ContractError, match="threshold above 0 and up to 1"):
        contracts.parse(text % "skew_comparator { jensen_shannon_divergence { threshold: 2 } }")
    parsed = contracts.parse(text % "skew_comparator { jensen_shannon_divergence { threshold: 0.3 } }")
    assert parsed.columns[1].skew == 0.3 and contracts.parse(contracts.dumps(parsed)) == parsed
    assert parsed.fingerprint == contracts.parse(text % "").fingerprint
