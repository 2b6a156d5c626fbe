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

from schemas.checksum import crc32c, crc32c_of_file
from schemas.listing import Entry

_THREADS = 8
# Files that a thread looks at at a time.
_FILES = 256
_SCHEMA = pa.schema([("name", pa.large_binary()), ("size", pa.int64()), ("changed", pa.int64()), ("crc32c", pa.string())])


def read(memory: bytes) -> pa.Table:
    """What was to be remembered last; nothing, of no bytes.

    Raises:
        ValueError: they are damaged.
    """
    if not memory:
        return _SCHEMA.empty_table()
    checksum, _, stream = memory.partition(b"\n")
    # Arrow believes what it reads, up to addresses outside of it.
    if crc32c(stream).encode() != checksum:
        raise ValueError("its checksum is another")
    return pa.ipc.open_stream(stream).read_all()


def entries(root: pathlib.Path, names: list[str], known: pa.Table) -> tuple[Iterator[Entry], bytes]:
    """The files as a listing shows them, and what to remember of them, which is nothing where that is `known`.

    Args:
        root: their folder.
        names: relative to it.
        known: what was remembered.
    """
    # As bytes, since a file's name may be no text.
    keys = pa.array([os.fsencode(name) for name in names], pa.large_binary())

    def look(some: list[str]) -> np.ndarray:
        stats = [os.stat(root / name) for name in some]
        return np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], np.int64)

    def checksums_of(some: list[str]) -> list[str]:
        return [crc32c_of_file(root / name) for name in some]

    with ThreadPoolExecutor(_THREADS) as pool:
        size, changed = np.concatenate([np.zeros((0, 2), np.int64), *pool.map(look, _cut(names, _FILES))]).T
        at = pc.index_in(keys, known["name"])
        there = pc.and_(pc.equal(known["size"].take(at), pa.array(size)), pc.equal(known["changed"].take(at), pa.array(changed)))
        new = ~pc.fill_null(there, False).to_numpy()
        changed_names = [names[place] for place in np.flatnonzero(new)]
        # So few at a time that all threads have some.
        parts = _cut(changed_names, max(1, min(_FILES, len(changed_names) // (8 * _THREADS))))
        fresh = [checksum for some in pool.map(checksums_of, parts) for checksum in some]
    checksums = pc.replace_with_mask(known["crc32c"].take(at).combine_chunks(), pa.array(new), pa.array(fresh, pa.string()))
    now = b""
    if new.any() or len(known) != len(keys):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch([keys, pa.array(size), pa.array(changed), checksums], schema=_SCHEMA))
        stream = sink.getvalue().to_pybytes()
        now = crc32c(stream).encode() + b"\n" + stream
    return _entries(keys, pa.array(size), checksums), now


def _entries(*columns: pa.Array) -> Iterator[Entry]:
    for start in range(0, len(columns[0]), _FILES):
        for name, size, checksum in zip(*(column[start : start + _FILES].to_pylist() for column in columns), strict=True):
            yield Entry(os.fsdecode(name), size, checksum)


def _cut(names: list[str], length: int) -> list[list[str]]:
    return [names[start : start + length] for start in range(0, len(names), length)]
