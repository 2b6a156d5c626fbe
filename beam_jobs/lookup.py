"""Lookup: the scores as a precomputed table that the REST service answers from, one file a shard of keys.

    adstocrat lookup 2026-10 --lake gs://bucket

Writes `lookup/<month>/<run>/`.
"""

import datetime
import functools
import pathlib
import tempfile
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa

from beam_jobs.arrow import CommitStage, Unit, read_unit, shards_for
from beam_jobs.run import MonthRun
from beam_jobs.shard import CHUNK_ROWS, key_numbers, records, write_file
from beam_jobs.threads import InThreads
from beam_jobs.workers import read_by_shard
from schemas import lake
from schemas.lake import Manifest, Receipt
from schemas.parquet import read_parquet, upload
from schemas.storage import Storage
from serving import store
from serving.shard import shard_name

# What is the same for every row of a run is said once, in the manifest; the service adds it to each answer.
SAME_FOR_ALL = ("month", "run_id", "encoder_version", "model_version")


def define_pipeline(root: beam.Pipeline, run: MonthRun, scores: Manifest) -> None:
    """Score files → lookup shards by key."""
    folder = run.stage("lookup")
    shards = shards_for(scores.rows)
    info = {
        "month": run.month,
        "run": run.id,
        "shards": shards,
        "encoder_version": scores.info["encoder"],
        "model_version": scores.info["ranker"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    read = functools.partial(read_scores, run.storage)
    _ = (
        read_by_shard(root, "Scores", run, lambda: run.manifest(run.stage("scores")).files, read, shards, shard_of_key)
        | "SpreadShards" >> beam.Reshuffle()
        | "WriteShard" >> beam.ParDo(InThreads(write_shard, run.storage, folder, shards)).with_output_types(Receipt)
        | "CommitLookup" >> CommitStage(run.storage, folder, store.STAGE, info)
    )


def read_scores(storage: Storage, file: str) -> Iterator[pa.RecordBatch]:
    """A score file's rows, without what is the same for all, behind a first column with the numbers of their keys."""
    for batch in read_parquet(storage, file):
        kept = [name for name in batch.schema.names if name not in SAME_FOR_ALL]
        numbers = pa.array(key_numbers(batch["key"]))
        yield pa.RecordBatch.from_arrays([numbers, *(batch[name] for name in kept)], ["", *kept])


def shard_of_key(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    """As `serving.shard.shard_of`, for a batch of `read_scores`: shape (rows,), dtype uint32."""
    return batch.column(0).to_numpy() % np.uint32(shards)


def write_shard(unit: Unit, storage: Storage, folder: str, shards: int) -> Receipt:
    """Write a shard's rows as its file."""
    name = shard_name(unit.shard, shards)
    with tempfile.TemporaryDirectory(prefix="adstocrat-") as temporary:
        path = pathlib.Path(temporary) / "shard"
        rows, checksum = write_file(path, records_of(unit, storage), shards)
        file, _ = upload(storage, path, lake.unique(folder, name, ".shard"), checksum)
    return Receipt(name, file, rows, {"entries": rows}, checksum)


def records_of(unit: Unit, storage: Storage) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """A shard's rows in parts that the caches hold: the numbers of their keys, and what the shard has of them."""
    for batch in read_unit(storage, unit):
        for at in range(0, len(batch), CHUNK_ROWS):
            some = batch.slice(at, CHUNK_ROWS)
            yield some.column(0).to_numpy(), records(some.select(range(1, some.num_columns)))
