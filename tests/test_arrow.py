import functools
import pathlib
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest

from beam_jobs import arrow
from beam_jobs.arrow import CommitStage, RecordBatchCoder, Repartition, ShardPair, Unit, WriteUnits, pair_shards, read_table, read_unit
from beam_jobs.runner import run_pipeline
from schemas import lake
from schemas.lake import Manifest, Receipt
from schemas.parquet import read_parquet
from schemas.storage import Folder

ROWS = 3000


@pytest.fixture
def storage(tmp_path: pathlib.Path) -> Folder:
    return Folder(str(tmp_path))


# --- coder --------------------------------------------------------------------------------------------------------------------------------

ODD_BATCHES = {
    "plain": pa.RecordBatch.from_pydict({"key": ["a", None, ""], "n": [1, 2, None]}),
    "null column": pa.RecordBatch.from_pydict({"nothing": pa.nulls(3), "n": [1.0, float("nan"), float("inf")]}),
    "fixed-size list": pa.RecordBatch.from_pydict({"embedding": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))}),
    "nested": pa.RecordBatch.from_pydict({"deep": pa.array([{"a": [1, None], "b": {"c": "x"}}, None, {"a": [], "b": None}])}),
    "fixed-size binary": pa.RecordBatch.from_pydict({"thumbnail": pa.array([b"abc", None, b"\0\0\0"], pa.binary(3))}),
    "dictionary": pa.RecordBatch.from_pydict({"word": pa.array(["x", "y", "x"]).dictionary_encode()}),
    "not nullable": pa.RecordBatch.from_arrays([pa.array(["a", "b", "c"])], schema=pa.schema([pa.field("key", pa.string(), False)])),
}


@pytest.mark.parametrize("name", ODD_BATCHES)
def test_coder_gives_back_what_it_took(name: str) -> None:
    batch, coder = ODD_BATCHES[name], RecordBatchCoder()
    for part in (batch, batch.slice(1), batch.slice(1, 1), batch.slice(0, 0)):
        again = coder.decode(coder.encode(part))
        assert again.schema.equals(part.schema, check_metadata=True)
        assert again.to_pydict().keys() == part.to_pydict().keys() and str(again.to_pylist()) == str(part.to_pylist())


def test_a_slice_costs_its_own_rows_only() -> None:
    batch = pa.RecordBatch.from_pydict({"key": [f"{i:0100d}" for i in range(50_000)], "n": np.arange(50_000)})
    part, coder = batch.slice(1000, 10), RecordBatchCoder()
    assert len(coder.encode(part)) < 10_000 < len(pickle.dumps(part))
    assert coder.estimate_size(part) == part.nbytes < 10_000


def test_coder_is_registered_for_batches_and_what_holds_them() -> None:
    for hint in (pa.RecordBatch, beam.typehints.Tuple[str, pa.RecordBatch]):
        coder = beam.coders.registry.get_coder(hint)
        assert "RecordBatchCoder" in str(coder)
        value: Any = ODD_BATCHES["plain"] if hint is pa.RecordBatch else ("unit@0", ODD_BATCHES["plain"])
        assert coder.decode(coder.encode(value)) == value


# --- Repartition --------------------------------------------------------------------------------------------------------------------------


def numbered(start: int, rows: int) -> pa.RecordBatch:
    numbers = np.arange(start, start + rows)
    return pa.RecordBatch.from_pydict({"n": numbers, "text": pa.array([f"row {n}" for n in numbers.tolist()], pa.string())})


def batches_from(start: int, rows: int = ROWS, size: int = 200) -> Iterator[pa.RecordBatch]:
    """That many rows in batches, one of them empty, one a slice of a bigger one."""
    yield numbered(0, 0)
    yield numbered(start - 50, size + 100).slice(50, size)
    for begin in range(start + size, start + rows, size):
        yield numbered(begin, min(size, start + rows - begin))


def modulo(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    return batch["n"].to_numpy() % shards


def mostly(batch: pa.RecordBatch, hot: int) -> np.ndarray:
    """Nine rows of ten in one shard, the others in shard 0."""
    return np.where(batch["n"].to_numpy() % 10 == 0, 0, hot)


def scattered(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    """Few shards get rows, the first and the last none."""
    return 1 + (batch["n"].to_numpy() % 3) * ((shards - 2) // 3)


def save(found: list[Any], storage: Folder, name: str) -> None:
    storage.write(name, pickle.dumps(found))


def collect(storage: Folder, define: Callable[[beam.Pipeline], beam.PCollection], name: str = "found.pickle") -> list[Any]:
    """What a pipeline's PCollection holds."""
    run_pipeline(lambda root: define(root) | "Found" >> beam.combiners.ToList() | "Save" >> beam.Map(save, storage, name), [])
    return pickle.loads(storage.read(name))


def units_of(
    storage: Folder, shards: int, assign: Callable[[pa.RecordBatch], np.ndarray], unit_rows: int | None, starts: Iterable[int] = (100,)
) -> list[Unit]:
    def define(root: beam.Pipeline) -> beam.PCollection:
        batches = root | beam.Create(list(starts), reshuffle=False) | beam.FlatMap(batches_from).with_output_types(pa.RecordBatch)
        return batches | "Bring" >> Repartition(storage, "spill", shards, assign, unit_rows)

    return sorted(collect(storage, define), key=lambda unit: unit.name)


def read_all(storage: Folder, units: Iterable[Unit]) -> dict[int, list[int]]:
    """Sorted numbers by shard; the other column must have stayed beside its number."""
    found = defaultdict(list)
    for unit in units:
        for batch in read_unit(storage, unit):
            assert batch["text"].to_pylist() == [f"row {n}" for n in batch["n"].to_pylist()]
            found[unit.shard] += batch["n"].to_pylist()
    return {shard: sorted(numbers) for shard, numbers in found.items()}


def direct(assign: Callable[[pa.RecordBatch], np.ndarray], starts: Iterable[int] = (100,)) -> dict[int, list[int]]:
    whole = pa.Table.from_batches([batch for start in starts for batch in batches_from(start)]).combine_chunks().to_batches()[0]
    shard_of_row, found = assign(whole), defaultdict(list)
    for shard, number in zip(shard_of_row.tolist(), whole["n"].to_pylist(), strict=True):
        found[shard].append(number)
    return {shard: sorted(numbers) for shard, numbers in found.items()}


@pytest.mark.parametrize(
    ("shards", "assign", "spill_bytes", "files"),
    [
        (1, modulo, 1, 15),
        (2, modulo, 20_000, None),
        (7, modulo, arrow.SPILL_BYTES, 1),
        (5000, modulo, 30_000, None),
        (64, scattered, 1, 15),
    ],
)
def test_each_shard_gets_its_rows(
    storage: Folder, monkeypatch: pytest.MonkeyPatch, shards: int, assign: Callable[..., np.ndarray], spill_bytes: int, files: int | None
) -> None:
    monkeypatch.setattr(arrow, "SPILL_BYTES", spill_bytes)
    of_row = functools.partial(assign, shards=shards)
    units = units_of(storage, shards, of_row, arrow.UNIT_ROWS)
    assert read_all(storage, units) == direct(of_row)
    assert all(unit.part == 0 for unit in units) and len({unit.shard for unit in units}) == len(units)
    assert sum(section.rows for unit in units for section in unit.sections) == ROWS
    written = storage.names("spill/")
    assert {section.file for unit in units for section in unit.sections} == set(written)
    assert len(written) == files if files else 1 < len(written) < 15


@pytest.mark.parametrize("unit_rows", [180, 200, 500, 100_000, None])
def test_a_hot_shard_is_cut(storage: Folder, monkeypatch: pytest.MonkeyPatch, unit_rows: int | None) -> None:
    monkeypatch.setattr(arrow, "SPILL_BYTES", 1)
    hot = functools.partial(mostly, hot=3)
    units = units_of(storage, 4, hot, unit_rows)
    assert read_all(storage, units) == direct(hot)
    by_shard = {shard: [unit for unit in units if unit.shard == shard] for shard in (0, 3)}
    for parts in by_shard.values():
        assert [unit.part for unit in parts] == list(range(len(parts)))
        assert all(sum(section.rows for section in unit.sections) <= (unit_rows or ROWS) for unit in parts)
    # 15 sections of 180 rows each are as full as they can be.
    assert len(by_shard[3]) == (-(-15 // (unit_rows // 180)) if unit_rows else 1)


def test_parts_of_a_hot_shard_are_about_equal() -> None:
    """And no more than there have to be: what others have no room for is no unit of its own."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        rows = rng.integers(20_000, 60_000, rng.integers(20, 100)).tolist()
        sections = [arrow.Section(f"s{i}", 0, 1, count, f"{i:08x}") for i, count in enumerate(rows)]
        units = list(arrow.cut_into_units((7, sections), 600_000))
        assert [section for unit in units for section in unit.sections] == sections
        sizes = [sum(section.rows for section in unit.sections) for unit in units]
        assert max(sizes) <= 600_000 and min(sizes) > max(sizes) / 4
        assert len(units) <= -(-sum(rows) // (600_000 - 60_000))


def test_a_run_can_be_repeated_exactly(storage: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "SPILL_BYTES", 10_000)
    of_row = functools.partial(modulo, shards=3)
    first, again = (units_of(storage, 3, of_row, 400, starts) for starts in ((100, 9000), (100, 9000)))
    assert [unit.name for unit in first] == [unit.name for unit in again]
    for one, other in zip(first, again, strict=True):
        assert list(read_unit(storage, one)) == list(read_unit(storage, other))
        assert not {section.file for section in one.sections} & {section.file for section in other.sections}


def test_no_rows_no_units(storage: Folder) -> None:
    assert units_of(storage, 4, functools.partial(modulo, shards=4), None, starts=()) == []
    assert storage.names("spill/") == []


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_section_is_refused(storage: Folder, damage: str) -> None:
    batches = [numbered(0, 100)]
    pieces, addressed = arrow.spill_sections(arrow.by_shard(batches, 3, functools.partial(modulo, shards=3)), 3, "spill/a")
    data = b"".join(pieces)
    middle, last = addressed[1][1], addressed[2][1]
    at = last.offset + last.length // 2
    storage.write("spill/a", data[:at] if damage == "cut" else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert read_all(storage, [Unit(1, 0, (middle,))]) == {1: list(range(1, 100, 3))}
    with pytest.raises(OSError, match=r"spill .*spill/a at byte \d+ is damaged; run the stage again"):
        list(read_unit(storage, Unit(2, 0, (last,))))


# --- pair_shards --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right_rows", [0, 400])
def test_pairs_equal_a_direct_join(storage: Folder, monkeypatch: pytest.MonkeyPatch, right_rows: int) -> None:
    """Left has multiples of 3 modulo 8 shards of 0, 1, 2, 4, 5, 6; right has shards of 1, 2, 3, 5, 6, 7."""
    monkeypatch.setattr(arrow, "SPILL_BYTES", 2_000)

    def side(start: int, gone: int, rows: int) -> pa.RecordBatch:
        batch = numbered(start, rows)
        return batch.filter(pa.array(batch["n"].to_numpy() % 4 != gone))

    left, right = side(0, 3, 600), side(200, 0, right_rows)

    def define(root: beam.Pipeline) -> beam.PCollection:
        of_row = functools.partial(modulo, shards=8)
        sides = (
            root
            | f"Make{name}" >> beam.Create([batch.slice(at, 100) for at in range(0, len(batch), 100)])
            | f"Shard{name}" >> Repartition(storage, "spill", 8, of_row, unit_rows=30)
            for name, batch in (("Left", left), ("Right", right))
        )
        return pair_shards(*sides)

    pairs: list[ShardPair] = sorted(collect(storage, define), key=lambda pair: (pair.shard, pair.left[0].part))
    parts = {shard: [pair.left[0].part for pair in pairs if pair.shard == shard] for shard in range(8)}
    assert {shard for shard in parts if parts[shard]} == {0, 1, 2, 4, 5, 6}
    assert all(of_shard == list(range(len(of_shard))) and len(of_shard) > 1 for of_shard in parts.values() if of_shard)
    found = set()
    for pair in pairs:
        assert len(pair.left) == 1
        tables = [read_table(storage, units, left.schema) for units in (pair.left, pair.right)]
        assert tables[1].num_rows or pair.shard in (0, 4) or not right_rows
        found |= {(n, n in tables[1]["n"].to_pylist()) for n in tables[0]["n"].to_pylist()}
    assert found == {(n, n in set(right["n"].to_pylist())) for n in left["n"].to_pylist()}


# --- WriteUnits ---------------------------------------------------------------------------------------------------------------------------


def count_even(batch: pa.RecordBatch) -> dict[str, int]:
    return {"even": int((batch["n"].to_numpy() % 2 == 0).sum())}


@pytest.mark.parametrize(
    ("bundles", "expected"),
    [
        ([[("a", 0, 10), ("a", 10, 5)]], {"a@000000000": (0, 15)}),
        ([[("a", 0, 10), ("b", 0, 7), ("a", 10, 5)]], {"a@000000000": (0, 10), "b@000000000": (0, 7), "a@000000010": (10, 5)}),
        ([[("a", 0, 10)], [("a", 10, 5), ("a", 15, 1)]], {"a@000000000": (0, 10), "a@000000010": (10, 6)}),
        ([[("a", 10, 5), ("a", 0, 10)]], {"a@000000010": (10, 5), "a@000000000": (0, 10)}),
        ([[("with/slash@and at", 3, 2)]], {"with/slash@and at@000000003": (3, 2)}),
        ([[]], {}),
    ],
)
def test_write_units(storage: Folder, bundles: list[list[tuple[str, int, int]]], expected: dict[str, tuple[int, int]]) -> None:
    """A bundle is (unit, start, rows) batches; rows that follow each other in it share a file and a receipt."""
    writer, receipts = WriteUnits(storage, "out", count_even), []
    for bundle in bundles:
        writer.start_bundle()
        for unit, start, rows in bundle:
            receipts += list(writer.process((f"{unit}@{start}", numbered(start, rows))))
        receipts += [windowed.value for windowed in writer.finish_bundle()]
    assert {receipt.unit for receipt in receipts} == expected.keys()
    for receipt in receipts:
        start, rows = expected[receipt.unit]
        (found,) = read_parquet(storage, receipt.file)
        assert found == numbered(start, rows)
        assert (receipt.rows, receipt.counts) == (rows, count_even(numbered(start, rows)))
        assert receipt.crc32c == next(entry.crc32c for entry in storage.entries(receipt.file))
    assert sorted(storage.names("out/")) == sorted(receipt.file for receipt in receipts)


def named_batches(unit: str) -> Iterator[tuple[str, pa.RecordBatch]]:
    for start in range(0, 1000, 100):
        yield f"{unit}@{start}", numbered(start, 100)


def test_write_units_in_a_pipeline(storage: Folder) -> None:
    def define(root: beam.Pipeline) -> None:
        named = root | beam.Create(["a", "b", "c"]) | beam.FlatMap(named_batches).with_output_types(tuple[str, pa.RecordBatch])
        written = named | beam.ParDo(WriteUnits(storage, "out", count_even)).with_output_types(Receipt)
        _ = written | "Commit" >> CommitStage(storage, "out", "write")

    run_pipeline(define, [])
    manifest = lake.read_manifest(storage, "out")
    assert manifest is not None
    assert manifest.rows == 3000 and manifest.count("even") == 1500
    for unit in "abc":
        files = [receipt.file for receipt in manifest.receipts if receipt.unit.startswith(unit)]
        assert [n for file in files for batch in read_parquet(storage, file) for n in batch["n"].to_pylist()] == list(range(1000))


# --- CommitStage --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "receipts",
    [
        [],
        [Receipt("b", "b-1", 2, {"n": 1}, "x"), Receipt("a")],
        [Receipt("a", "a-2", 5), Receipt("b", "b-1", 2), Receipt("a", "a-1", 5), Receipt("a", "a-3", 5), Receipt("b", "b-1", 2)],
    ],
)
def test_commit_keeps_one_receipt_a_unit(storage: Folder, receipts: list[Receipt]) -> None:
    manifests = []
    for told in (receipts, receipts[::-1]):
        folder = f"stage-{len(manifests)}"

        def define(root: beam.Pipeline, told: list[Receipt] = told, folder: str = folder) -> beam.PCollection:
            return root | beam.Create(told) | "Commit" >> CommitStage(storage, folder, "stage", {"shards": 2})

        (returned,) = collect(storage, define)
        assert returned == lake.read_manifest(storage, folder)
        manifests.append(returned)
    first: dict[str, Receipt] = {}
    for receipt in sorted(receipts, key=lambda receipt: receipt.file):
        first.setdefault(receipt.unit, receipt)
    expected = Manifest("stage", tuple(first[unit] for unit in sorted(first)), {"shards": 2})
    assert manifests == [expected, expected]


def test_a_second_finaliser_adopts_the_first_manifest(storage: Folder) -> None:
    first = lake.commit(storage, "stage", Manifest("stage", (Receipt("a", "a-1", 5),), {"by": "first"}))

    def define(root: beam.Pipeline) -> beam.PCollection:
        return root | beam.Create([Receipt("a", "a-2", 5)]) | "Commit" >> CommitStage(storage, "stage", "stage", {"by": "second"})

    assert collect(storage, define) == [first] == [lake.read_manifest(storage, "stage")]
