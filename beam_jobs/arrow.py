"""Arrow in Beam: the coder of RecordBatches, `Repartition` by spill files, Parquet files with receipts, and the commit of a stage.

Rows travel as `pyarrow.RecordBatch` and nothing else. Whoever yields them declares it with `.with_output_types(...)` on the transform, or
Beam falls back to pickle without a word; a test asserts the coder on every edge.
"""

import dataclasses
import io
import pathlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.utils.windowed_value import WindowedValue

from beam_jobs.threads import in_global_window
from schemas import lake
from schemas.checksum import Checksum, crc32c, encoded
from schemas.lake import Manifest, Receipt
from schemas.parquet import BATCH_ROWS, ParquetFile, upload
from schemas.storage import Folder, Storage

# A spill is written when it holds this much, while the next fills. A shard reads its sections by range: bigger ones are fewer reads.
SPILL_BYTES = 64 << 20
# Batches of fewer rows are put together first, or their slices by shard would be of a few rows.
_SMALL_ROWS = 16_384
# Rows of an ordinary shard; and of a unit at most, which a worker holds two of.
SHARD_ROWS, UNIT_ROWS = 500_000, 600_000


class RecordBatchCoder(beam.coders.Coder):
    """A RecordBatch as an Arrow IPC stream: a slice writes its own rows only, where pickle would write the whole parent."""

    def encode(self, value: pa.RecordBatch) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_batch(value)
        return bytes(sink.getvalue())

    def decode(self, encoded: bytes) -> pa.RecordBatch:
        with pa.ipc.open_stream(encoded) as reader:
            return reader.read_next_batch()

    def estimate_size(self, value: pa.RecordBatch) -> int:
        # Without it Beam encodes batches only to sample their size.
        return value.nbytes

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> Any:
        return pa.RecordBatch


beam.coders.registry.register_coder(pa.RecordBatch, RecordBatchCoder)


@dataclasses.dataclass(frozen=True)
class Section:
    """A shard's rows in one spill file: the bytes of an Arrow IPC stream.

    Attributes:
        file: the spill file, relative to the lake.
        offset, length: bytes.
        rows: rows in it.
        crc32c: checksum of those bytes.
    """

    file: str
    offset: int
    length: int
    rows: int
    crc32c: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """The rows of one shard, or a part of a hot shard, as sections to stream.

    Attributes:
        shard: which shard.
        part: 0, or which part of a shard that is cut.
        sections: in an order that depends on their content alone.
    """

    shard: int
    part: int
    sections: tuple[Section, ...]

    @property
    def name(self) -> str:
        return f"{self.shard:05d}.{self.part:03d}"


def shards_for(rows: int, rows_per_shard: int = SHARD_ROWS) -> int:
    """How many shards hold `rows` rows: fewer each than a unit may have, so that an ordinary shard is one unit."""
    return max(1, -(-rows // rows_per_shard))


@dataclasses.dataclass(eq=False)
class Repartition(beam.PTransform):
    """Bring the rows of each shard together without holding them: PCollection[RecordBatch] → PCollection[Unit].

    Each bundle writes its rows, sorted by shard, to spill files; only the sections' addresses go through GroupByKey. Read a unit with
    `read_unit`. Memory does not grow with the rows.

    Attributes:
        storage, spill: where the spill files go; a folder of this launch's own, removed when its stage is committed.
        shards: how many there are.
        assign: RecordBatch → shard of each row, shape (rows,), integers in [0, shards).
        unit_rows: a shard of more rows is cut into units of at most that many, unless one section has more, and about
            equal; None never cuts.
    """

    storage: Storage
    spill: str
    shards: int
    assign: Callable[[pa.RecordBatch], np.ndarray]
    unit_rows: int | None = UNIT_ROWS

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return (
            batches
            | "Spill" >> beam.ParDo(_Spill(self.storage, self.spill, self.shards, self.assign)).with_output_types(tuple[int, Section])
            | "GroupByShard" >> beam.GroupByKey()
            | "CutIntoUnits" >> beam.FlatMap(cut_into_units, self.unit_rows).with_output_types(Unit)
        )


class _Spill(beam.DoFn):
    """Sorts batches by shard, and writes them out when there are enough or the bundle ends; in a thread of its own, while the next come."""

    def __init__(self, storage: Storage, spill: str, shards: int, assign: Callable[[pa.RecordBatch], np.ndarray]):
        self._storage, self._spill, self._shards, self._assign = storage, spill, shards, assign
        # On a local disk packing takes longer than it saves, and small spills are made in memory that was in use before.
        near = isinstance(storage, Folder)
        self._most, self._compression = SPILL_BYTES // 4 if near else SPILL_BYTES, None if near else "lz4"

    def start_bundle(self) -> None:
        self._small, self._sorted = list[pa.RecordBatch](), list[Future[list[ByShard]]]()
        self._small_rows = self._bytes = 0
        self._thread, self._written = ThreadPoolExecutor(1), Future[list[tuple[int, Section]]]()
        self._written.set_result([])

    def process(self, batch: pa.RecordBatch) -> Iterator[tuple[int, Section]]:
        self._small.append(batch)
        self._small_rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._small_rows >= _SMALL_ROWS or self._bytes >= self._most:
            self._sort()
        if self._bytes >= self._most:
            yield from self._written.result()
            self._written = self._thread.submit(self._write, self._sorted)
            self._sorted, self._bytes = [], 0

    def finish_bundle(self) -> Iterator[WindowedValue]:
        self._sort()
        last = self._thread.submit(self._write, self._sorted)
        for addressed in (*self._written.result(), *last.result()):
            yield in_global_window(addressed)
        self._thread.shutdown()
        self._sorted = []

    def _sort(self) -> None:
        self._sorted.append(self._thread.submit(by_shard, self._small, self._shards, self._assign))
        self._small, self._small_rows = [], 0

    def _write(self, blocks: list[Future[list["ByShard"]]]) -> list[tuple[int, Section]]:
        # Done by now, since the thread is one.
        found = [block for done in blocks for block in done.result()]
        if not found:
            return []
        name = lake.unique(self._spill, "spill", ".arrows")
        pieces, addressed = spill_sections(found, self._shards, name, self._compression)
        self._storage.write(name, *pieces)
        return addressed


class ByShard(NamedTuple):
    """Rows in the order of their shards, and where each shard's begin and the last one's end, (shards + 1,) numbers."""

    rows: pa.RecordBatch
    bounds: list[int]


def by_shard(batches: list[pa.RecordBatch], shards: int, assign: Callable[[pa.RecordBatch], np.ndarray]) -> list[ByShard]:
    """The rows in blocks of up to `BATCH_ROWS`: they are gathered faster from what the caches hold."""
    found = []
    for batch in pa.Table.from_batches(batches).combine_chunks().to_batches(BATCH_ROWS) if batches else ():
        of_row = np.asarray(assign(batch))
        if len(of_row) and not 0 <= of_row.min() <= of_row.max() < shards:
            raise ValueError(f"rows are assigned to shards {of_row.min()} to {of_row.max()}; expected 0 to {shards - 1}")
        of_row = of_row.astype(np.min_scalar_type(shards))  # NumPy sorts small integers in linear time.
        bounds = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=shards))])
        found.append(ByShard(batch.take(pa.array(np.argsort(of_row, kind="stable"))), bounds.tolist()))
    return found


class _Pieces(io.RawIOBase):
    """A file that keeps what is written to it as it is: Arrow's buffers, which are not copied then."""

    def __init__(self) -> None:
        self.pieces, self.size, self._checksum = list[bytes](), 0, Checksum()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append(data)
        self.size += len(data)
        self._checksum.update(data)
        return len(data)

    @property
    def crc32c(self) -> str:
        return encoded(self._checksum)


def spill_sections(
    blocks: list[ByShard], shards: int, name: str, compression: str | None = "lz4"
) -> tuple[list[bytes], list[tuple[int, Section]]]:
    """The bytes of one spill file, in pieces, and for each shard in it where its section lies."""
    pieces, addressed, offset = [], [], 0
    for shard in range(shards):
        cuts = ((block.rows, block.bounds[shard], block.bounds[shard + 1]) for block in blocks)
        slices = [rows.slice(start, end - start) for rows, start, end in cuts if end > start]
        if not slices:
            continue
        rows, sink = pa.Table.from_batches(slices).combine_chunks(), _Pieces()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.PythonFile(sink, "w") as file, pa.ipc.new_stream(file, rows.schema, options=options) as writer:
            writer.write_table(rows, max_chunksize=BATCH_ROWS)
        addressed.append((shard, Section(name, offset, sink.size, rows.num_rows, sink.crc32c)))
        pieces += sink.pieces
        offset += sink.size
    return pieces, addressed


def cut_into_units(grouped: tuple[int, Iterable[Section]], unit_rows: int | None) -> Iterator[Unit]:
    """The units of one shard. Sections are ordered by their content, not by attempt-unique names, so a run can be repeated exactly."""
    shard, sections = grouped[0], sorted(grouped[1], key=lambda section: (section.crc32c, section.rows, section.length))
    most = unit_rows or sys.maxsize
    # As many as there are if each is filled up, and then with about as many rows each.
    enough = sum(section.rows for section in sections) / len(list(_cut(sections, most, most)))
    for number, part in enumerate(_cut(sections, most, enough)):
        yield Unit(shard, number, tuple(part))


def _cut(sections: Iterable[Section], most: int, enough: float) -> Iterator[list[Section]]:
    """Parts of up to `most` rows that end when they have `enough`."""
    part, held = list[Section](), 0
    for section in sections:
        if part and (held >= enough or held + section.rows > most):
            yield part
            part, held = [], 0
        part.append(section)
        held += section.rows
    yield part


def read_unit(storage: Storage, unit: Unit) -> Iterator[pa.RecordBatch]:
    """Stream a unit's rows, a section in memory at a time.

    Raises:
        OSError: a section's bytes are not those that were written.
    """
    for section in unit.sections:
        data = storage.read(section.file, section.offset, section.length)
        if crc32c(data) != section.crc32c:
            raise OSError(f"spill {storage.url(section.file)} at byte {section.offset} is damaged; run the stage again")
        with pa.ipc.open_stream(data) as reader:
            yield from reader


@dataclasses.dataclass(eq=False)
class CommitStage(beam.PTransform):
    """End of every stage: PCollection[Receipt] → its manifest, exactly one receipt a unit, created once in the lake.

    Attributes:
        storage, folder: where the manifest goes.
        stage: its name.
        info: what else the manifest says.
    """

    storage: Storage
    folder: str
    stage: str
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def expand(self, receipts: beam.PCollection) -> beam.PCollection:
        return receipts | "Collect" >> beam.combiners.ToList() | "CreateManifest" >> beam.Map(self._commit)

    def _commit(self, receipts: list[Receipt]) -> Manifest:
        return lake.commit(self.storage, self.folder, Manifest(self.stage, tuple(lake.one_receipt_each(receipts)), self.info))


@dataclasses.dataclass(frozen=True)
class ShardPair:
    """What is joined at a time: one unit of a shard's left side, and all units of its right side, none where that has no rows."""

    shard: int
    left: tuple[Unit, ...]
    right: tuple[Unit, ...]


def pair_shards(left: beam.PCollection, right: beam.PCollection) -> beam.PCollection:
    """Two `Repartition`s of the same shards → PCollection[ShardPair], one for every unit on the left."""

    def pair(shard: int, sides: Mapping[str, Iterable[Unit]]) -> Iterator[ShardPair]:
        units = {side: tuple(sorted(found, key=lambda unit: unit.part)) for side, found in sides.items()}
        for unit in units["left"]:
            yield ShardPair(shard, (unit,), units["right"])

    keyed = {
        side: units | f"Key{side.title()}" >> beam.Map(lambda unit: (unit.shard, unit)).with_output_types(tuple[int, Unit])
        for side, units in (("left", left), ("right", right))
    }
    return (
        keyed
        | "PairShards" >> beam.CoGroupByKey()
        | "MakePairs" >> beam.FlatMapTuple(pair).with_output_types(ShardPair)
        | "SpreadPairs" >> beam.Reshuffle()
    )


def read_table(
    storage: Storage, units: Iterable[Unit], schema: pa.Schema | None = None, keep: Callable[[pa.RecordBatch], pa.Array] | None = None
) -> pa.Table:
    """All rows of some units, or those alone that `keep` is true of: for the small side of a join, and for shards that are cut small.

    Without units it needs a schema.
    """
    batches = (batch for unit in units for batch in read_unit(storage, unit))
    return pa.Table.from_batches([batch.filter(keep(batch)) if keep else batch for batch in batches], schema)


class WriteUnits(beam.DoFn):
    """Write batches that come as (`unit@start`, batch) to one file a unit, and tell a receipt for each.

    `start` is the batch's first row in its unit: batches that follow each other go to one file, so a unit that a runner spreads over
    bundles gives several receipts, of different rows and names, and never two of one name.
    """

    def __init__(self, storage: Storage, folder: str, counts: Callable[[pa.RecordBatch], Mapping[str, int]]):
        self._storage, self._folder, self._counts = storage, folder, counts

    def start_bundle(self) -> None:
        self._open: _OpenUnit | None = None

    def process(self, element: tuple[str, pa.RecordBatch]) -> Iterator[Receipt]:
        name, batch = element
        unit, _, start = name.rpartition("@")
        if self._open and not self._open.continues(unit, int(start)):
            yield self._open.close(self._storage, self._folder)
            self._open = None
        self._open = self._open or _OpenUnit(unit, int(start), batch)
        self._open.write(batch, self._counts(batch))

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._open:
            yield in_global_window(self._open.close(self._storage, self._folder))


class _OpenUnit:
    """A Parquet file that is being written on local disk, a batch behind those that come."""

    def __init__(self, unit: str, start: int, first: pa.RecordBatch):
        self._unit, self._start, self._rows = unit, start, 0
        self._counts = Counter[str]()
        self._temporary = tempfile.TemporaryDirectory(prefix="adstocrat-")
        self._path = pathlib.Path(self._temporary.name) / "part.parquet"
        self._writer, self._thread, self._written = ParquetFile(self._path, first), ThreadPoolExecutor(1), Future[None]()
        self._written.set_result(None)

    def continues(self, unit: str, start: int) -> bool:
        return (unit, start) == (self._unit, self._start + self._rows)

    def write(self, batch: pa.RecordBatch, counts: Mapping[str, int]) -> None:
        self._written.result()
        self._written = self._thread.submit(self._writer.write, batch)
        self._rows += batch.num_rows
        self._counts.update(counts)

    def close(self, storage: Storage, folder: str) -> Receipt:
        self._written.result()
        self._thread.shutdown()
        self._writer.close()
        file, checksum = upload(storage, self._path, lake.unique(folder, self._unit.replace("/", "_"), ".parquet"))
        self._temporary.cleanup()
        return Receipt(f"{self._unit}@{self._start:09d}", file, self._rows, dict(self._counts), checksum)
