"""Outcomes are the delivered rows that have impressions, whatever kind of outcome the contract has."""

import datetime
import pathlib

import pyarrow as pa
import pytest

from beam_jobs import outcomes
from beam_jobs.config import Config
from beam_jobs.run import MonthRun
from schemas import lake, tables
from schemas.contract import Column, Contract
from schemas.lake import Manifest
from schemas.parquet import read_parquet, write_parquet
from schemas.storage import Folder

KEY = Column("id", "bytes", frozenset({"key"}), required=True)
CLICKED = Column("c", "int", frozenset({"clicked"}))
CLICKS, IMPRESSIONS = Column("k", "int", frozenset({"clicks"})), Column("n", "int", frozenset({"impressions"}))


@pytest.mark.parametrize(
    ("columns", "rows", "expected"),
    [
        ((KEY, CLICKED), {"c": [1, 0, None]}, [("a", 1, 1), ("b", 1, 0)]),
        ((KEY, CLICKS, IMPRESSIONS), {"k": [2, 0, None], "n": [7, 0, 5]}, [("a", 7, 2)]),
        ((KEY, CLICKS, IMPRESSIONS), {"k": [None, 1, 3], "n": [None, None, 9]}, [("c", 9, 3)]),
        ((KEY, CLICKS, IMPRESSIONS), {"k": [None, 0, None], "n": [4, 0, None]}, []),
        ((KEY,), {}, []),
    ],
)
def test_outcomes(tmp_path: pathlib.Path, columns: tuple[Column, ...], rows: dict, expected: list[tuple[str, int, int]]) -> None:
    storage = Folder(str(tmp_path))
    run = MonthRun(storage, Contract(columns), Config(lake=storage.uri), "2026-10", "r", (), None, None, ())
    schema = pa.schema([("key", pa.string()), *((name, pa.int64()) for name in rows)])
    batch = pa.RecordBatch.from_pydict({"key": ["a", "b", "c"], **rows}, schema=schema)
    receipts = [write_parquet(storage, run.stage("rows"), f"shard/{number:05d}.000", [batch]) for number in range(2)]
    lake.commit(storage, run.stage("rows"), Manifest("ingest", tuple(receipts)))
    written = outcomes.write(run)
    batches = [batch for file in written.files for batch in read_parquet(storage, file)]
    assert all(batch.schema.equals(tables.schema("outcomes")) for batch in batches)
    found = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
    assert found == 2 * [(datetime.date(2026, 10, 1), *row) for row in expected]
    assert written.rows == len(found) and outcomes.write(run) == written
