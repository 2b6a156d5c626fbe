"""A shard of the lookup table, written as `serving.shard` reads it: rows by the bucket of their key, each as ready JSON."""

import json
import pathlib
from collections.abc import Callable
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from serving.shard import END, HEADER, KEY_END, MAGIC

CHUNK_ROWS = 16_384


def key_numbers(keys: pa.Array) -> np.ndarray:
    """The CRC-32 of each key: shape (rows,), dtype uint32."""
    return np.fromiter(map(crc32, keys.cast(pa.binary()).to_pylist()), np.uint32, len(keys))


def write_file(path: pathlib.Path, keys: pa.Array, values_of: Callable[[pa.Array], pa.Array], shards: int) -> int:
    """Write one shard.

    Args:
        path: the file to write, on a local disk.
        keys: of its rows, strings.
        values_of: the values, strings, of the rows with these numbers; asked for some thousand rows at a time, for a shard's rows as
            JSON are several times what they are as columns.
        shards: of the whole table.

    Returns:
        Rows written.

    Raises:
        ValueError: a key is empty or repeats; names it.
    """
    numbers, rows = key_numbers(keys), len(keys)
    _check(keys, numbers)
    buckets = max(1, rows)
    bucket = numbers // np.uint32(shards) % np.uint32(buckets)
    order = np.argsort(bucket, kind="stable")
    index_end = HEADER.size + 8 * (buckets + 1)
    starts = [np.array([index_end + len(END)], np.uint64)]
    with path.open("wb") as stream:
        stream.seek(index_end)
        stream.write(END)
        for at in range(0, rows, CHUNK_ROWS):
            some = pa.array(order[at : at + CHUNK_ROWS])
            key, value = keys.take(some).cast(pa.binary()), values_of(some).cast(pa.binary())
            records = pc.binary_join_element_wise(key, pa.scalar(KEY_END), value, pa.scalar(END), pa.scalar(b""))
            ends = np.frombuffer(records.buffers()[1], np.int32, len(records) + 1)
            stream.write(records.buffers()[2].slice(int(ends[0]), int(ends[-1] - ends[0])))
            starts.append((ends[1:] - ends[0]).astype(np.uint64) + starts[-1][-1])
        first = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=buckets))])  # Row of each bucket.
        of_rows = np.concatenate(starts)
        stream.seek(0)
        stream.write(HEADER.pack(MAGIC, rows, buckets, int(of_rows[-1])))
        stream.write(of_rows[first].astype("<u8").tobytes())
    return rows


def _check(keys: pa.Array, numbers: np.ndarray) -> None:
    if pc.any(pc.equal(keys, "")).as_py():
        raise ValueError("a key is empty; expected 1 to 500 bytes")
    ordered = np.sort(numbers)
    # Keys that repeat have the same number; few others do.
    same = pc.value_counts(keys.filter(pa.array(np.isin(numbers, ordered[1:][ordered[1:] == ordered[:-1]]))))
    repeated = same.field("values").filter(pc.greater(same.field("counts"), 1))
    if len(repeated):
        raise ValueError(f"key {repeated[0].as_py()!r} repeats; expected keys that are unique in a month")


def json_objects(batch: pa.RecordBatch) -> pa.Array:
    """Each row as a JSON object in one string, made by column."""
    pieces, text = [], "{"
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        quote = '"' if is_plain(column) else ""
        pieces += [pa.scalar(f"{text}{json.dumps(name, ensure_ascii=False)}:{quote}"), column if quote else json_values(column)]
        text = quote + ","
    return pc.binary_join_element_wise(*pieces, pa.scalar(text[:-1] + "}"), pa.scalar(""))


def is_plain(column: pa.Array) -> bool:
    """Whether all values are strings that JSON has as they are: no nulls, no quotes, backslashes or control characters."""
    if not pa.types.is_string(column.type) or column.null_count or not len(column):
        return False
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, column.offset * 4)
    # Byte by byte, since in UTF-8 those of other characters are none of these.
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return not ((data < 0x20) | (data == ord('"')) | (data == ord("\\"))).any()


def json_values(column: pa.Array) -> pa.Array:
    """A column's values as JSON texts; a null is `null`."""
    texts = json_strings(column) if pa.types.is_string(column.type) else column.cast(pa.string())
    return pc.fill_null(texts, "null")


def json_strings(column: pa.Array) -> pa.Array:
    """Strings as JSON strings, quoted and escaped."""
    text = pc.replace_substring(pc.replace_substring(column, "\\", "\\\\"), '"', '\\"')
    if pc.any(pc.match_substring_regex(text, "[\\x00-\\x1f]")).as_py():
        for code in range(0x20):
            text = pc.replace_substring(text, chr(code), f"\\u{code:04x}")
    return pc.binary_join_element_wise(pa.scalar('"'), text, pa.scalar('"'), pa.scalar(""))
