"""Embed: every thumbnail becomes an embedding, once for each version of the encoder, and a month's images find theirs.

    adstocrat embed 2026-10 --lake gs://bucket

Writes `embeddings/<encoder>/<month>/<run>/packs/` (packs of thumbnails that this encoder has not seen) and, for each month of the window
that lacks them, `embeddings/<encoder>/<month>/<run>/` (creative and embedding, in the shards of the month's rows).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.ml.inference.base import RunInference

from beam_jobs.arrow import CommitStage, Repartition, ShardPair, Unit, WriteUnits, pair_shards, read_table, read_unit
from beam_jobs.creatives import pack_files
from beam_jobs.inference import EncoderHandler, Named
from beam_jobs.run import MonthRun
from beam_jobs.workers import Listed, gpu_hints, on_gpu, read_by_shard
from model.encoder import EMBEDDING_WIDTH
from model.features import embedding_type
from schemas import lake
from schemas.hashing import shard_of_column
from schemas.lake import Receipt, embeddings_folder, shard_of_unit
from schemas.parquet import read_parquet, write_parquet
from schemas.storage import Storage

# A batch of thumbnails is 12 MiB.
BATCH_THUMBNAILS = 1024
_EMBEDDED = pa.schema([("creative", pa.string()), ("embedding", embedding_type(EMBEDDING_WIDTH))])
_WANTED = pa.schema([("creative", pa.string()), ("shard", pa.int32())])


def define_pack_pipeline(root: beam.Pipeline, run: MonthRun, encoder: str) -> None:
    """Packs that this encoder has not seen → their embeddings, a file a pack."""
    folder = embeddings_folder(encoder, run.month, run.id) + "/packs"
    hints = gpu_hints(root, run.config)
    read = on_gpu(functools.partial(read_thumbnails, run.storage), hints)
    _ = (
        root
        | "Packs" >> Listed(functools.partial(unseen_packs, run.storage, encoder), str)
        | "EmbedPacks" >> _EmbedPacks(run.storage, encoder, folder, read).with_resource_hints(**hints)
        | "CommitPacks" >> CommitStage(run.storage, folder, "packs", {"encoder": encoder})
    )


@dataclasses.dataclass(eq=False)
class _EmbedPacks(beam.PTransform):
    """Packs → receipts of their embeddings: one environment fetches, unpacks and embeds, so that pixels never leave a process."""

    storage: Storage
    encoder: str
    folder: str
    read: Callable[[str], Iterable[Named]]

    def expand(self, packs: beam.PCollection) -> beam.PCollection:
        return (
            packs
            | "ReadThumbnails" >> beam.FlatMap(self.read).with_output_types(Named)
            | "Embed" >> RunInference(EncoderHandler(self.storage, self.encoder)).with_output_types(Named)
            | "WriteEmbeddings" >> beam.ParDo(WriteUnits(self.storage, self.folder, _count)).with_output_types(Receipt)
        )


def unseen_packs(storage: Storage, encoder: str) -> list[str]:
    """Packs of thumbnails that this encoder has not embedded."""
    seen = {receipt.unit.rpartition("@")[0] for receipt in lake.pack_receipts(storage, f"embeddings/{encoder}/")}
    return [pack for pack in pack_files(storage) if pack not in seen]


def define_gather_pipeline(root: beam.Pipeline, run: MonthRun, encoder: str, month: str, id: str) -> None:
    """The creatives of a month's images, and all embeddings → the embeddings that each shard of its rows needs."""
    folder, storage = embeddings_folder(encoder, month, id), run.storage
    index = run.manifest(lake.stage_folder("creatives", month, id))
    shards, of_month = index.info["shards"], functools.partial(_index_files, run, month, id)
    read_index, read_pack = functools.partial(_read_wanted, storage), functools.partial(read_parquet, storage)
    wanted = read_by_shard(root, "Wanted", run, of_month, read_index, shards, _shard_of_creative, tuple[str, int])
    packs = functools.partial(_embedded_files, storage, encoder)
    embedded = read_by_shard(root, "Embeddings", run, packs, read_pack, shards, _shard_of_creative)
    _ = (
        pair_shards(wanted, embedded)
        | "FindEmbeddings" >> beam.FlatMap(functools.partial(find_embeddings, storage)).with_output_types(pa.RecordBatch)
        | "ShardByImage" >> Repartition(storage, run.spill, shards, _shard_column, unit_rows=None)
        | "SpreadShards" >> beam.Reshuffle()
        | "WriteShards" >> beam.Map(write_embeddings, storage, folder).with_output_types(Receipt)
        | "CommitEmbeddings" >> CommitStage(storage, folder, "embed", {"encoder": encoder, "shards": shards, "width": EMBEDDING_WIDTH})
    )


def _index_files(run: MonthRun, month: str, id: str) -> list[tuple[str, int]]:
    index = run.manifest(lake.stage_folder("creatives", month, id))
    return [(receipt.file, shard_of_unit(receipt.unit)) for receipt in index.receipts if receipt.file]


def _embedded_files(storage: Storage, encoder: str) -> list[str]:
    """What this encoder has embedded, in all complete runs: a file a pack."""
    return [receipt.file for receipt in lake.pack_receipts(storage, f"embeddings/{encoder}/")]


def read_thumbnails(storage: Storage, pack: str) -> Iterator[Named]:
    """The pack's thumbnails in batches, named by where they start; images without one are passed over."""
    start = 0
    for batch in read_parquet(storage, pack, ["creative", "thumbnail"], BATCH_THUMBNAILS):
        usable = batch.filter(batch["thumbnail"].is_valid())
        if usable.num_rows:
            yield f"{pack}@{start}", usable
        start += usable.num_rows


def _count(batch: pa.RecordBatch) -> dict[str, int]:
    return {"embedded": batch.num_rows}


def _read_wanted(storage: Storage, indexed: tuple[str, int]) -> Iterator[pa.RecordBatch]:
    file, shard = indexed
    for batch in read_parquet(storage, file, ["creative"]):
        creatives = pc.unique(batch["creative"].drop_null())
        yield pa.RecordBatch.from_arrays([creatives, pa.repeat(pa.scalar(shard, pa.int32()), len(creatives))], schema=_WANTED)


def _shard_of_creative(batch: pa.RecordBatch, shards: int) -> np.ndarray:
    return shard_of_column(batch["creative"], "creative", shards)


def _shard_column(batch: pa.RecordBatch) -> np.ndarray:
    return batch["shard"].to_numpy()


def find_embeddings(storage: Storage, pair: ShardPair) -> Iterator[pa.RecordBatch]:
    """Wanted creatives (left) with their embeddings (right)."""
    wanted = read_table(storage, pair.left, _WANTED)
    # All that was ever embedded passes by, and what this month wants of it is held.
    names = pc.unique(wanted["creative"])
    embedded = read_table(storage, pair.right, _EMBEDDED, lambda batch: pc.is_in(batch["creative"], names)).combine_chunks()
    creatives, matrix = embedded["creative"].combine_chunks(), embedded["embedding"].combine_chunks()
    # All at once, as each call builds a table of the creatives.
    found = wanted.append_column("at", pc.index_in(wanted["creative"], creatives))
    for batch in found.to_batches():
        yield pa.RecordBatch.from_arrays([batch["creative"], batch["shard"], matrix.take(batch["at"])], ["creative", "shard", "embedding"])


def write_embeddings(unit: Unit, storage: Storage, folder: str) -> Receipt:
    """Write the embeddings of a shard's creatives, each once, in order of creative."""
    table = pa.Table.from_batches(read_unit(storage, unit)).drop_columns("shard").combine_chunks()
    creatives = table["creative"].combine_chunks()
    _, first = np.unique(creatives.to_numpy(zero_copy_only=False), return_index=True)
    return write_parquet(storage, folder, f"shard/{unit.name}", table.take(pa.array(first)).to_batches(), {"creatives": len(first)})
