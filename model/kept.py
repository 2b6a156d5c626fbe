"""What is learnt from, kept on local disk while it is read or made for the first time: after that it takes a fraction of the time.

Rows come from the lake once, for the survey, and arrays are made of them once, in the first epoch.
"""

import contextlib
import itertools
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from model.features import SPLIT, Examples, learnable, outcomes
from model.seen import coded
from schemas.contract import Contract

T = TypeVar("T")


class Kept(Generic[T]):
    """Values in a file, each read again as it was put; none where they would fill more than half of what is free of the disk."""

    def __init__(self, file: IO[bytes]):
        self._file, self._room = file, shutil.disk_usage(tempfile.gettempdir()).free // 2
        self._ends: list[int] | None = [0]

    def put(self, value: T) -> None:
        if self._ends is None:
            return
        self._ends.append(self._ends[-1] + self._file.write(pickle.dumps(value, protocol=5)))
        if self._ends[-1] > self._room:
            self._file.truncate(0)
            self._ends = None

    def again(self, rng: np.random.Generator) -> Iterator[T] | None:
        """The values in a random order; None where they were not kept."""
        return None if self._ends is None else map(self._read, rng.permutation(list(itertools.pairwise(self._ends))).tolist())

    def _read(self, span: tuple[int, int]) -> T:
        start, end = span
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))


@contextlib.contextmanager
def kept() -> Iterator[Kept[Any]]:
    """In a file that ends with this."""
    with tempfile.TemporaryFile(prefix="adstocrat-", buffering=0) as file:
        yield Kept(file)


@contextlib.contextmanager
def read_once(examples: Examples, contract: Contract) -> Iterator[Examples]:
    """The same examples without gate rows: all of them when they are read first, after that the labelled ones, from local disk."""
    texts = {"creative", *(column.name for column in contract.categoricals)}
    with kept() as rows:
        read = False

        def first() -> Iterator[pa.RecordBatch]:
            for batch in examples(0):
                left, split = learnable(batch)
                columns = [coded(left[name]) if name in texts else left[name] for name in left.schema.names]
                left = pa.RecordBatch.from_arrays([*columns, pa.array(split)], [*left.schema.names, SPLIT])
                if len(labelled := left.filter(pa.array(outcomes(left, contract)[1] > 0))):
                    rows.put(labelled)
                yield left

        def again(epoch: int) -> Iterator[pa.RecordBatch]:
            nonlocal read
            if not read:
                read = True
                return first()
            return rows.again(np.random.default_rng(epoch)) or examples(epoch)

        yield again
