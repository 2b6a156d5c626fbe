"""Checksums of what is stored, as Google Cloud Storage reports them."""

import base64
import pathlib
from collections.abc import Iterable
from typing import Any

from google_crc32c import Checksum

_CHUNK = 1 << 20


def crc32c(data: bytes) -> str:
    """Base64 of the big-endian CRC32C, as Google Cloud Storage reports it."""
    return encoded(Checksum(data))


def crc32c_of_file(path: pathlib.Path) -> str:
    """As `crc32c`, of a file that need not fit in memory."""
    checksum = Checksum()
    with path.open("rb") as stream:
        for _ in checksum.consume(stream, _CHUNK):
            pass
    return encoded(checksum)


def write_checked(path: pathlib.Path, parts: Iterable[Any]) -> str:
    """Write a file and tell its checksum, as `crc32c` does, while its parts are in the caches."""
    checksum = Checksum()
    with path.open("wb") as stream:
        for part in parts:
            stream.write(part)
            checksum.update(part)
    return encoded(checksum)


def encoded(checksum: Checksum) -> str:
    """A checksum of pieces, as `crc32c` has it of all of them."""
    return base64.b64encode(checksum.digest()).decode()
