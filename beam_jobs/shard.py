"""A shard of the lookup table, written as `serving.shard` reads it: rows by the bucket of their key, each as ready JSON."""

import io
import itertools
import json
import pathlib
import threading
from collections import Counter
from collections.abc import Iterable
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.checksum import write_checked
from serving.shard import END, HEADER, KEY_END, MAGIC

CHUNK_ROWS = 16_384


def key_numbers(keys: pa.Array) -> np.ndarray:
    """The CRC-32 of each key: shape (rows,), dtype uint32."""
    return np.fromiter(map(crc32, keys.cast(pa.binary()).to_numpy(zero_copy_only=False)), np.uint32, len(keys))


def records(batch: pa.RecordBatch) -> pa.Array:
    """Each row as a shard has it, binary: its `key`, and all of it as a JSON object; made by column."""
    pieces, text = [batch["key"]], KEY_END + b"{"
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        quote = b'"' if is_plain(column) else b""
        pieces += [text + json.dumps(name, ensure_ascii=False).encode() + b":" + quote, column if quote else json_values(column)]
        text = quote + b","
    pieces += [text[:-1] + b"}" + END, b""]
    return pc.binary_join_element_wise(*(pa.scalar(p) if isinstance(p, bytes) else p.cast(pa.binary()) for p in pieces))


def write_file(path: pathlib.Path, parts: Iterable[tuple[np.ndarray, pa.Array]], shards: int) -> tuple[int, str]:
    """Write one shard.

    Args:
        path: the file to write, on a local disk.
        parts: its rows in parts, in any order: the `key_numbers` and the `records` of each.
        shards: of the whole table.

    Returns:
        Rows written, and the file's crc32c.

    Raises:
        ValueError: a key is empty or repeats; names it.
    """
    numbers, rows = _collect(parts)
    _check(numbers, rows)
    buckets = max(1, len(rows))
    bucket = numbers // np.uint32(shards) % np.uint32(buckets)
    # As one number with its row, a bucket is sorted several times faster than by a stable sort, and as repeatably.
    order = (np.sort(bucket.astype(np.int64) << 32 | np.arange(len(rows))) & 0xFFFFFFFF).astype(np.int64)
    sizes = np.diff(np.frombuffer(rows.buffers()[1], np.int64))
    index_end = HEADER.size + 8 * (buckets + 1)
    ends = np.concatenate([[0], np.cumsum(sizes[order])]) + index_end + len(END)
    first = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=buckets))])  # Row of each bucket.
    head = HEADER.pack(MAGIC, len(rows), buckets, int(ends[-1])) + ends[first].astype("<u8").tobytes() + END
    parts = (rows.take(pa.array(order[at : at + CHUNK_ROWS])).buffers()[2] for at in range(0, len(rows), CHUNK_ROWS))
    return len(rows), write_checked(path, itertools.chain([head], parts))


class _Buffer(threading.local):
    def __init__(self) -> None:
        self.data = io.BytesIO()


_buffer = _Buffer()


def _collect(parts: Iterable[tuple[np.ndarray, pa.Array]]) -> tuple[np.ndarray, pa.Array]:
    """All parts as one, with 64-bit offsets, for a shard can have more than 2 GiB.

    In one buffer of the thread, for one shard after the other: memory that is new to the process costs as much as all that is done with
    it here. Parts should be small enough for the allocator to use theirs again.
    """
    data, numbers, sizes = _buffer.data, [np.empty(0, np.uint32)], [np.zeros(1, np.int64)]
    data.seek(0)
    for of_part, rows in parts:
        offsets = np.frombuffer(rows.buffers()[1], np.int32, len(rows) + 1, rows.offset * 4)
        data.write((rows.buffers()[2] or b"")[int(offsets[0]) : int(offsets[-1])])
        numbers.append(of_part)
        sizes.append(np.diff(offsets))
    starts = np.cumsum(np.concatenate(sizes))
    buffers = [None, pa.py_buffer(starts), pa.py_buffer(data.getbuffer()[: data.tell()])]
    return np.concatenate(numbers), pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(starts) - 1, buffers)


def _check(numbers: np.ndarray, rows: pa.Array) -> None:
    # Looked at are few rows alone, for most are not in the caches: an empty key has the number 0.
    if pc.any(pc.starts_with(rows.take(pa.array(np.flatnonzero(numbers == 0))), KEY_END)).as_py():
        raise ValueError("a key is empty; expected 1 to 500 bytes")
    # Keys that repeat have the same number; few others do.
    ordered = np.sort(numbers.astype(np.uint64) << 32 | np.arange(len(rows), dtype=np.uint64))
    same = np.flatnonzero(ordered[1:] >> 32 == ordered[:-1] >> 32)
    suspects = rows.take(pa.array(np.unique(ordered[np.concatenate([same, same + 1])] & 0xFFFFFFFF))).to_pylist()
    (key, times), *_ = Counter(record.partition(KEY_END)[0] for record in suspects).most_common(1) or [(b"", 1)]
    if times > 1:
        raise ValueError(f"key {key.decode()!r} repeats; expected keys that are unique in a month")


def is_plain(column: pa.Array) -> bool:
    """Whether all values are strings that JSON has as they are: no nulls, no quotes, backslashes or control characters."""
    if not pa.types.is_string(column.type) or column.null_count or not len(column):
        return False
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, column.offset * 4)
    # Byte by byte, since in UTF-8 those of other characters are none of these.
    data = bytes((column.buffers()[2] or b"")[int(offsets[0]) : int(offsets[-1])])
    return not (b'"' in data or b"\\" in data or (data and np.frombuffer(data, np.uint8).min() < 0x20))


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
