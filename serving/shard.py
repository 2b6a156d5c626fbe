"""A shard of the lookup table: one file that is written once and read where it lies, mapped into memory.

    header     8 bytes MAGIC, then rows, buckets and the file's size; as all numbers here unsigned 64-bit, little-endian
    starts     buckets + 1 positions in the file: where each bucket's records start, and where the last one's end
    records    0xFE, then by bucket: key 0xFF value 0xFE

Keys and values are UTF-8, which has neither byte. A key's shard and bucket follow from its CRC-32, the one hash that costs a reader next to
nothing, and there are as many buckets as rows; so a key that is there is found by two reads, of its bucket's start and of the few
records in it. A search tree would read a dozen places, each a cache miss of its own in a table that is larger than the caches.
"""

import contextlib
import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import BinaryIO
from zlib import crc32

MAGIC = b"adslkup1"
HEADER = struct.Struct("<8sQQQ")
KEY_END, END = b"\xff", b"\xfe"

_PIECE = 2 << 20
_POPULATE_READ = 22  # Of <sys/mman.h>; a kernel before 5.14 says that it does not know it.


def shard_of(key: bytes, shards: int) -> int:
    """The shard that holds a key, for the writer and the reader alike."""
    return crc32(key) % shards


def shard_name(shard: int, shards: int) -> str:
    """The unit of a shard in the manifest and its file name in a cache: `shard-00000-of-00004`."""
    return f"shard-{shard:05d}-of-{shards:05d}"


def read_header(stream: BinaryIO) -> tuple[int, int]:
    """Rows and buckets of an open shard.

    Raises:
        ValueError: it is no shard, or cut.
    """
    head = stream.read(HEADER.size)
    size = stream.seek(0, 2)
    if len(head) < HEADER.size or head[: len(MAGIC)] != MAGIC:
        raise ValueError(f"it starts with {head[: len(MAGIC)]!r}; expected {MAGIC!r} and its counts")
    _, rows, buckets, expected = HEADER.unpack(head)
    if size != expected:
        raise ValueError(f"it has {size:,} bytes; expected {expected:,}")
    return rows, buckets


class Shard:
    """An open shard.

    Attributes:
        rows: how many it has.
        buckets: into how many its records are parted.
        starts: shape (buckets + 1,).
        data: the file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Map the file, whose checksum must have been looked at: one that becomes shorter kills the process with SIGBUS.

        Raises:
            OSError, ValueError: it cannot be read, or is no shard.
        """
        with path.open("rb") as stream:
            self.rows, self.buckets = read_header(stream)
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        # Lookups are random, so reading ahead would only evict pages that are needed.
        self.data.madvise(mmap.MADV_RANDOM)
        self._bytes = memoryview(self.data)
        self.starts = self._bytes[HEADER.size : HEADER.size + 8 * (self.buckets + 1)].cast("Q")

    def first_key(self) -> bytes | None:
        """Of the records, if there is one."""
        begin = self.starts[0]
        return self.data[begin : self.data.find(KEY_END, begin)] if self.rows else None

    def populate(self, stop: Callable[[], bool]) -> None:
        """Map all pages, or each would cost the first request that meets it a page fault; until `stop` says so."""
        for start in range(0, len(self.data), _PIECE):  # Other threads wait for each piece.
            if stop():
                return
            with contextlib.suppress(OSError):
                self.data.madvise(_POPULATE_READ, start, min(_PIECE, len(self.data) - start))

    def close(self) -> None:
        """Unmap the file; whoever reads it from then on gets a ValueError."""
        self.starts.release()
        self._bytes.release()
        self.data.close()
