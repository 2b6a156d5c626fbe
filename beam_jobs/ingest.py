"""Ingest: the month's CSV files become checked, typed rows, sharded by image, and rejects.

    adstocrat ingest 2026-10 --lake gs://bucket
    adstocrat ingest 2026-10 --lake gs://bucket -- --runner=DataflowRunner --project=P --region=R --temp_location=gs://bucket/tmp

Writes `rows/<month>/<run>/`, `rejects/<month>/<run>/`, and statistics of each file of rows (beam_jobs/statistics.py).
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

from beam_jobs import duplicates, statistics
from beam_jobs.arrow import CommitStage, Repartition, ShardPair, Unit, pair_shards, read_table, shards_for
from beam_jobs.config import Config
from beam_jobs.run import MonthRun
from beam_jobs.threads import EachInThreads, InThreads
from beam_jobs.workers import Listed
from model.features import MONTH, is_mature
from model.seen import hashes_of
from schemas import lake
from schemas.ahead import ahead
from schemas.contract import Column
from schemas.csv_records import Layout, is_packed
from schemas.hashing import shard_of_column
from schemas.lake import Receipt
from schemas.parquet import ParquetFile, read_parquet, upload, write_parquet
from schemas.rows import DUPLICATE_KEY, duplicate_rejects, read_rows
from schemas.storage import Entry, Storage

_HEAD_BYTES = 1 << 18
# A file that can be split is read in parts of about this much.
SPLIT_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a CSV file that one worker reads.

    Attributes:
        index: which part of the month, from 0, by file name and place in the file.
        file: its name.
        number: which part of the file, from 0.
        span: the part's rows begin in these bytes, [start, end); None for the whole file.
    """

    index: int
    file: str
    number: int = 0
    span: tuple[int, int] | None = None


def define_pipeline(root: beam.Pipeline, run: MonthRun) -> None:
    """Files, in parts → rows in shards, one receipt a file and one a unit of rows."""
    shards = shards_for(estimated_rows(run.storage, run.ads))
    folder = run.stage("rows")
    parts = len(month_parts(run))
    number = functools.partial(whole_file, storage=run.storage, folder=run.stage("rejects"))
    by_key = functools.partial(duplicates.shard_of_key, shards=shards)
    read = (
        root
        | "Files" >> Listed(functools.partial(month_parts, run), Part)
        | "ReadRows" >> beam.ParDo(_ReadRows(run, shards)).with_outputs("parts", main="rows")
    )
    later = (
        read.rows
        | "Keys" >> beam.Map(duplicates.keyed).with_output_types(pa.RecordBatch)
        | "ShardByKey" >> Repartition(run.storage, run.spill, shards, by_key, unit_rows=None)
        | "SpreadKeys" >> beam.Reshuffle()
        | "FindDuplicates" >> beam.ParDo(EachInThreads(duplicates.find_duplicates, run.storage)).with_output_types(pa.RecordBatch)
    )
    turned_away = (
        later
        | "ShardByPart" >> Repartition(run.storage, run.spill, parts, duplicates.part_of)
        | "SpreadDuplicates" >> beam.Reshuffle()
        | "RejectDuplicates" >> beam.Map(reject_duplicates, run).with_output_types(tuple[str, Receipt])
    )
    files = (
        (read.parts, turned_away)
        | "OfFiles" >> beam.Flatten()
        | "GroupByFile" >> beam.GroupByKey()
        | "NumberRejects" >> beam.MapTuple(number).with_output_types(Receipt)
    )
    rows = read.rows | "ShardByImage" >> Repartition(run.storage, run.spill, shards, duplicates.shard_of_row)
    dropped = later | "ShardDuplicates" >> Repartition(run.storage, run.spill, shards, duplicates.shard_of_row, unit_rows=None)
    written = pair_shards(rows, dropped) | "WriteRows" >> beam.ParDo(InThreads(write_rows, run)).with_output_types(Receipt)
    info = {"shards": shards, "contract": run.contract.fingerprint}
    _ = (files, written) | beam.Flatten() | "CommitRows" >> CommitStage(run.storage, folder, "ingest", info)


def layout_of(config: Config) -> Layout:
    return Layout(config.csv_newlines_in_values, config.csv_encoding)


def parts_of(files: Iterable[Entry], layout: Layout) -> list[Part]:
    """The parts to read the files in: one of a file that cannot be split."""
    parts: list[Part] = []
    for entry in sorted(files, key=lambda entry: entry.name):
        count = max(1, round(entry.size / SPLIT_BYTES)) if layout.can_split(entry.name) else 1
        edges = [entry.size * number // count for number in range(count + 1)]
        for number in range(count):
            span = None if count == 1 else (edges[number], edges[number + 1])
            parts.append(Part(len(parts), entry.name, number, span))
    return parts


@functools.lru_cache(2)
def month_parts(run: MonthRun) -> list[Part]:
    """The parts of the month's files, listed once a process."""
    return parts_of(run.ads, layout_of(run.config))


class _ReadRows(beam.DoFn):
    """One part of a file → its rows in batches, each with its origin and shard, and on `parts` its file and what was read and rejected."""

    def __init__(self, run: MonthRun, shards: int):
        self._run, self._shards = run, shards

    def process(self, part: Part) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput[Literal["parts"], tuple[str, Receipt]]]:
        run, counts, writer = self._run, Counter[str](read=0), None
        unit, file, checksum = _unit(part), "", ""
        with run.storage.open(part.file) as stream, tempfile.TemporaryDirectory(prefix="adstocrat-") as temporary:
            path = pathlib.Path(temporary) / "rejects.parquet"
            for checked in ahead(read_rows(stream, run.contract, part.file, layout_of(run.config), part.span)):
                counts["read"] += checked.read
                if checked.rejects.num_rows:
                    writer = writer or ParquetFile(path, checked.rejects)
                    writer.write(checked.rejects)
                    counts.update(f"rejected:{reason}" for reason in checked.rejects["reason"].to_pylist())
                if checked.rows.num_rows:
                    shards = pa.array(shard_of_rows(checked.rows, run.contract.image, self._shards).astype(np.int32))
                    rows = checked.rows.append_column(duplicates.ORIGIN, duplicates.origins(part.index, checked.numbers))
                    yield rows.append_column(duplicates.SHARD, shards)
            if writer:
                writer.close()
                # Not yet among the run's rejects, which people read by the folder: the duplicates, and the numbers in the file, come later.
                file, checksum = upload(run.storage, path, lake.unique(run.spill, unit.replace("/", "_"), ".parquet"))
        rejected = counts.total() - counts["read"]
        yield pvalue.TaggedOutput("parts", (part.file, Receipt(unit, file, rejected, dict(counts), checksum)))


def _unit(part: Part) -> str:
    return f"file/{part.file}@{part.number:05d}"


def reject_duplicates(unit: Unit, run: MonthRun) -> tuple[str, Receipt]:
    """Write the rejects of a part's rows whose keys were there before, or of as many of them as a unit holds."""
    part = month_parts(run)[unit.shard]
    found = read_table(run.storage, (unit,), duplicates.KEYED).sort_by(duplicates.ORIGIN)
    later = pa.table({"row": duplicates.row_of(found[duplicates.ORIGIN]), "key": found["key"]})
    with run.storage.open(part.file) as stream:
        rejects = duplicate_rejects(stream, run.contract, part.file, layout_of(run.config), part.span, later)
        counts = {f"rejected:{DUPLICATE_KEY}": len(later)}
        return part.file, write_parquet(run.storage, run.spill, f"{_unit(part)}+{unit.part:03d}", rejects, counts)


def whole_file(file: str, told: Iterable[Receipt], storage: Storage, folder: str) -> Receipt:
    """One receipt of all that was told of a file; its rejects together, with the numbers that their rows have in the file."""
    receipts = lake.one_receipt_each(told)
    counts = sum((Counter(receipt.counts) for receipt in receipts), Counter[str]())

    def numbered() -> Iterator[pa.RecordBatch]:
        before = after = 0
        for receipt in receipts:
            # Each part's own receipt comes first, and those of its duplicates follow.
            if "read" in receipt.counts:
                before, after = after, after + receipt.counts["read"]
            for batch in read_parquet(storage, receipt.file) if receipt.file else ():
                yield batch.set_column(batch.schema.get_field_index("row"), "row", pc.add(batch["row"], before))

    return write_parquet(storage, folder, f"file/{file}", numbered(), counts)


def shard_of_image(images: pa.Array, shards: int) -> np.ndarray:
    """The shard of each image name, shape (rows,), dtype int64: what rows, creatives and embeddings agree on."""
    return shard_of_column(images, "shard", shards)


def shard_of_rows(batch: pa.RecordBatch, image: Column | None, shards: int) -> np.ndarray:
    """The shard of each row, shape (rows,), dtype int64: by its image, and by key where there is none, which spreads those rows."""
    if image is None:
        return shard_of_image(batch["key"], shards)
    found, without = shard_of_image(batch[image.name], shards), batch[image.name].is_null()
    if batch[image.name].null_count:
        found[without.to_numpy(zero_copy_only=False)] = shard_of_image(batch["key"].filter(without), shards)
    return found


def write_rows(pair: ShardPair, run: MonthRun) -> Receipt:
    """Write a unit's rows but for duplicates, and their statistics.

    They are in the order of the hashes that a ranker's history knows their keys by: the same whatever the bundles were, shuffled, and
    looked up in order.
    """
    table = read_table(run.storage, pair.left)
    dropped = read_table(run.storage, pair.right, duplicates.KEYED)[duplicates.ORIGIN].to_numpy()
    if len(dropped):
        table = table.filter(pa.array(~np.isin(table[duplicates.ORIGIN].to_numpy(), dropped)))
    # By one name, so that memory holds the rows in one order alone.
    table = table.drop_columns([duplicates.ORIGIN, duplicates.SHARD])
    table = table.take(pa.array(np.argsort(hashes_of(table["key"].combine_chunks(), "key"))))
    batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    counts, month = {"ingested": table.num_rows}, lake.month_number(run.month)
    if run.contract.mature_before:
        counts["too young"] = int(np.count_nonzero(~is_mature(table, run.contract, month)))
    receipt = write_parquet(run.storage, run.stage("rows"), f"shard/{pair.left[0].name}", batches, counts)
    dated = table.append_column(MONTH, pa.repeat(pa.scalar(month, pa.int32()), len(table)))
    statistics.write(run.storage, statistics.unit_file(receipt.file), statistics.of_rows(dated, run.contract))
    return receipt


def estimated_rows(storage: Storage, files: tuple[Entry, ...]) -> int:
    """Rows of all files, guessed from the heads of a few; decides how many shards there are and nothing else."""
    lines = read = 0
    for entry in files[:8]:
        if is_packed(entry.name):
            head = b""
            with storage.open(entry.name) as stream, contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error):
                # What is no such file is told when it is read.
                head = gzip.GzipFile(fileobj=stream).read(_HEAD_BYTES)
            # A tenth is what CSV packs to.
            read += max(1, min(entry.size, len(head) // 10))
        else:
            head = storage.read(entry.name, 0, min(_HEAD_BYTES, entry.size))
            read += len(head)
        lines += head.count(b"\n")
    return int(sum(entry.size for entry in files) * lines / read) if read else 0
