"""Lookup: the scores as a precomputed table that the REST service answers from, one LMDB file a shard of keys.

    adstocrat lookup 2026-10 --lake gs://bucket

Writes `lookup/<month>/<run>/`.
"""

import datetime
import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator
from zlib import crc32

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.arrow import UNIT_ROWS, CommitStage, Repartition, Unit, read_unit, shards_for
from beam_jobs.run import MonthRun
from beam_jobs.workers import Listed
from schemas import lake
from schemas.lake import Manifest, Receipt
from schemas.parquet import read_parquet, upload
from schemas.storage import Storage
from serving import store

# What is the same for every row of a run is said once, in the manifest; the service adds it to each answer.
SAME_FOR_ALL = ("month", "run_id", "encoder_version", "model_version")
CHUNK_ROWS = 16_384


def define_pipeline(root: beam.Pipeline, run: MonthRun, scores: Manifest) -> None:
    """Score files → lookup shards by key."""
    folder = run.stage("lookup")
    shards = shards_for(scores.rows, UNIT_ROWS)
    info = {
        "month": run.month,
        "run": run.id,
        "shards": shards,
        "encoder_version": scores.info["encoder"],
        "model_version": scores.info["ranker"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    _ = (
        root
        | "Scores" >> Listed(lambda: run.manifest(run.stage("scores"), "score").files, str)
        | "SpreadScores" >> beam.Reshuffle()
        | "ReadScores" >> beam.FlatMap(functools.partial(read_scores, run.storage)).with_output_types(pa.RecordBatch)
        | "ShardByKey" >> Repartition(run.storage, run.spill, shards, functools.partial(shard_of_key, shards=shards), unit_rows=None)
        | "SpreadShards" >> beam.Reshuffle()
        | "WriteShard" >> beam.Map(write_shard, run.storage, folder, shards).with_output_types(Receipt)
        | "CommitLookup" >> CommitStage(run.storage, folder, store.STAGE, info)
    )


def read_scores(storage: Storage, file: str) -> Iterator[pa.RecordBatch]:
    """A score file's rows, without what is the same for all."""
    for batch in read_parquet(storage, file):
        yield batch.select([name for name in batch.schema.names if name not in SAME_FOR_ALL])


def shard_of_key(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    """As `serving.store.shard_of`, for a whole column: shape (rows,), dtype uint32."""
    return np.fromiter(map(crc32, batch["key"].cast(pa.binary()).to_pylist()), np.uint32, batch.num_rows) % np.uint32(shards)


def write_shard(unit: Unit, storage: Storage, folder: str, shards: int) -> Receipt:
    """Sort a shard's rows by key and write them as its LMDB file."""
    table = pa.Table.from_batches(read_unit(storage, unit)).combine_chunks()
    table = table.take(pc.sort_indices(table["key"]))
    # As JSON a chunk at a time: what a chunk took is there again for the next.
    chunks = ((lists(batch["key"]), lists(json_objects(batch))) for batch in table.to_batches(CHUNK_ROWS))
    name = store.shard_name(unit.shard, shards)
    with tempfile.TemporaryDirectory(prefix="adstocrat-") as temporary:
        path = pathlib.Path(temporary) / "shard.lmdb"
        rows = store.write_shard(path, chunks, 2 * table.nbytes)
        file, checksum = upload(storage, path, lake.unique(folder, name, ".lmdb"))
    return Receipt(name, file, rows, {"entries": rows}, checksum)


def lists(column: pa.Array) -> list[bytes]:
    """A column of strings as their bytes."""
    return column.cast(pa.binary()).to_pylist()


def json_objects(batch: pa.RecordBatch) -> pa.Array:
    """Each row as a JSON object in one string, made by column."""
    pieces, text = [], "{"
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        quote = '"' if is_plain(column) else ""
        pieces += [pa.scalar(f"{text}{json.dumps(name, ensure_ascii=False)}:{quote}"), column if quote else json_values(column)]
        text = quote + ","
    return pc.binary_join_element_wise(*pieces, pa.scalar(text[:-1] + "}"), pa.scalar(""))


def is_plain(column: pa.Array) -> bool:
    """Whether all values are strings that JSON has as they are: no nulls, no quotes, backslashes or control characters."""
    if not pa.types.is_string(column.type) or column.null_count or not len(column):
        return False
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, column.offset * 4)
    # Byte by byte, since in UTF-8 those of other characters are none of these.
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return not ((data < 0x20) | (data == ord('"')) | (data == ord("\\"))).any()


def json_values(column: pa.Array) -> pa.Array:
    """A column's values as JSON texts; a null is `null`."""
    texts = json_strings(column) if pa.types.is_string(column.type) else column.cast(pa.string())
    return pc.fill_null(texts, "null")


def json_strings(column: pa.Array) -> pa.Array:
    """Strings as JSON strings, quoted and escaped."""
    text = pc.replace_substring(pc.replace_substring(column, "\\", "\\\\"), '"', '\\"')
    if pc.any(pc.match_substring_regex(text, "[\\x00-\\x1f]")).as_py():
        for code in range(0x20):
            text = pc.replace_substring(text, chr(code), f"\\u{code:04x}")
    return pc.binary_join_element_wise(pa.scalar('"'), text, pa.scalar('"'), pa.scalar(""))
