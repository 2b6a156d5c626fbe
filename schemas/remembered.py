"""Checksums of a folder's files, remembered with the size and time of change they had: a file is read again when it has changed.

There may be many, so they are remembered as lines in the order of the names, and gone through beside these.
"""

import functools
import io
import json
import os
import pathlib
from collections.abc import Iterator

from schemas.ahead import each_ahead
from schemas.checksum import crc32c, crc32c_of_file
from schemas.listing import Entry

_THREADS = 8
# Files that a thread looks at at a time, if there are enough for all of them.
_FILES = 256
# A file's name, size in bytes, time of change in nanoseconds, and checksum.
_Line = tuple[str, int, int, str]


def read(memory: bytes) -> bytes:
    """The lines of what was to be remembered last; none, of no bytes.

    Raises:
        ValueError: it is damaged.
    """
    checksum, _, lines = memory.partition(b"\n")
    if memory and crc32c(lines).encode() != checksum:
        raise ValueError("its checksum is another")
    return lines


def entries(root: pathlib.Path, names: list[str], before: bytes) -> tuple[Iterator[Entry], bytes]:
    """The files as a listing shows them, and what to remember of them, which is nothing where that is the lines that are known.

    Args:
        root: their folder.
        names: relative to it, sorted.
        before: the lines.
    """
    # Where files are as they were, which is most often, no second copy of the lines is made.
    same, changed = 0, list[bytes]()
    for lines in each_ahead(functools.partial(_look, root), _beside(names, before), _THREADS, 2 * _THREADS):
        if not changed and before.startswith(lines, same):
            same += len(lines)
        else:
            changed.append(lines)
    now = b"".join([before[:same], *changed]) if changed or same < len(before) else before
    found = (Entry(name, size, checksum) for name, size, _, checksum in map(json.loads, io.BytesIO(now)))
    return found, b"" if now is before else crc32c(now).encode() + b"\n" + now


def _beside(names: list[str], before: bytes) -> Iterator[tuple[list[str], dict[str, _Line]]]:
    """The names, some at a time, and what is known of these."""
    length = max(1, min(_FILES, len(names) // (8 * _THREADS)))
    lines = map(json.loads, io.BytesIO(before))
    line: _Line | None = next(lines, None)
    for start in range(0, len(names), length):
        some, known = names[start : start + length], dict[str, _Line]()
        while line and line[0] <= some[-1]:
            known[line[0]] = line
            line = next(lines, None)
        yield some, known


def _look(root: pathlib.Path, some: tuple[list[str], dict[str, _Line]]) -> bytes:
    """The lines of some files, of which these are known."""
    lines, (names, known) = [], some
    for name in names:
        stat = os.stat(f"{root}/{name}")
        _, size, changed, checksum = known.get(name, (name, -1, -1, ""))
        if (size, changed) != (stat.st_size, stat.st_mtime_ns):
            checksum = crc32c_of_file(root / name)
        lines.append(json.dumps([name, stat.st_size, stat.st_mtime_ns, checksum]) + "\n")
    return "".join(lines).encode()
