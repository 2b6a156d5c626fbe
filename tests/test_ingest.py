import dataclasses
import gzip
import pathlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from beam_jobs import duplicates, ingest, statistics
from beam_jobs.arrow import Unit, by_shard, shards_for, spill_sections
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, prepare
from beam_jobs.runner import run_pipeline
from schemas import contract as contracts
from schemas import rows as csv_rows
from schemas.contract import Column, Contract
from schemas.hashing import hash64, salted
from schemas.lake import Manifest, Receipt, raw_ads, shard_of_unit
from schemas.parquet import read_parquet, write_parquet
from schemas.rows import REJECTS, read_rows, row_schema
from schemas.sample import write_months
from schemas.storage import Entry, Folder

MONTH, SHARDS = "2026-08", 4
CONTRACT = contracts.load(contracts.DEFAULT)
BAD = b'too,few\nx,,,,,,not a number,1,1,,1,0\n,,,,,,1,1,1,,1,0\ny,,,,,,1,1,1,../secret,1,0\nz,,,,,,1,1,1,,1,"2"\nu\xff,,,,,,1,1,1,,1,0\n'
REASONS = ("field_count", "unparsable", "missing_required", "image_outside_month", "clicks_over_impressions", "bad_encoding")


def deliver(folder: pathlib.Path) -> Config:
    """A sample month, cut into files of many kinds."""
    sample = Folder(str(folder / "sample"))
    write_months(sample, [MONTH], 1500, 30, 0, lambda line: None)
    text = b"".join(sample.read(name) for name in sample.names(raw_ads(MONTH)))
    header, *lines = text.splitlines(keepends=True)
    rows = [line for line in lines if line != header]
    assert len(rows) == 1500
    storage = Folder(str(folder / "lake"))
    files = {
        "a.csv": header + b"".join(rows[:700]),
        "b.csv.gz": gzip.compress(header + b"".join(rows[700:1100]), mtime=0),
        "bad.csv": header + b"".join(rows[1100:1200]) + BAD + b"".join(rows[1200:]),
        "empty.csv": b"",
        "header.csv": header,
        "sub/all bad.csv": header + BAD,
    }
    for name, data in files.items():
        storage.write(raw_ads(MONTH) + name, data)
    storage.write(raw_ads(MONTH) + "README.txt", b"no rows")
    return Config(lake=storage.uri)


def ingested(config: Config) -> tuple[MonthRun, Manifest]:
    run = prepare(config, MONTH)
    run_pipeline(lambda root: ingest.define_pipeline(root, run), [])
    return run, run.manifest(run.stage("rows"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[MonthRun, Manifest]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "shards_for", lambda rows: SHARDS)
        return ingested(deliver(tmp_path_factory.mktemp("ingest")))


def direct(run: MonthRun) -> tuple[pa.Table, pa.Table]:
    """Rows and rejects of all files, read without a pipeline."""
    checked = []
    for entry in run.ads:
        with run.storage.open(entry.name) as stream:
            checked += list(read_rows(stream, run.contract, entry.name))
    rows = pa.Table.from_batches([part.rows for part in checked], row_schema(run.contract))
    return rows, pa.Table.from_batches([part.rejects for part in checked], REJECTS)


def table(run: MonthRun, files: list[str], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches([batch for file in files for batch in read_parquet(run.storage, file)], schema)


def test_each_accepted_row_is_there_once_in_its_shard_and_place(done: tuple[MonthRun, Manifest]) -> None:
    run, manifest = done
    expected: dict[int, list[dict]] = {}
    for row in sorted(direct(run)[0].to_pylist(), key=lambda row: hash64(row["key"].encode(), salted("key"))):
        shard = hash64((row["image"] or row["key"]).encode(), salted("shard")) % SHARDS
        expected.setdefault(shard, []).append(row)
    assert sum(map(len, expected.values())) == 1500 and len(expected) == SHARDS
    units = [receipt for receipt in manifest.receipts if receipt.unit.startswith("shard/")]
    found = {shard_of_unit(receipt.unit): table(run, [receipt.file], row_schema(CONTRACT)).to_pylist() for receipt in units}
    assert found == expected
    assert (
        [receipt.rows for receipt in units] == [receipt.counts["ingested"] for receipt in units] == [len(found[i]) for i in sorted(found)]
    )


def test_rows_without_an_image_are_spread(done: tuple[MonthRun, Manifest]) -> None:
    rows = direct(done[0])[0].combine_chunks().to_batches()[0]
    bare = rows.set_column(rows.schema.get_field_index("image"), "image", pa.nulls(len(rows), pa.string()))
    shards = ingest.shard_of_rows(bare, CONTRACT.image, 3)
    assert shards.tolist() == ingest.shard_of_rows(bare, None, 3).tolist()
    assert set(shards.tolist()) == {0, 1, 2}


def test_rejects_are_written_by_file(done: tuple[MonthRun, Manifest]) -> None:
    run, manifest = done
    expected = direct(run)[1]
    files = {receipt.unit: receipt for receipt in manifest.receipts if receipt.unit.startswith("file/")}
    assert files.keys() == {f"file/{entry.name}" for entry in run.ads} and len(files) == 6
    for entry in run.ads:
        receipt = files[f"file/{entry.name}"]
        own = [row for row in expected.to_pylist() if row["file"] == entry.name]
        assert (table(run, [receipt.file], REJECTS).to_pylist() if receipt.file else []) == own
        assert receipt.rows == len(own)
    assert expected.num_rows == 2 * len(REASONS)


def test_counts_balance(done: tuple[MonthRun, Manifest]) -> None:
    run, manifest = done
    assert manifest.counts("rejected:") == Counter(direct(run)[1]["reason"].to_pylist()) == dict.fromkeys(REASONS, 2)
    assert manifest.count("read") == 1512 == manifest.count("ingested") + sum(manifest.counts("rejected:").values())
    assert manifest.info == {"shards": SHARDS, "contract": CONTRACT.fingerprint}


def test_the_same_month_in_another_lake_gives_the_same_bytes(
    done: tuple[MonthRun, Manifest], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "shards_for", lambda rows: SHARDS)
    run, manifest = ingested(deliver(tmp_path))
    assert run.id == done[0].id and run.storage.uri != done[0].storage.uri

    def content(manifest: Manifest) -> list[tuple]:
        return [(receipt.unit, receipt.rows, receipt.counts, receipt.crc32c) for receipt in manifest.receipts]

    assert content(manifest) == content(done[1])
    assert not set(manifest.files) & set(done[1].files)


def test_a_file_without_a_column_is_an_error_that_names_it(tmp_path: pathlib.Path) -> None:
    Folder(str(tmp_path)).write(raw_ads(MONTH) + "short.csv", b"ad_id,advertiser\na,b\n")
    with pytest.raises(contracts.ContractError, match=r"short\.csv lacks a column of the contract"):
        ingested(Config(lake=str(tmp_path)))


@pytest.mark.parametrize("split_bytes", [1_000, 20_000])
def test_a_file_that_is_read_in_parts_gives_the_same(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, split_bytes: int) -> None:
    monkeypatch.setattr(ingest, "SPLIT_BYTES", split_bytes)
    config = dataclasses.replace(deliver(tmp_path), csv_newlines_in_values=False)
    run, manifest = ingested(config)
    parts = ingest.parts_of(run.ads, ingest.layout_of(config))
    assert len(parts) > len(run.ads) and {part.span for part in parts if part.file.endswith(".gz")} == {None}
    rows, rejects = direct(run)
    files = {receipt.unit: receipt for receipt in manifest.receipts if receipt.unit.startswith("file/")}
    assert files.keys() == {f"file/{entry.name}" for entry in run.ads}
    found = [row for unit in sorted(files) if files[unit].file for row in table(run, [files[unit].file], REJECTS).to_pylist()]
    assert found == rejects.to_pylist()
    shards = [receipt.file for receipt in manifest.receipts if receipt.unit.startswith("shard/")]
    assert sorted(table(run, shards, row_schema(CONTRACT))["key"].to_pylist()) == sorted(rows["key"].to_pylist())
    assert manifest.count("read") == rows.num_rows + rejects.num_rows == manifest.count("ingested") + len(found)
    assert not {file for file in manifest.files if file.startswith("spill/")}


def test_a_part_that_was_read_twice_counts_once(tmp_path: pathlib.Path) -> None:
    storage = Folder(str(tmp_path))
    reject = pa.RecordBatch.from_pylist(
        [{"file": "f", "row": 2, "column": "", "reason": "field_count", "value": "x", "line": "x"}], REJECTS
    )

    def part(number: int) -> Receipt:
        return write_parquet(storage, "spill", f"file/f@{number:05d}", [reject], {"read": 7, "rejected:field_count": 1})

    whole = ingest.whole_file("f", [part(1), part(0), part(1), part(0), part(0)], storage, "rejects")
    assert (whole.unit, whole.rows, whole.counts) == ("file/f", 2, {"read": 14, "rejected:field_count": 2})
    assert [row["row"] for batch in read_parquet(storage, whole.file) for row in batch.to_pylist()] == [2, 9]


@pytest.mark.parametrize("split_bytes", [None, 3_000])
def test_of_a_key_the_first_row_by_file_and_number_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, split_bytes: int | None
) -> None:
    """Keys that repeat in a file, a part, between files, very often, and in rows of other images; one first row is itself a reject."""
    monkeypatch.setattr(ingest, "shards_for", lambda rows: SHARDS)
    monkeypatch.setattr(duplicates, "_ROWS_AT_ONCE", 50)
    monkeypatch.setattr(csv_rows, "BLOCK_BYTES", 2_000)
    if split_bytes:
        monkeypatch.setattr(ingest, "SPLIT_BYTES", split_bytes)
    storage, rng = Folder(str(tmp_path)), np.random.default_rng(0)
    names = [column.name for column in CONTRACT.columns]
    kept: dict[str, tuple[str, int]] = {}
    expected: list[tuple[str, int, str, str]] = []
    for name in ("b.csv", "a.csv", "c.csv.gz"):
        lines = [",".join(names)]
        for number in range(1, 401):
            key = "hot" if rng.random() < 0.3 else f"k{rng.integers(600)}"
            values = dict(zip(names, ["1"] * len(names), strict=True)) | {"ad_id": key, "image": f"{rng.integers(9)}.jpg", "clicks": "0"}
            values |= {"advertiser": f"{name} {number}"} if rng.random() < 0.9 else {"impressions": "bad"}
            lines.append(",".join(values[column] for column in names))
        data = "\n".join(lines).encode()
        storage.write(raw_ads(MONTH) + name, gzip.compress(data) if name.endswith("gz") else data)
    for name in ("a.csv", "b.csv", "c.csv.gz"):
        data = storage.read(raw_ads(MONTH) + name)
        text = (gzip.decompress(data) if name.endswith("gz") else data).decode().split("\n")
        for number, line in enumerate(text[1:], 1):
            key = line.split(",")[0]
            if "bad" not in line and kept.setdefault(key, (name, number)) != (name, number):
                expected.append((raw_ads(MONTH) + name, number, key, line))
    run, manifest = ingested(dataclasses.replace(Config(lake=str(tmp_path)), csv_newlines_in_values=not split_bytes, max_reject_share=1.0))
    rows = table(run, [r.file for r in manifest.receipts if r.unit.startswith("shard/")], row_schema(CONTRACT)).to_pylist()
    assert {row["key"]: row["advertiser"] for row in rows} == {key: f"{name} {number}" for key, (name, number) in kept.items()}
    assert len(rows) == len(kept) == manifest.count("ingested") and len(expected) > 500
    files = [r.file for r in manifest.receipts if r.unit.startswith("file/")]
    assert sorted(run.storage.names(run.stage("rejects") + "/")) == sorted(files)
    rejects = table(run, files, REJECTS).to_pylist()
    found = [row for row in rejects if row["reason"] == "duplicate_key"]
    assert [(row["file"], row["row"], row["value"], row["line"]) for row in found] == expected
    assert {row["column"] for row in found} == {"ad_id"}
    assert manifest.counts("rejected:") == {"duplicate_key": len(expected), "unparsable": len(rejects) - len(expected)}
    assert manifest.count("read") == 1200 == len(rows) + len(rejects)


def test_keys_that_share_a_hash_are_told_apart(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "hash64_column", lambda keys: np.zeros(len(keys), np.uint64))
    batch = pa.RecordBatch.from_pydict(
        dict(zip(duplicates.KEYED.names, [list("abcab"), [5, 1, 2, 3, 4], [0] * 5], strict=True)), duplicates.KEYED
    )
    storage = Folder(str(tmp_path))
    pieces, addressed = spill_sections(by_shard([batch], 1, lambda batch: np.zeros(len(batch), np.int64)), 1, "spill")
    storage.write("spill", *pieces)
    found = duplicates.find_duplicates(Unit(0, 0, (addressed[0][1],)), storage)
    rows = pa.Table.from_batches(found, duplicates.KEYED).sort_by(duplicates.ORIGIN).to_pylist()
    assert [tuple(row.values()) for row in rows] == [("b", 4, 0), ("a", 5, 0)]


def test_columns_may_be_called_as_what_travels_beside_the_rows(tmp_path: pathlib.Path) -> None:
    columns = (Column("id", "bytes", frozenset({"key"}), required=True), Column("origin", "bytes"), Column("shard", "int"))
    (tmp_path / "own.pbtxt").write_text(contracts.dumps(Contract(columns)))
    Folder(str(tmp_path)).write(raw_ads(MONTH) + "ads.csv", b"id,origin,shard\na,fr,7\nb,de,8\na,it,9\n")
    run, manifest = ingested(Config(lake=str(tmp_path), contract=str(tmp_path / "own.pbtxt"), max_reject_share=0.5))
    kept = table(run, [r.file for r in manifest.receipts if r.unit.startswith("shard/")], row_schema(run.contract)).to_pylist()
    assert sorted((row["key"], row["origin"], row["shard"]) for row in kept) == [("a", "fr", 7), ("b", "de", 8)]


def test_only_rejects(tmp_path: pathlib.Path) -> None:
    header = ",".join(column.name for column in CONTRACT.columns).encode() + b"\n"
    Folder(str(tmp_path)).write(raw_ads(MONTH) + "bad.csv", header + BAD)
    _, manifest = ingested(Config(lake=str(tmp_path)))
    assert (manifest.count("read"), manifest.count("ingested")) == (len(REASONS), 0)
    assert [receipt.unit for receipt in manifest.receipts] == [f"file/{raw_ads(MONTH)}bad.csv"]


def test_rows_too_young_are_counted(tmp_path: pathlib.Path) -> None:
    contract = tmp_path / "dated.pbtxt"
    contract.write_text(
        'feature { name: "ad" type: BYTES annotation { tag: "key" } }\n'
        'feature { name: "began" type: BYTES annotation { tag: "mature_before:7" } }\n'
        'feature { name: "clicked" type: INT annotation { tag: "clicked" } }\n'
    )
    rows = f"ad,began,clicked\na,{MONTH}-01,0\nb,{MONTH}-28,1\nc,,1\n"
    Folder(str(tmp_path)).write(raw_ads(MONTH) + "a.csv", rows.encode())
    _, manifest = ingested(Config(lake=str(tmp_path), contract=str(contract)))
    assert (manifest.count("ingested"), manifest.count("too young")) == (3, 2)
    # In the statistics they are not labelled either.
    files = [statistics.unit_file(file) for file in manifest.files]
    found = statistics.merged(statistics.read(Folder(str(tmp_path)), file) for file in files)
    assert {slice_: statistics.in_slice(found, slice_)["began"].rows for slice_ in ("labelled", "unlabelled")} == {
        "labelled": 1,
        "unlabelled": 2,
    }


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_guessed_about_right(tmp_path: pathlib.Path, packed: bool) -> None:
    storage, rng = Folder(str(tmp_path)), np.random.default_rng(0)
    text = b"".join(b"%d,%.9f,campaign-%d\n" % (i, rng.random(), i % 7) for i in range(40_000))
    entries = []
    for number in range(10):
        data = gzip.compress(text) if packed else text
        storage.write(f"{number}.csv{'.gz' if packed else ''}", data)
        entries.append(Entry(f"{number}.csv{'.gz' if packed else ''}", len(data), ""))
    guessed = ingest.estimated_rows(storage, tuple(entries))
    assert 400_000 / 4 < guessed < 400_000 * 5 if packed else 380_000 < guessed < 420_000
    assert ingest.estimated_rows(storage, ()) == 0


@pytest.mark.parametrize("data", [b"no gzip at all\n", gzip.compress(b"id\n1\n" * 999, mtime=0)[:-9], b""])
def test_rows_of_what_is_no_gz_file_are_not_guessed(tmp_path: pathlib.Path, data: bytes) -> None:
    """Reading it tells what is wrong, with its name."""
    storage = Folder(str(tmp_path))
    storage.write("a.csv.gz", data)
    assert ingest.estimated_rows(storage, tuple(storage.entries("a"))) == 0


@pytest.mark.parametrize(("rows", "shards"), [(0, 1), (1, 1), (500_000, 1), (500_001, 2), (10_000_000, 20)])
def test_an_ordinary_shard_is_less_than_a_unit(rows: int, shards: int) -> None:
    assert shards_for(rows) == shards
