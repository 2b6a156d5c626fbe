import functools
import hashlib
import io
import pathlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from beam_jobs import creatives
from beam_jobs.config import Config
from beam_jobs.ingest import shard_of_image
from beam_jobs.run import MonthRun, prepare
from beam_jobs.runner import run_pipeline
from model import images
from schemas.hashing import hash64, salted
from schemas.lake import Manifest, raw_ads, raw_images, shard_of_unit
from schemas.parquet import read_parquet
from schemas.storage import Folder

FIRST, SECOND, SHARDS = "2026-08", "2026-09", 3


@functools.cache
def picture(number: int, kind: str = "PNG") -> bytes:
    """An image of its own content for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 70, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


CUT = picture(9, "JPEG")[:1500]
MONTHS = {
    FIRST: {
        "one.png": picture(1),
        "one again.png": picture(1),
        "sub/two.jpg": picture(2, "JPEG"),
        "changes.png": picture(3),
        "empty.png": b"",
        "text.png": b"no image",
        "cut.jpg": CUT,
        "cut again.jpg": CUT,
        "leaves.png": picture(4),
        "leaves and returns.png": picture(5),
        "leaves too.png": picture(1),
    },
    SECOND: {
        "one.png": picture(1),
        "one under a third name.png": picture(1),
        "two renamed.jpg": picture(2, "JPEG"),
        "changes.png": picture(6),
        "text.png": b"no image",
        "cut renamed.jpg": CUT,
        "leaves and returns.png": picture(5),
        "new.png": picture(7),
    },
}
# What is gone when it is looked at, though it was listed.
GONE = {FIRST: {"leaves.png", "leaves and returns.png", "leaves too.png"}, SECOND: set[str]()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MonthRun]:
    """Both months looked at, the second after the first."""
    storage, runs = Folder(str(tmp_path_factory.mktemp("creatives"))), {}
    for month, files in MONTHS.items():
        storage.write(raw_ads(month) + "ads.csv", b"ad_id\n")
        for name, data in files.items():
            storage.write(raw_images(month) + name, data)
        runs[month] = run = prepare(Config(lake=storage.uri, fetch_threads=4), month)
        for name in GONE[month]:
            (pathlib.Path(storage.uri) / raw_images(month) / name).unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(creatives, "IMAGES_PER_UNIT", 3)
            run_pipeline(functools.partial(creatives.define_pack_pipeline, run=run), [])
        run_pipeline(functools.partial(creatives.define_index_pipeline, run=run, shards=SHARDS), [])
    return runs


def packs(run: MonthRun) -> Manifest:
    return run.manifest(run.stage("creatives") + "/packs")


def packed(run: MonthRun) -> list[dict]:
    return [row for file in packs(run).files for batch in read_parquet(run.storage, file) for row in batch.to_pylist()]


def fault(data: bytes) -> str:
    try:
        images.decode(data)
    except images.ImageFault as found:
        return found.fault
    return images.OK


def known_before(month: str) -> set[tuple[str, bytes]]:
    """(name, content) looked at in the months before."""
    return {(name, data) for before in MONTHS if before < month for name, data in MONTHS[before].items() if name not in GONE[before]}


def new_images(month: str) -> dict[str, bytes]:
    return {name: data for name, data in MONTHS[month].items() if (name, data) not in known_before(month)}


@pytest.mark.parametrize("month", MONTHS)
def test_new_images_are_looked_at(runs: dict[str, MonthRun], month: str) -> None:
    found = {row["image"]: (row["size"], row["creative"], row["image_status"]) for row in packed(runs[month])}
    assert len(packed(runs[month])) == len(found)
    assert found == {
        name: (len(data), None, images.MISSING) if name in GONE[month] else (len(data), hashlib.sha256(data).hexdigest(), fault(data))
        for name, data in new_images(month).items()
    }


@pytest.mark.parametrize("month", MONTHS)
def test_counts(runs: dict[str, MonthRun], month: str) -> None:
    new, seen = new_images(month), {data for _, data in known_before(month)}
    there = [data for name, data in new.items() if name not in GONE[month]]
    manifest = packs(runs[month])
    assert manifest.rows == len(new) and manifest.count("fetched") == len(there)
    assert manifest.count("bytes") == sum(map(len, there))
    assert manifest.count("decoded") == len({data for data in there if fault(data) == images.OK} - seen)


def test_each_content_is_decoded_once_over_both_months(runs: dict[str, MonthRun]) -> None:
    decoded = [(row["creative"], row["thumbnail"]) for run in runs.values() for row in packed(run) if row["thumbnail"] is not None]
    contents = {data for month, files in MONTHS.items() for name, data in files.items() if name not in GONE[month]}
    expected = [(hashlib.sha256(data).hexdigest(), images.decode(data)[0].tobytes()) for data in contents if fault(data) == images.OK]
    assert sorted(decoded) == sorted(expected)


def test_equal_contents_are_looked_at_together(runs: dict[str, MonthRun]) -> None:
    manifest = packs(runs[FIRST])
    assert len(manifest.receipts) > 1
    units = [{row["creative"] for batch in read_parquet(runs[FIRST].storage, file) for row in batch.to_pylist()} for file in manifest.files]
    assert max(Counter(creative for unit in units for creative in unit if creative).values()) == 1


@pytest.mark.parametrize("month", MONTHS)
def test_the_index_says_what_each_name_is(runs: dict[str, MonthRun], month: str) -> None:
    run, expected = runs[month], dict[int, list[tuple]]()
    for name, data in sorted(MONTHS[month].items(), key=lambda image: image[0].encode()):
        status = images.MISSING if name in GONE[month] else fault(data)
        creative = hashlib.sha256(data).hexdigest() if status == images.OK else None
        expected.setdefault(hash64(name.encode(), salted("shard")) % SHARDS, []).append((name, creative, status))
    index = run.manifest(run.stage("creatives"))
    found = {
        shard_of_unit(receipt.unit): [tuple(row.values()) for b in read_parquet(run.storage, receipt.file) for row in b.to_pylist()]
        for receipt in index.receipts
    }
    assert found == expected
    statuses = Counter(status for rows in expected.values() for _, _, status in rows)
    assert index.counts("status:") == statuses and index.count("images") == len(MONTHS[month])
    assert index.info == {"shards": SHARDS}


def test_names_are_sharded_as_rows_are() -> None:
    batch = pa.RecordBatch.from_pydict({"image": list(MONTHS[FIRST])})
    assert creatives._shard_of_name(batch, 7).tolist() == shard_of_image(batch["image"], 7).tolist()


def test_a_month_without_images(tmp_path: pathlib.Path) -> None:
    storage = Folder(str(tmp_path))
    storage.write(raw_ads(FIRST) + "ads.csv", b"ad_id\n")
    run = prepare(Config(lake=storage.uri), FIRST)
    run_pipeline(functools.partial(creatives.define_pack_pipeline, run=run), [])
    run_pipeline(functools.partial(creatives.define_index_pipeline, run=run, shards=1), [])
    assert packs(run).files == [] and run.manifest(run.stage("creatives")).count("images") == 0
