"""Duplicate keys: of a month's rows of one key, the first by file name and row number stays, and the others are turned away.

What is compared travels beside the rows: each row's `key`, its origin, and the shard that the row itself goes to. Origins are in the
order of the files and of the rows in them: the part of a file that the row was read in, counted over the month, and its number there.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from beam_jobs.arrow import Unit, read_unit
from schemas.hashing import hash64_column, shard_of_column
from schemas.parquet import BATCH_ROWS
from schemas.storage import Storage

# Named as no column of a contract is.
ORIGIN, SHARD = "adstocrat:origin", "adstocrat:shard"
KEYED = pa.schema([("key", pa.string()), (ORIGIN, pa.int64()), (SHARD, pa.int32())])
# Of an origin's 63 bits: rows of a part, up to 64 billion; the others say which part.
_ROW_BITS = 36
_ROWS_AT_ONCE = 1 << 20


def origins(part: int, rows: np.ndarray) -> pa.Array:
    """Origins of rows, int64, by the index of their part and their numbers in it, integers of shape (rows,)."""
    return pa.array((part << _ROW_BITS) + rows.astype(np.int64))


def keyed(rows: pa.RecordBatch) -> pa.RecordBatch:
    """What is compared of rows, as `KEYED`."""
    return rows.select(KEYED.names).cast(KEYED)


def part_of(batch: pa.RecordBatch) -> np.ndarray:
    """The index of each row's part, shape (rows,), dtype int64."""
    return batch[ORIGIN].to_numpy() >> _ROW_BITS


def row_of(origin: pa.ChunkedArray) -> np.ndarray:
    """The number of each row in its part, shape (rows,), dtype int64."""
    return origin.to_numpy() & ((1 << _ROW_BITS) - 1)


def shard_of_key(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    return shard_of_column(batch["key"], "duplicates", shards)


def shard_of_row(batch: pa.RecordBatch) -> np.ndarray:
    return batch[SHARD].to_numpy()


def find_duplicates(unit: Unit, storage: Storage) -> Iterator[pa.RecordBatch]:
    """Of one shard's keys, as `KEYED`, the rows that another row of their key comes before, in no order.

    Memory holds the distinct keys of a shard and about as many rows again, however often one of them repeats.
    """
    first, held, rows = KEYED.empty_table(), list[pa.RecordBatch](), 0
    for batch in read_unit(storage, unit):
        held.append(batch)
        rows += len(batch)
        if rows >= max(_ROWS_AT_ONCE, len(first)):
            table = pa.concat_tables([first, pa.Table.from_batches(held)])
            later = _later(table)
            yield from table.filter(pa.array(later)).combine_chunks().to_batches(BATCH_ROWS)
            first, held, rows = table.filter(pa.array(~later)), [], 0
            del table, later
    table = pa.concat_tables([first, pa.Table.from_batches(held, KEYED)])
    yield from table.filter(pa.array(_later(table))).combine_chunks().to_batches(BATCH_ROWS)


def _later(table: pa.Table) -> np.ndarray:
    """Which rows another row of their key comes before, by origin: shape (rows,), dtype bool."""
    keys, origin = table["key"].combine_chunks(), table[ORIGIN].to_numpy()
    hashes = hash64_column(keys)
    order = np.argsort(hashes)
    # Only rows that share a hash can share a key, and strings are slow to compare.
    same = np.append(np.diff(hashes[order]) == 0, False)
    suspects = order[same | np.roll(same, 1)]
    suspects = suspects[np.argsort(origin[suspects])]
    _, at = np.unique(keys.take(pa.array(suspects)).to_numpy(zero_copy_only=False), return_index=True)
    later = np.zeros(len(table), bool)
    later[suspects] = True
    later[suspects[at]] = False
    return later
