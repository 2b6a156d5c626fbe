"""Rows beside their images, shard by shard, as they are read: nothing joined is stored, and nothing is shuffled for it.

Ingest, creatives and embeddings agree on the shard of an image name, so a shard of rows needs the same shard of the others alone.
"""

import functools
import random
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.run import MonthRun
from model import images
from model.features import MONTH, embedding_type
from schemas import lake
from schemas.ahead import ahead
from schemas.lake import Manifest, Receipt, embeddings_folder, shard_of_unit
from schemas.parquet import read_parquet
from schemas.storage import Storage

INDEX = pa.schema([("image", pa.string()), ("creative", pa.string()), ("image_status", pa.string())])


class ShardImages:
    """The images of one shard of a month: what a row's image name says of creative, status and, with an encoder, embedding."""

    def __init__(self, storage: Storage, index: Receipt | None, embeddings: Receipt | None, width: int | None):
        table = _table(storage, index, INDEX)
        self._names = table["image"].combine_chunks()
        # What a row may be without an image of the index comes first: it names none, or one that was not delivered.
        without = pa.Table.from_pylist([{"image_status": images.NO_IMAGE}, {"image_status": images.MISSING}], INDEX)
        looks = pa.concat_tables([without, table])
        creatives, status = (looks[name].combine_chunks() for name in ("creative", "image_status"))
        self._looks = {"creative": creatives, "image_status": status.dictionary_encode()}
        if width is not None:
            schema = pa.schema([("creative", pa.string()), ("embedding", embedding_type(width))])
            embedded = _table(storage, embeddings, schema)
            at = pc.index_in(creatives, embedded["creative"].combine_chunks())
            self._looks["embedding"] = embedded["embedding"].combine_chunks().take(at)

    def places(self, names: pa.Array) -> pa.Array:
        """Where what is known of each image name stands. All rows' at once: each call builds a table of the index."""
        return pc.if_else(names.is_null(), 0, pc.add(pc.fill_null(pc.index_in(names, self._names), -1), 2))

    def join(self, rows: pa.RecordBatch, places: pa.Array) -> pa.RecordBatch:
        """The rows, by the `places` of their image names, with `creative`, `image_status` and, with an encoder, `embedding`."""
        for name, column in self._looks.items():
            rows = rows.append_column(name, column.take(places))
        return rows


def _table(storage: Storage, receipt: Receipt | None, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches(list(read_parquet(storage, receipt.file)) if receipt and receipt.file else [], schema)


class MonthRows:
    """A month's ingested rows and what they are joined with, by its manifests.

    Args:
        run: whose lake and contract.
        month, id: which run's rows.
        encoder: version whose embeddings to join; None joins creative and status only.
    """

    def __init__(self, run: MonthRun, month: str, id: str, encoder: str | None):
        self._run, self._month = run, month
        rows = run.manifest(lake.stage_folder("rows", month, id))
        self.units = [receipt for receipt in rows.receipts if receipt.unit.startswith("shard/")]
        self._index = _by_shard(run.manifest(lake.stage_folder("creatives", month, id)))
        embedded = encoder and run.manifest(embeddings_folder(encoder, month, id))
        self._embeddings = _by_shard(embedded) if embedded else {}
        self._width = embedded.info["width"] if embedded else None

    def batches(self, unit: Receipt) -> Iterator[pa.RecordBatch]:
        """The joined batches of one unit of rows, in order."""
        shard = shard_of_unit(unit.unit)
        image = self._run.contract.image.name if self._run.contract.image else None
        joiner = ShardImages(self._run.storage, self._index.get(shard), self._embeddings.get(shard), self._width)
        number = pa.scalar(lake.month_number(self._month), pa.int32())

        def joined() -> Iterator[pa.RecordBatch]:
            if image:
                named = [batch[image] for batch in read_parquet(self._run.storage, unit.file, [image])]
                names = pa.chunked_array(named, pa.string()).combine_chunks()
            else:
                names = pa.nulls(unit.rows, pa.string())
            places, start = joiner.places(names), 0
            others = [column.name for column in self._run.contract.kept if column.name != image]
            for batch in read_parquet(self._run.storage, unit.file, ["key", *others], coded=True):
                of_rows = slice(start, start + len(batch))
                rows = batch.append_column(image, names[of_rows]) if image else batch
                yield joiner.join(rows, places[of_rows]).append_column(MONTH, pa.repeat(number, len(rows)))
                start += len(rows)

        yield from ahead(joined())


def _by_shard(manifest: Manifest) -> dict[int, Receipt]:
    return {shard_of_unit(receipt.unit): receipt for receipt in manifest.receipts if receipt.file}


def examples(run: MonthRun, encoder: str | None, epoch: int) -> Iterator[pa.RecordBatch]:
    """All joined batches of the window; each epoch has its own order of units, which depends on the seed and its number alone."""
    units = [(rows, unit) for month, id in run.window for rows in [month_rows(run, month, id, encoder)] for unit in rows.units]
    random.Random(f"{run.config.seed} {epoch}").shuffle(units)
    for rows, unit in units:
        yield from rows.batches(unit)


@functools.lru_cache(8)
def month_rows(run: MonthRun, month: str, id: str, encoder: str | None) -> MonthRows:
    """A month's rows, their manifests read once a process."""
    return MonthRows(run, month, id, encoder)
