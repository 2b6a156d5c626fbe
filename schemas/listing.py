"""Listing a bucket of many millions of objects: ranges of names at a time, each cut in two while there are threads to take both."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

# A page has 1,000 names and takes about a tenth of a second, of which Python needs a tenth to read it.
THREADS = 16
_HIGHEST = 0x7F
Item = TypeVar("Item")
# (after, end) → the first page of the items whose names lie between, without both, and the page's last name if there are more.
Page = Callable[[str | None, str | None], tuple[list[Item], str | None]]


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Entry:
    """One stored object as a listing shows it.

    Attributes:
        name: path relative to the lake.
        size: bytes.
        crc32c: base64 of the content's CRC32C, as Google Cloud Storage writes it.
    """

    name: str
    size: int
    crc32c: str


def list_all(page: Page[Item], prefix: str, threads: int = THREADS) -> Iterator[Item]:
    """All items under `prefix`, in no order.

    How names are spread need not be known: after each page half of what is left goes to another thread, and a half without names costs
    one request.
    """
    with ThreadPoolExecutor(threads) as pool:
        running: dict[Future[tuple[list[Item], str | None]], str | None] = {pool.submit(page, None, None): None}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                end = running.pop(future)
                items, last = future.result()
                yield from items
                if last is None:
                    continue
                middle = between(last, end or prefix + chr(_HIGHEST)) if len(running) < threads else None
                for after, until in ((last, middle), (middle, end)) if middle else ((last, end),):
                    running[pool.submit(page, after, until)] = until


def between(low: str, high: str) -> str | None:
    """A string above `low` and below `high`, about half way; None where none is near at hand."""
    at = len(os.path.commonprefix([low, high]))  # noqa: RUF071 (of strings, not of paths)
    least, most = _code(low, at), _code(high, at)
    if most - least > 1:
        return low[:at] + chr((least + most) // 2)
    # They are neighbours there: half way through what begins as `low` does.
    for deeper in range(at + 1, len(low) + 1):
        if _code(low, deeper) < _HIGHEST - 1:
            return low[:deeper] + chr((_code(low, deeper) + _HIGHEST + 1) // 2)
    return None


def _code(text: str, at: int) -> int:
    return ord(text[at]) if at < len(text) else 0x1F
