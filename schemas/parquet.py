"""Parquet files of the lake: streamed in, written whole under attempt-unique names, each told by a receipt."""

import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas import lake
from schemas.checksum import crc32c_of_file
from schemas.lake import Receipt
from schemas.retries import take_retries
from schemas.storage import Storage

BATCH_ROWS = 65_536
# Rows that show whether a column's values repeat.
_HEAD_ROWS = 4096
# Of a file whose wide columns are passed over, so much is fetched at a time.
NARROW_CHUNK = 1 << 18


def write_parquet(
    storage: Storage, folder: str, unit: str, batches: Iterable[pa.RecordBatch], counts: Mapping[str, int] | None = None
) -> Receipt:
    """Write batches of one schema as a Parquet file of an attempt-unique name; no batches, no file.

    A receipt with `counts` also counts the `retries` of this process since the receipt before it.
    """
    file, rows, checksum = "", 0, ""
    with tempfile.TemporaryDirectory(prefix="adstocrat-") as temporary:
        path = pathlib.Path(temporary) / "part.parquet"
        writer = None
        for batch in batches:
            writer = writer or ParquetFile(path, batch)
            writer.write(batch)
            rows += batch.num_rows
        if writer:
            writer.close()
            file, checksum = upload(storage, path, lake.unique(folder, unit.replace("/", "_"), ".parquet"))
    return Receipt(unit, file, rows, {} if counts is None else {**counts, **take_retries()}, checksum)


class ParquetFile(pq.ParquetWriter):
    """Parquet as all of the lake has it: a row group a batch, so that readers stream."""

    def __init__(self, path: pathlib.Path, first: pa.RecordBatch):
        """Open a file for batches like the first."""
        how = {"compression": "zstd", "compression_level": 1, "write_statistics": False, "use_dictionary": _repeating(first)}
        # That texts came as codes is nothing to readers.
        super().__init__(path, first.schema, store_schema=not any(map(_is_coded, first.schema)), **how)

    def write(self, batch: pa.RecordBatch) -> None:
        super().write_batch(batch, row_group_size=BATCH_ROWS)


def _repeating(batch: pa.RecordBatch) -> list[str]:
    """Columns whose values repeat: others would fill a dictionary first and be written again without, which takes twice as long."""
    heads = dict(zip(batch.schema.names, batch.slice(0, _HEAD_ROWS).columns, strict=True))
    coded = [field.name for field in batch.schema if _is_coded(field)]
    plain = [name for name, head in heads.items() if pa.types.is_string(head.type) or pa.types.is_integer(head.type)]
    return coded + [name for name in plain if 2 * len(pc.unique(heads[name])) <= len(heads[name])]


def upload(storage: Storage, path: pathlib.Path, name: str, checksum: str = "") -> tuple[str, str]:
    """Put a finished local file, whose checksum may be known, into the lake: (name, crc32c)."""
    checksum = checksum or crc32c_of_file(path)
    storage.upload(path, name)
    return name, checksum


def read_parquet(
    storage: Storage, file: str, columns: list[str] | None = None, rows: int = BATCH_ROWS, coded: bool = False
) -> Iterator[pa.RecordBatch]:
    """Stream a Parquet file of the lake in batches of up to `rows` rows; `coded`, texts that it has as codes stay so."""
    with storage.local(file) as path, pq.ParquetFile(path, memory_map=True, read_dictionary=_coded(path) if coded else None) as parquet:
        yield from parquet.iter_batches(rows, columns=columns)


def _coded(path: pathlib.Path) -> list[str]:
    """Columns of texts that the file has as codes of their distinct values."""
    file = pq.read_metadata(path)
    columns = [file.row_group(0).column(number) for number in range(file.num_columns if file.num_row_groups else 0)]
    return [one.path_in_schema for one in columns if one.physical_type == "BYTE_ARRAY" and one.has_dictionary_page]


def decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with texts in place of their codes."""
    return batch.cast(pa.schema([field.with_type(field.type.value_type) if _is_coded(field) else field for field in batch.schema]))


def _is_coded(field: pa.Field) -> bool:
    return bool(pa.types.is_dictionary(field.type))


def read_columns(storage: Storage, file: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Stream some narrow columns of a Parquet file, without fetching the wide ones beside them."""
    with storage.open(file, NARROW_CHUNK) as stream, pq.ParquetFile(pa.PythonFile(stream, "r")) as parquet:
        yield from parquet.iter_batches(BATCH_ROWS, columns=columns)
