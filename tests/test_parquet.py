"""Parquet in the lake: what is written is read, and its receipt tells the truth about the file."""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.checksum import crc32c
from schemas.parquet import BATCH_ROWS, read_parquet, write_parquet
from schemas.storage import Storage, open_storage

SCHEMA = pa.schema([("key", pa.string()), ("n", pa.int64())])


@pytest.fixture
def storage(tmp_path: pathlib.Path) -> Storage:
    return open_storage(str(tmp_path))


def batch(rows: int, start: int = 0) -> pa.RecordBatch:
    numbers = range(start, start + rows)
    return pa.RecordBatch.from_arrays(
        [pa.array([f"k{n}" if n % 3 else None for n in numbers], pa.string()), pa.array(numbers)], schema=SCHEMA
    )


@pytest.mark.parametrize("sizes", [[1], [0], [5, 0, 7], [BATCH_ROWS, BATCH_ROWS, 1], [BATCH_ROWS + 1]])
def test_what_is_written_is_read(storage: Storage, sizes: list[int]) -> None:
    batches = [batch(size, 1_000_000 * place) for place, size in enumerate(sizes)]
    receipt = write_parquet(storage, "rows/x", "shard/00001", batches)
    read = list(read_parquet(storage, receipt.file))
    assert all(part.num_rows <= BATCH_ROWS for part in read)
    assert pa.Table.from_batches(read, SCHEMA) == pa.Table.from_batches(batches)


@pytest.mark.parametrize("rows", [0, 1, 9000, BATCH_ROWS + 1])
def test_texts_that_repeat_may_stay_codes(storage: Storage, rows: int) -> None:
    names = pa.array([None if n % 5 == 0 else f"v{n % 7}" for n in range(rows)], pa.string())
    written = batch(rows).append_column("name", names).append_column("blob", pa.array([b"1234"] * rows, pa.binary(4)))
    receipt = write_parquet(storage, "rows/x", "shard/00001", [written])
    read = pa.Table.from_batches(list(read_parquet(storage, receipt.file, coded=True)) or [written])
    assert rows < 2 or [pa.types.is_dictionary(read[name].type) for name in read.column_names] == [False, False, True, False]
    assert read.cast(written.schema) == pa.Table.from_batches([written])


def test_the_receipt_tells_name_rows_counts_and_checksum(storage: Storage) -> None:
    receipt = write_parquet(storage, "rows/x", "shard/00001", iter([batch(3), batch(4)]), {"ingested": 7})
    (entry,) = storage.entries("rows/x/")
    assert (receipt.unit, receipt.rows, receipt.counts) == ("shard/00001", 7, {"ingested": 7})
    assert (receipt.file, receipt.crc32c) == (entry.name, entry.crc32c)
    assert receipt.file.startswith("rows/x/shard_00001-") and receipt.file.endswith(".parquet")
    assert receipt.crc32c == crc32c(storage.read(receipt.file))


def test_no_batches_leave_no_file(storage: Storage) -> None:
    receipt = write_parquet(storage, "rows/x", "shard/00001", [], {"read": 0})
    assert (receipt.file, receipt.rows, receipt.crc32c, receipt.counts) == ("", 0, "", {"read": 0})
    assert storage.names("") == []


def test_attempts_of_one_unit_do_not_overwrite_each_other(storage: Storage) -> None:
    first, second = (write_parquet(storage, "rows/x", "shard/00001", [batch(size)]) for size in (3, 3))
    assert storage.names("rows/x/") == sorted([first.file, second.file])
    assert first.crc32c == second.crc32c


def test_an_attempt_that_fails_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError):
        write_parquet(storage, "rows/x", "shard/00001", (batch(1 // n) for n in (1, 0)))
    assert storage.names("") == []


def test_columns_and_batch_size_may_be_chosen(storage: Storage) -> None:
    receipt = write_parquet(storage, "rows/x", "u", [batch(10)])
    read = list(read_parquet(storage, receipt.file, ["n"], rows=4))
    assert [part.num_rows for part in read] == [4, 4, 2]
    assert read[0].to_pydict() == {"n": [0, 1, 2, 3]}


def test_a_batch_is_a_row_group_so_that_readers_stream(storage: Storage) -> None:
    receipt = write_parquet(storage, "rows/x", "u", [batch(5), batch(6)])
    with storage.local(receipt.file) as path:
        footer = pq.ParquetFile(path).metadata
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [5, 6]


def test_a_file_that_is_not_there_is_told(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_parquet(storage, "rows/x/none.parquet"))
