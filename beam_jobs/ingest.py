"""Ingest: the month's CSV files become checked, typed rows, sharded by image, and rejects.

    adstocrat ingest 2026-10 --lake gs://bucket
    adstocrat ingest 2026-10 --lake gs://bucket -- --runner=DataflowRunner --project=P --region=R --temp_location=gs://bucket/tmp

Writes `rows/<month>/<run>/` and `rejects/<month>/<run>/`.
"""

import functools
import gzip
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam import pvalue

from beam_jobs.arrow import CommitStage, Repartition, Unit, read_unit, shards_for
from beam_jobs.run import MonthRun
from schemas.hashing import hash64_column, salted
from schemas.lake import Receipt
from schemas.parquet import write_parquet
from schemas.rows import read_rows
from schemas.storage import Entry, Storage

_HEAD_BYTES = 1 << 18


def define_pipeline(root: beam.Pipeline, run: MonthRun) -> None:
    """Files → rows in shards, one receipt a file and one a unit of rows."""
    shards = shards_for(estimated_rows(run.storage, run.ads))
    folder = run.stage("rows")
    image = run.contract.image.name if run.contract.image else None
    assign = functools.partial(shard_of_rows, image=image, shards=shards)
    read = (
        root
        | "Files" >> beam.Create([entry.name for entry in run.ads])
        | "SpreadFiles" >> beam.Reshuffle()
        | "ReadRows" >> beam.ParDo(_ReadRows(run)).with_outputs("receipts", main="rows")
    )
    written = (
        read.rows
        | "ShardByImage" >> Repartition(run.storage, run.spill, shards, assign)
        | "SpreadShards" >> beam.Reshuffle()
        | "WriteRows" >> beam.Map(write_rows, run.storage, folder).with_output_types(Receipt)
    )
    info = {"shards": shards, "contract": run.contract.fingerprint}
    _ = (read.receipts, written) | beam.Flatten() | "CommitRows" >> CommitStage(run.storage, folder, "ingest", info)


class _ReadRows(beam.DoFn):
    """One file → its row batches, and on `receipts` what was read and rejected."""

    def __init__(self, run: MonthRun):
        self._run = run

    def process(self, file: str) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput[Literal["receipts"], Receipt]]:
        run, counts, rejects = self._run, Counter[str](), []
        with run.storage.open(file) as stream:
            for checked in read_rows(stream, run.contract, file):
                counts["read"] += checked.read
                if checked.rejects.num_rows:
                    rejects.append(checked.rejects)
                    counts.update(f"rejected:{reason}" for reason in checked.rejects["reason"].to_pylist())
                if checked.rows.num_rows:
                    yield checked.rows
        receipt = write_parquet(run.storage, run.stage("rejects"), f"file/{file}", rejects, counts)
        yield pvalue.TaggedOutput("receipts", receipt)


def shard_of_image(images: pa.Array, shards: int) -> np.ndarray:
    """The shard of each image name, shape (rows,), dtype int64: what rows, creatives and embeddings agree on."""
    return (hash64_column(images, salted("shard")) % np.uint64(shards)).astype(np.int64)


def shard_of_rows(batch: pa.RecordBatch, image: str | None, shards: int) -> np.ndarray:
    """The shard of each row: by its image (a column's name), and by key where there is none, which spreads those rows."""
    by_key = shard_of_image(batch["key"], shards)
    if image is None:
        return by_key
    return np.where(batch[image].is_null().to_numpy(zero_copy_only=False), by_key, shard_of_image(batch[image], shards))


def write_rows(unit: Unit, storage: Storage, folder: str) -> Receipt:
    """Write a unit's rows in the order of a hash of their keys: the same whatever the bundles were, and shuffled for training."""
    table = pa.Table.from_batches(read_unit(storage, unit)).combine_chunks()
    keys = table["key"].combine_chunks()
    order = np.lexsort((np.arange(len(keys)), hash64_column(keys, salted("order"))))
    return write_parquet(storage, folder, f"shard/{unit.name}", table.take(pa.array(order)).to_batches(), {"ingested": table.num_rows})


def estimated_rows(storage: Storage, files: tuple[Entry, ...]) -> int:
    """Rows of all files, guessed from the heads of a few; decides how many shards there are and nothing else."""
    lines = read = 0
    for entry in files[:8]:
        head = storage.read(entry.name, 0, min(_HEAD_BYTES, entry.size))
        if entry.name.endswith(".gz"):
            with storage.open(entry.name) as stream, gzip.GzipFile(fileobj=stream) as plain:
                found = plain.read(_HEAD_BYTES)
                # A tenth is what CSV packs to.
                lines, read = lines + found.count(b"\n"), read + max(1, min(entry.size, len(found) // 10))
        else:
            lines, read = lines + head.count(b"\n"), read + len(head)
    return int(sum(entry.size for entry in files) * lines / read) if read else 0
