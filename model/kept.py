"""What each epoch learns from, kept on local disk from the first on: reading it takes a fraction of making it from the lake again."""

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np

from model.features import Arrays

log = logging.getLogger("adstocrat")


def raw_file() -> IO[bytes]:
    """A temporary file as NumPy reads and writes it without a copy."""
    return tempfile.TemporaryFile(prefix="adstocrat-", buffering=0)


class Kept:
    """Blocks of arrays, written as they pass by, and read again in any order.

    Args:
        file: where to, a `raw_file`.
        rows: that will pass by: blocks that would fill more than half of the disk are not kept.
    """

    def __init__(self, file: IO[bytes], rows: int):
        self._file, self._rows, self._names = file, rows, list[str]()
        self._starts: list[int] | None = []

    def keep(self, blocks: Iterable[Arrays]) -> Iterator[Arrays]:
        """The blocks themselves."""
        for block in blocks:
            if self._starts == [] and self._too_many(block):
                self._starts = None
            if self._starts is not None:
                self._starts.append(self._file.tell())
                self._names = list(block)
                for array in block.values():
                    np.save(self._file, array)
            yield block

    def again(self, rng: np.random.Generator) -> Iterator[Arrays] | None:
        """The blocks in a random order; None where they were not kept."""
        return None if self._starts is None else self._read(rng.permutation(self._starts).tolist())

    def _read(self, starts: list[int]) -> Iterator[Arrays]:
        for start in starts:
            self._file.seek(start)
            yield {name: np.load(self._file) for name in self._names}

    def _too_many(self, block: Arrays) -> bool:
        rows = max(len(array) for array in block.values())
        size, free = (
            self._rows * sum(array.nbytes for array in block.values()) / max(rows, 1),
            shutil.disk_usage(tempfile.gettempdir()).free,
        )
        if size > free / 2:
            log.info("  train: %.1f GB are not kept on a disk with %.1f GB, so each epoch reads the lake", size / 1e9, free / 1e9)
        return size > free / 2
