"""Sample months as joined tables in memory: what ingest and creatives make of them, without Beam, and the truth beside them.

Pictures pass through the project's own decoder, so what is trained on here is what a run trains on.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from model import images
from schemas import contract as contracts
from schemas import lake
from schemas.sample import write_months
from schemas.storage import Storage, open_storage

CONTRACT = contracts.load(contracts.DEFAULT)
ADS, CREATIVES = 120_000, 5_000
BATCH = 16_384


@dataclasses.dataclass(frozen=True)
class Month:
    """A month: joined rows (`key`, the contract's columns, `creative`, `image_status`) and, row by row, its truth."""

    name: str
    rows: pa.Table
    truth: pa.Table

    def batches(self) -> Iterator[pa.RecordBatch]:
        yield from self.rows.to_batches(BATCH)


def months(work: pathlib.Path, seed: int, count: int) -> tuple[list[Month], pa.Table]:
    """The first months of a seed, from `work` where they are, and `creative`, `thumbnail` and `name` of all their creatives."""
    names = [f"2026-{number:02d}" for number in range(1, count + 1)]
    folder = work / f"seed-{seed}-{ADS}-{CREATIVES}"
    storage = open_storage(str(folder / "lake"))
    if not all((folder / f"{name}.parquet").exists() for name in names):
        write_months(storage, names, ADS, CREATIVES, seed, lambda line: None)
        for name in names:
            if not (folder / f"{name}.parquet").exists():
                _join(storage, name, folder)
    looked = {creative: (thumb, name) for month in names for creative, thumb, name in _looks(folder, month)}
    creatives = sorted(looked)
    thumbnails = pa.table(
        {
            "creative": pa.array(creatives),
            "thumbnail": pa.array([looked[creative][0] for creative in creatives], pa.binary(images.THUMBNAIL_BYTES)),
            "name": pa.array([looked[creative][1] for creative in creatives]),
        }
    )
    found = []
    for name in names:
        truth = pq.read_table(storage_path(storage, lake.truth(name)))
        found.append(Month(name, pq.read_table(folder / f"{name}.parquet"), truth))
    return found, thumbnails


def storage_path(storage: Storage, name: str) -> pathlib.Path:
    return pathlib.Path(storage.uri) / name


def _looks(folder: pathlib.Path, month: str) -> Iterator[tuple[str, bytes, str]]:
    table = pq.read_table(folder / f"{month}-creatives.parquet")
    yield from zip(*(table[name].to_pylist() for name in ("creative", "thumbnail", "name")), strict=True)


def _join(storage: Storage, month: str, folder: pathlib.Path) -> None:
    names, creatives, thumbnails = [], [], []
    for path in storage.names(lake.raw_images(month)):
        data = storage.read(path)
        names.append(path.rpartition("/")[2])
        creatives.append(hashlib.sha256(data).hexdigest())
        thumbnails.append(images.decode(data)[0].tobytes())
    looked = pa.table({"name": names, "creative": creatives, "thumbnail": pa.array(thumbnails, pa.binary(images.THUMBNAIL_BYTES))})
    pq.write_table(looked, folder / f"{month}-creatives.parquet")
    types = {column.name: column.arrow_type for column in CONTRACT.columns}
    options = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=True)
    files = storage.names(lake.raw_ads(month))
    rows = pa.concat_tables([pyarrow.csv.read_csv(storage_path(storage, file), convert_options=options) for file in files])
    where = pc.index_in(rows["image"].combine_chunks(), looked["name"].combine_chunks())
    status = pc.if_else(where.is_valid(), images.OK, images.MISSING)
    rows = rows.append_column("key", rows["ad_id"]).append_column("creative", looked["creative"].combine_chunks().take(where))
    pq.write_table(rows.append_column("image_status", status), folder / f"{month}.parquet")
