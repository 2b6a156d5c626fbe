"""Ingest: the month's CSV files become checked, typed rows, sharded by image, and rejects.

    adstocrat ingest 2026-10 --lake gs://bucket
    adstocrat ingest 2026-10 --lake gs://bucket -- --runner=DataflowRunner --project=P --region=R --temp_location=gs://bucket/tmp

Writes `rows/<month>/<run>/` and `rejects/<month>/<run>/`.
"""

import contextlib
import dataclasses
import functools
import gzip
import pathlib
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam import pvalue

from beam_jobs.arrow import CommitStage, Repartition, Unit, read_unit, shards_for
from beam_jobs.config import Config
from beam_jobs.run import MonthRun
from schemas import lake
from schemas.csv_records import Layout, is_packed
from schemas.hashing import hash64_column, salted, shard_of_column
from schemas.lake import Receipt
from schemas.parquet import ParquetFile, read_parquet, upload, write_parquet
from schemas.rows import REJECTS, read_rows
from schemas.storage import Entry, Storage

_HEAD_BYTES = 1 << 18
# A file that can be split is read in parts of about this much: what a spill file takes.
SPLIT_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a CSV file that one worker reads.

    Attributes:
        file: its name.
        number: which part, from 0.
        parts: of how many.
        span: the part's rows begin in these bytes, [start, end); None for the whole file.
    """

    file: str
    number: int = 0
    parts: int = 1
    span: tuple[int, int] | None = None


def define_pipeline(root: beam.Pipeline, run: MonthRun) -> None:
    """Files, in parts → rows in shards, one receipt a file and one a unit of rows."""
    shards = shards_for(estimated_rows(run.storage, run.ads))
    folder = run.stage("rows")
    number = functools.partial(whole_file, storage=run.storage, folder=run.stage("rejects"))
    image = run.contract.image.name if run.contract.image else None
    assign = functools.partial(shard_of_rows, image=image, shards=shards)
    read = (
        root
        | "Files" >> beam.Create([part for entry in run.ads for part in parts_of(entry, layout_of(run.config))])
        | "SpreadFiles" >> beam.Reshuffle()
        | "ReadRows" >> beam.ParDo(_ReadRows(run)).with_outputs("parts", main="rows")
    )
    files = read.parts | "GroupByFile" >> beam.GroupByKey() | "NumberRejects" >> beam.MapTuple(number).with_output_types(Receipt)
    written = (
        read.rows
        | "ShardByImage" >> Repartition(run.storage, run.spill, shards, assign)
        | "SpreadShards" >> beam.Reshuffle()
        | "WriteRows" >> beam.Map(write_rows, run.storage, folder).with_output_types(Receipt)
    )
    info = {"shards": shards, "contract": run.contract.fingerprint}
    _ = (files, written) | beam.Flatten() | "CommitRows" >> CommitStage(run.storage, folder, "ingest", info)


def layout_of(config: Config) -> Layout:
    return Layout(config.csv_newlines_in_values, config.csv_encoding)


def parts_of(entry: Entry, layout: Layout) -> list[Part]:
    """The parts to read a file in: one where it cannot be split."""
    count = max(1, round(entry.size / SPLIT_BYTES)) if layout.can_split(entry.name) else 1
    if count == 1:
        return [Part(entry.name)]
    edges = [entry.size * number // count for number in range(count + 1)]
    return [Part(entry.name, number, count, (edges[number], edges[number + 1])) for number in range(count)]


class _ReadRows(beam.DoFn):
    """One part of a file → its row batches, and on `parts` its file and what was read and rejected."""

    def __init__(self, run: MonthRun):
        self._run = run

    def process(self, part: Part) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput[Literal["parts"], tuple[str, Receipt]]]:
        run, counts, writer = self._run, Counter[str](), None
        # The numbers of a part's rows count from its own start, so its rejects are not yet those of the run.
        folder = run.stage("rejects") if part.parts == 1 else run.spill
        unit, file, checksum = f"file/{part.file}@{part.number:05d}", "", ""
        with run.storage.open(part.file) as stream, tempfile.TemporaryDirectory(prefix="adstocrat-") as temporary:
            path = pathlib.Path(temporary) / "rejects.parquet"
            for checked in read_rows(stream, run.contract, part.file, layout_of(run.config), part.span):
                counts["read"] += checked.read
                if checked.rejects.num_rows:
                    writer = writer or ParquetFile(path, REJECTS)
                    writer.write(checked.rejects)
                    counts.update(f"rejected:{reason}" for reason in checked.rejects["reason"].to_pylist())
                if checked.rows.num_rows:
                    yield checked.rows
            if writer:
                writer.close()
                file, checksum = upload(run.storage, path, lake.unique(folder, unit.replace("/", "_"), ".parquet"))
        rejected = counts.total() - counts["read"]
        yield pvalue.TaggedOutput("parts", (part.file, Receipt(unit, file, rejected, dict(counts), checksum)))


def whole_file(file: str, told: Iterable[Receipt], storage: Storage, folder: str) -> Receipt:
    """One receipt of the parts of a file; where there are several, their rejects with the numbers that the rows have in the file."""
    by_part: dict[str, list[Receipt]] = {}
    for receipt in told:
        by_part.setdefault(receipt.unit, []).append(receipt)
    parts = [lake.one_receipt_each(by_part[unit]) for unit in sorted(by_part)]
    counts = sum((Counter(part.counts) for part in parts), Counter[str]())
    if len(parts) == 1:
        return dataclasses.replace(parts[0], unit=f"file/{file}")

    def numbered() -> Iterator[pa.RecordBatch]:
        before = 0
        for part in parts:
            for batch in read_parquet(storage, part.file) if part.file else ():
                yield batch.set_column(batch.schema.get_field_index("row"), "row", pc.add(batch["row"], before))
            before += part.counts.get("read", 0)

    return write_parquet(storage, folder, f"file/{file}", numbered(), counts)


def shard_of_image(images: pa.Array, shards: int) -> np.ndarray:
    """The shard of each image name, shape (rows,), dtype int64: what rows, creatives and embeddings agree on."""
    return shard_of_column(images, "shard", shards)


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
        if is_packed(entry.name):
            found = b""
            with storage.open(entry.name) as stream, contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error):
                # What is no such file is told when it is read.
                found = gzip.GzipFile(fileobj=stream).read(_HEAD_BYTES)
            # A tenth is what CSV packs to.
            lines, read = lines + found.count(b"\n"), read + max(1, min(entry.size, len(found) // 10))
        else:
            head = storage.read(entry.name, 0, min(_HEAD_BYTES, entry.size))
            lines, read = lines + head.count(b"\n"), read + len(head)
    return int(sum(entry.size for entry in files) * lines / read) if read else 0
