"""Creatives: every image of the month is known by its content, and looked at once in its life.

    adstocrat creatives 2026-10 --lake gs://bucket

An image is skipped if one of the same name, size and checksum was looked at in any month; else it is fetched, and decoded unless its
content (SHA-256) is known under another name. Writes `creatives/<month>/<run>/packs/` (new images, with their thumbnails) and
`creatives/<month>/<run>/` (the month's image names with creative and status, in the shards of the rows, and statistics of them).
"""

import functools
import hashlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs import statistics
from beam_jobs.arrow import CommitStage, ShardPair, pair_shards, read_table, shards_for
from beam_jobs.ingest import shard_of_image
from beam_jobs.join import INDEX
from beam_jobs.run import LISTING, MonthRun, joined
from beam_jobs.workers import read_by_shard
from model import images
from schemas import lake
from schemas.ahead import each_ahead
from schemas.hashing import shard_of_column
from schemas.lake import Receipt
from schemas.parquet import read_columns, write_parquet
from schemas.storage import Storage

log = logging.getLogger("adstocrat")

# A pack of that many new images is 130 MB. It is written as it is made, so memory does not grow with it.
IMAGES_PER_UNIT = 16_384
_PACK_ROWS = 1024
# For each thread so many are asked for ahead of their turn, so that one that is slow to come keeps no other waiting.
_AHEAD = 16
# Of a picture that was decoded: width over height, and mean brightness from 0 to 1.
_LOOKS = pa.schema([("image_status", pa.string()), ("aspect", pa.float32()), ("brightness", pa.float32())])
_Looks = dict[str, Any]
FILES = pa.schema([*LISTING, ("creative", pa.string()), *_LOOKS])
PACK = pa.schema([*FILES, ("thumbnail", pa.binary(images.THUMBNAIL_BYTES))])


def define_pack_pipeline(root: beam.Pipeline, run: MonthRun) -> None:
    """Listing and known images → packs of the new ones, with thumbnails; units hold equal contents together."""
    folder = run.stage("creatives")
    units = shards_for(run.inputs["images"]["count"], IMAGES_PER_UNIT)
    _ = (
        _paired(root, run, units, shard_of_content)
        | "FetchAndDecode" >> beam.Map(write_pack, run, units).with_output_types(Receipt)
        | "CommitPacks" >> CommitStage(run.storage, f"{folder}/packs", "packs")
    )


def define_index_pipeline(root: beam.Pipeline, run: MonthRun, shards: int) -> None:
    """Listing and all images looked at → the month's image names with creative and status, in the shards of the rows."""
    folder = run.stage("creatives")
    _ = (
        _paired(root, run, shards, _shard_of_name)
        | "WriteIndex" >> beam.Map(write_index, run.storage, folder).with_output_types(Receipt)
        | "CommitIndex" >> CommitStage(run.storage, folder, "creatives", {"shards": shards})
    )


def pack_files(storage: Storage) -> list[str]:
    """The packs of all complete runs: every image ever looked at, each name and content once."""
    return [receipt.file for receipt in lake.pack_receipts(storage, "creatives/") if receipt.file]


def _paired(root: beam.Pipeline, run: MonthRun, shards: int, assign: Any) -> beam.PCollection:
    read_listing, read_known = (functools.partial(_read, run.storage, columns) for columns in (LISTING, FILES))
    listing = read_by_shard(root, "Listing", run, lambda: [run.inputs["listing"]], read_listing, shards, assign)
    known = read_by_shard(root, "Known", run, lambda: pack_files(run.storage), read_known, shards, assign)
    return pair_shards(listing, known)


def _read(storage: Storage, columns: pa.Schema, file: str) -> Iterator[pa.RecordBatch]:
    """Columns of a file; those that packs of earlier versions lack are null."""
    for batch in read_columns(storage, file, columns.names):
        there = {name: batch[name] for name in batch.schema.names}
        arrays = [there[field.name] if field.name in there else pa.nulls(len(batch), field.type) for field in columns]
        yield pa.RecordBatch.from_arrays(arrays, schema=columns)


def shard_of_content(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    """Images that may be the same content fall together: by size and checksum, whatever they are called."""
    return shard_of_column(joined(batch, "size", "crc32c"), "content", shards)


def _shard_of_name(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    return shard_of_image(batch["image"], shards)


def _listed_and_looked(pair: ShardPair, storage: Storage) -> tuple[pa.Table, pa.Table]:
    """A unit's listing, and of all that was ever looked at what has the size and checksum of one of it."""
    listing = read_table(storage, pair.left, LISTING)
    contents = pc.unique(joined(listing, "size", "crc32c"))
    return listing, read_table(storage, pair.right, FILES, lambda batch: pc.is_in(joined(batch, "size", "crc32c"), contents))


def write_pack(pair: ShardPair, run: MonthRun, units: int) -> Receipt:
    """Look at a unit's new images and write them as a pack."""
    started, threads = time.monotonic(), run.config.fetch_threads
    listing, looked = _listed_and_looked(pair, run.storage)
    # An image that was gone when it was to be looked at was not looked at: it may be delivered again.
    known = looked.filter(looked["creative"].is_valid())
    counts = Counter[str]()
    seen = pc.is_in(joined(listing), joined(known).combine_chunks())
    new = listing.filter(pc.invert(seen)).sort_by([("size", "ascending"), ("crc32c", "ascending"), ("image", "ascending")])
    contents: dict[tuple[int, str], dict[str, _Looks]] = {}
    for row in known.group_by(["size", "crc32c", "creative", *_LOOKS.names]).aggregate([]).to_pylist():
        contents.setdefault(_content(row), {})[row["creative"]] = {name: row[name] for name in _LOOKS.names}
    rows = (row for batch in new.to_batches(_PACK_ROWS) for row in batch.to_pylist())
    groups = (list(group) for _, group in itertools.groupby(rows, _content))
    looks = each_ahead(lambda group: _look_at(run, group, contents.get(_content(group[0]), {})), groups, threads, _AHEAD * threads)
    looked_at = _batches(itertools.chain.from_iterable(looks), counts)
    receipt = write_parquet(run.storage, run.stage("creatives") + "/packs", f"pack/{pair.shard:05d}", looked_at, counts)
    if receipt.rows:
        log.info("  creatives: unit %d of %d, %d images in %.1f s", pair.shard + 1, units, receipt.rows, time.monotonic() - started)
    return receipt


def _content(row: dict[str, Any]) -> tuple[int, str]:
    """What images that may all be one content have in common."""
    return row["size"], row["crc32c"]


def _look_at(run: MonthRun, group: list[dict[str, Any]], known: dict[str, _Looks]) -> list[dict[str, Any]]:
    """Fetch images that may all be one content; decode each content that is not `known`, by creative, once."""
    looked = []
    contents = dict(known)
    for row in group:
        thumbnail = None
        try:
            data = run.storage.read(lake.raw_images(run.month) + row["image"])
        except FileNotFoundError:
            # Listed, and gone since.
            looked.append({**row, "creative": None, "image_status": images.MISSING, "thumbnail": None})
            continue
        creative = hashlib.sha256(data).hexdigest()
        if creative not in contents:
            try:
                pixels, status = images.decode(data)
                thumbnail = pixels.tobytes()
                contents[creative] = {"image_status": status, "aspect": images.aspect(data), "brightness": float(pixels.mean()) / 255}
            except images.ImageFault as fault:
                contents[creative] = {"image_status": fault.fault}
        looked.append({**row, "creative": creative, **contents[creative], "thumbnail": thumbnail})
    return looked


def _batches(rows: Iterator[dict[str, Any]], counts: Counter[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a pack in batches; `counts` grow with them."""
    while some := list(itertools.islice(rows, _PACK_ROWS)):
        for row in some:
            fetched = row["image_status"] != images.MISSING
            counts["fetched"] += fetched
            counts["bytes"] += row["size"] * fetched
            counts["decoded"] += row["thumbnail"] is not None
        yield pa.RecordBatch.from_pylist(some, PACK)


def write_index(pair: ShardPair, storage: Storage, folder: str) -> Receipt:
    """The creative and status of every image name of a shard, sorted by name."""
    listing, looked = _listed_and_looked(pair, storage)
    # By creative, nulls last: the first that is found of a name is one that was there, if ever it was.
    looked = looked.sort_by("creative")
    where = pc.index_in(joined(listing), joined(looked).combine_chunks())
    found = looked.select(["creative", *_LOOKS.names]).take(where)
    usable = pc.is_in(found["image_status"], pa.array(images.USABLE))
    columns = [listing["image"], pc.if_else(usable, found["creative"], None), found["image_status"]]
    index = pa.table(columns, schema=INDEX).sort_by("image").combine_chunks()
    counts = {f"status:{row['values']}": row["counts"] for row in pc.value_counts(index["image_status"]).to_pylist()}
    receipt = write_parquet(storage, folder, f"index/{pair.shard:05d}.000", index.to_batches(), {"images": len(index), **counts})
    if receipt.file:
        seen = (listing["image"], listing["size"], found["aspect"], found["brightness"], found["image_status"])
        sketches = statistics.of_images(*(column.combine_chunks() for column in seen))
        statistics.write(storage, statistics.unit_file(receipt.file), sketches)
    return receipt
