import pathlib

import numpy as np
import pyarrow as pa
import pytest

from beam_jobs.config import Config
from beam_jobs.join import INDEX, MonthRows, ShardImages, examples
from beam_jobs.run import MonthRun, StageError
from model import images
from model.features import embedding_column
from schemas import lake
from schemas.contract import Column, Contract
from schemas.lake import Manifest, Receipt, embeddings_folder
from schemas.parquet import write_parquet
from schemas.storage import Folder

WIDTH = 4
IMAGE = Contract((Column("ad", "bytes", frozenset({"key"}), True), Column("image", "bytes", frozenset({"image"}))))
NO_IMAGE = Contract((Column("ad", "bytes", frozenset({"key"}), True), Column("image", "bytes")))
# Image name → creative and status, as the index of a shard has it.
INDEXED = {
    "bad.png": (None, images.TRUNCATED),
    "gone.png": (None, images.MISSING),
    "good.png": ("c1", images.OK),
    "twin.png": ("c1", images.OK),
}
EMBEDDINGS = {"c0": [0.0] * WIDTH, "c1": [1.0, 2.0, 3.0, 4.0]}
NAMES = ["good.png", None, "bad.png", "never delivered.png", "gone.png", "twin.png", "good.png", None]
EXPECTED = [INDEXED.get(name, (None, images.MISSING)) if name else (None, images.NO_IMAGE) for name in NAMES]


def rows_of(names: list[str | None]) -> pa.RecordBatch:
    keys = [f"k{i}" for i in range(len(names))]
    return pa.RecordBatch.from_pydict({"key": keys, "ad": keys, "image": pa.array(names, pa.string())})


def index_of(names: dict[str, tuple[str | None, str]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"image": n, "creative": c, "image_status": s} for n, (c, s) in sorted(names.items())], INDEX)


def embeddings_of(vectors: dict[str, list[float]]) -> pa.RecordBatch:
    column = embedding_column(np.array(list(vectors.values()), np.float32))
    return pa.RecordBatch.from_arrays([pa.array(list(vectors)), column], ["creative", "embedding"])


def join(storage: Folder, rows: pa.RecordBatch, width: int | None, indexed: bool = True, embedded: bool = True) -> pa.RecordBatch:
    index = write_parquet(storage, "index", "index/0", [index_of(INDEXED)]) if indexed else None
    embeddings = write_parquet(storage, "embeddings", "shard/0", [embeddings_of(EMBEDDINGS)]) if embedded else None
    images_of_shard = ShardImages(storage, index, embeddings, width)
    return images_of_shard.join(rows, images_of_shard.places(rows["image"]))


@pytest.fixture
def storage(tmp_path: pathlib.Path) -> Folder:
    return Folder(str(tmp_path))


@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("rows", [slice(0, 8), slice(2, 5), slice(0, 0)])
def test_each_row_finds_its_image(storage: Folder, rows: slice, width: int | None) -> None:
    batch = rows_of(NAMES).slice(rows.start, rows.stop - rows.start)
    joined = join(storage, batch, width)
    assert joined.select(batch.schema.names) == batch
    assert list(zip(joined["creative"].to_pylist(), joined["image_status"].to_pylist(), strict=True)) == EXPECTED[rows]
    assert ("embedding" in joined.schema.names) is (width is not None)
    if width:
        expected = [EMBEDDINGS.get(creative or "", [np.nan] * width) for creative, _ in EXPECTED[rows]]
        assert joined["embedding"] == embedding_column(np.array(expected, np.float32).reshape(-1, width))


@pytest.mark.parametrize("embedded", [False, True])
def test_a_shard_without_images(storage: Folder, embedded: bool) -> None:
    joined = join(storage, rows_of(NAMES), WIDTH, indexed=False, embedded=embedded)
    assert joined["creative"].null_count == joined["embedding"].null_count == len(NAMES)
    assert joined["image_status"].to_pylist() == [images.MISSING if name else images.NO_IMAGE for name in NAMES]


def test_an_embedding_that_is_not_there_is_null(storage: Folder) -> None:
    joined = join(storage, rows_of(NAMES), WIDTH, embedded=False)
    assert joined["embedding"].null_count == len(NAMES)
    assert joined["creative"].to_pylist() == [creative for creative, _ in EXPECTED]


def month_run(storage: Folder, contract: Contract = IMAGE, earlier: tuple[tuple[str, str], ...] = (), seed: int = 0) -> MonthRun:
    return MonthRun(storage, contract, Config(lake=storage.uri, seed=seed), "2026-10", "r", earlier, None, None)


def lay_down(storage: Folder, month: str, shards: dict[str, list[str | None]]) -> None:
    """A month's rows by unit, with the images of all in the index of shard 0 and their embeddings there too."""
    run = month_run(storage)
    rows = [write_parquet(storage, f"rows/{month}/r", f"shard/{unit}", [rows_of(names)]) for unit, names in shards.items()]
    index = write_parquet(storage, f"creatives/{month}/r", "index/00000.000", [index_of(INDEXED)])
    folder = embeddings_folder("e", month, "r")
    embeddings = write_parquet(storage, folder, "shard/00000.000", [embeddings_of(EMBEDDINGS)])
    manifests = {f"rows/{month}/r": (*rows, Receipt("file/a.csv")), f"creatives/{month}/r": (index,), folder: (embeddings,)}
    for folder, receipts in manifests.items():
        lake.commit(run.storage, folder, Manifest("stage", tuple(receipts), {"width": WIDTH}))


def test_a_month_is_joined_shard_by_shard(storage: Folder) -> None:
    lay_down(storage, "2026-10", {"00000.000": NAMES, "00000.001": ["good.png"], "00001.000": ["good.png", None]})
    rows = MonthRows(month_run(storage), "2026-10", "r", "e")
    assert [unit.unit for unit in rows.units] == ["shard/00000.000", "shard/00000.001", "shard/00001.000"]
    statuses = [[status for batch in rows.batches(unit) for status in batch["image_status"].to_pylist()] for unit in rows.units]
    # Shard 1 sees the images of its own shard only.
    assert statuses == [[status for _, status in EXPECTED], [images.OK], [images.MISSING, images.NO_IMAGE]]
    no_image = MonthRows(month_run(storage, NO_IMAGE), "2026-10", "r", "e")
    for joined in (batch for unit in no_image.units for batch in no_image.batches(unit)):
        assert set(joined["image_status"].to_pylist()) == {images.NO_IMAGE}
        assert joined["creative"].null_count == joined["embedding"].null_count == len(joined)
        assert joined.schema.field("creative").type == pa.string()
    bare = MonthRows(month_run(storage), "2026-10", "r", None)
    assert "embedding" not in next(bare.batches(bare.units[0])).schema.names


@pytest.mark.parametrize(
    ("missing", "stage"), [("rows/2026-10/r", "ingest"), ("creatives/2026-10/r", "creatives"), ("embeddings/e/2026-10/r", "embed")]
)
def test_what_is_not_there_is_named(storage: Folder, missing: str, stage: str) -> None:
    lay_down(storage, "2026-10", {"00000.000": NAMES})
    storage.delete(f"{missing}/manifest.json")
    with pytest.raises(StageError, match=f"{missing} is not complete; run `adstocrat {stage} 2026-10` first"):
        MonthRows(month_run(storage), "2026-10", "r", "e")


def test_each_epoch_has_all_rows_in_its_own_order(storage: Folder) -> None:
    for month in ("2026-09", "2026-10"):
        lay_down(storage, month, {f"{shard:05d}.000": [f"{month} {shard}.png"] * (shard + 1) for shard in range(6)})

    def names(epoch: int, seed: int = 0) -> list[str]:
        run = month_run(storage, earlier=(("2026-09", "r"),), seed=seed)
        return [name for batch in examples(run, None, epoch) for name in batch["image"].to_pylist()]

    assert names(0) == names(0) != names(1)
    assert names(0) != names(0, seed=1)
    assert sorted(names(0)) == sorted(names(1)) and len(names(0)) == 2 * 21
