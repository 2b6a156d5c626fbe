"""Checksums of a folder's files, remembered with the size and time of change they had: a file is read again when it has changed.

There may be millions, so all is in columns.
"""

import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.checksum import crc32c_of_file
from schemas.listing import Entry

_THREADS = 8
# Files that a thread looks at, or reads, at a time.
_FILES = 256


def entries(root: pathlib.Path, names: list[str], memory: bytes) -> tuple[Iterator[Entry], bytes]:
    """The files as a listing shows them, and what to remember of them, which is nothing where that is what the memory has.

    Args:
        root: their folder.
        names: relative to it.
        memory: what was to be remembered of it last, or nothing.

    Raises:
        ValueError: the memory is damaged.
    """
    # As bytes, since a file's name may be no text.
    keys = pa.array([os.fsencode(name) for name in names], pa.binary())
    schema = pa.schema([("name", pa.binary()), ("size", pa.int64()), ("changed", pa.int64()), ("crc32c", pa.string())])
    known = pa.ipc.open_stream(memory).read_all().cast(schema).combine_chunks() if memory else schema.empty_table()

    def look(some: list[str]) -> np.ndarray:
        stats = [os.stat(root / name) for name in some]
        return np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], np.int64)

    def read(some: list[str]) -> list[str]:
        return [crc32c_of_file(root / name) for name in some]

    with ThreadPoolExecutor(_THREADS) as pool:
        size, changed = np.concatenate([np.zeros((0, 2), np.int64), *pool.map(look, _cut(names))]).T
        at = pc.index_in(keys, known["name"])
        there = pc.and_(pc.equal(known["size"].take(at), pa.array(size)), pc.equal(known["changed"].take(at), pa.array(changed)))
        new = ~pc.fill_null(there, False).to_numpy()
        fresh = [checksum for some in pool.map(read, _cut([names[place] for place in np.flatnonzero(new)])) for checksum in some]
    checksums = pc.replace_with_mask(known["crc32c"].take(at).combine_chunks(), pa.array(new), pa.array(fresh, pa.string()))
    sink = pa.BufferOutputStream()
    if new.any() or len(known) != len(keys):
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([keys, pa.array(size), pa.array(changed), checksums], schema=schema))
    return _entries(keys, pa.array(size), checksums), sink.getvalue().to_pybytes()


def _entries(*columns: pa.Array) -> Iterator[Entry]:
    for start in range(0, len(columns[0]), _FILES):
        for name, size, checksum in zip(*(column[start : start + _FILES].to_pylist() for column in columns), strict=True):
            yield Entry(os.fsdecode(name), size, checksum)


def _cut(names: list[str]) -> list[list[str]]:
    return [names[start : start + _FILES] for start in range(0, len(names), _FILES)]
