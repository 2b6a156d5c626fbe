"""Checksums of what is stored, as Google Cloud Storage reports them."""

import base64
import pathlib
from collections.abc import Iterable
from typing import Any

import google_crc32c

_CHUNK = 1 << 20


def crc32c(data: bytes) -> str:
    """Base64 of the big-endian CRC32C, as Google Cloud Storage reports it."""
    return _encoded(google_crc32c.Checksum(data))


def crc32c_of_file(path: pathlib.Path) -> str:
    """As `crc32c`, of a file that need not fit in memory."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as stream:
        for _ in checksum.consume(stream, _CHUNK):
            pass
    return _encoded(checksum)


def write_checked(path: pathlib.Path, parts: Iterable[Any]) -> str:
    """Write a file and tell its checksum, as `crc32c` does, while its parts are in the caches."""
    checksum = google_crc32c.Checksum()
    with path.open("wb") as stream:
        for part in parts:
            stream.write(part)
            checksum.update(part)
    return _encoded(checksum)


def _encoded(checksum: Any) -> str:
    return base64.b64encode(checksum.digest()).decode()
