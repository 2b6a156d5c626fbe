"""What is learnt from, kept on local disk while it is read or made for the first time: after that it takes a fraction of the time.

Rows come from the lake once, for the survey, and arrays are made of them once, in the first epoch.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa

from model.features import SPLIT, Arrays, Examples, learnable, outcomes
from model.seen import coded
from schemas.contract import Contract


class Kept:
    """Record batches in a file, each read again as it was put; none where they would fill more than half of what is free of the disk."""

    def __init__(self, file: IO[bytes]):
        self._file, self._room = file, shutil.disk_usage(tempfile.gettempdir()).free // 2
        self._ends: list[int] | None = [0]

    def put(self, batch: pa.RecordBatch) -> None:
        if self._ends is None or not len(batch):
            return
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        end = self._ends[-1] + self._file.write(sink.getvalue())
        self._ends.append(end)
        if end > self._room:
            self._file.truncate(0)
            self._ends = None

    def again(self, rng: np.random.Generator) -> Iterator[pa.RecordBatch] | None:
        """The batches in a random order; None where they were not kept."""
        return None if self._ends is None else self._read(rng.permutation(list(itertools.pairwise(self._ends))).tolist())

    def _read(self, spans: list[tuple[int, int]]) -> Iterator[pa.RecordBatch]:
        for start, end in spans:
            with pa.ipc.open_stream(os.pread(self._file.fileno(), end - start, start)) as reader:
                yield reader.read_next_batch()


@contextlib.contextmanager
def kept() -> Iterator[Kept]:
    """In a file that ends with this."""
    with tempfile.TemporaryFile(prefix="adstocrat-", buffering=0) as file:
        yield Kept(file)


@contextlib.contextmanager
def read_once(examples: Examples, contract: Contract) -> Iterator[Examples]:
    """The same examples without gate rows: all of them when they are read first, after that the labelled ones, from local disk."""
    texts = {"creative", *(column.name for column in contract.features if column.categorical)}
    with kept() as rows:
        read = False

        def first() -> Iterator[pa.RecordBatch]:
            for batch in examples(0):
                left, split = learnable(batch)
                columns = [coded(left[name]) if name in texts else left[name] for name in left.schema.names]
                left = pa.RecordBatch.from_arrays([*columns, pa.array(split)], [*left.schema.names, SPLIT])
                rows.put(left.filter(pa.array(outcomes(left, contract)[1] > 0)))
                yield left

        def again(epoch: int) -> Iterator[pa.RecordBatch]:
            nonlocal read
            if not read:
                read = True
                return first()
            return rows.again(np.random.default_rng(epoch)) or examples(epoch)

        yield again


def as_batch(arrays: Arrays) -> pa.RecordBatch:
    """Arrays of shape (rows,) or (rows, n) as columns."""
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1]) if array.ndim == 2 else pa.array(array)
        for array in arrays.values()
    ]
    return pa.RecordBatch.from_arrays(columns, list(arrays))


def as_arrays(batch: pa.RecordBatch) -> Arrays:
    """What `as_batch` was given."""
    return {
        name: column.flatten().to_numpy().reshape(len(batch), -1) if pa.types.is_fixed_size_list(column.type) else column.to_numpy()
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
