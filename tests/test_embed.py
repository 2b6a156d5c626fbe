import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from beam_jobs import creatives, embed
from beam_jobs.arrow import Unit, by_shard, spill_sections
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, prepare
from beam_jobs.runner import run_pipeline
from model import encoder, registry
from model.features import embedding_column
from schemas import lake
from schemas.lake import Manifest, shard_of_unit
from schemas.parquet import read_parquet, write_parquet
from schemas.sample import write_months
from schemas.storage import Folder, Storage

MONTHS, SHARDS = ("2026-08", "2026-09"), 3
ENCODERS = ("first", "second")


def save_encoder(storage: Storage, version: str, seed: int) -> None:
    """An encoder that was never trained, in the lake as training leaves it."""
    import keras

    keras.utils.set_random_seed(seed)
    with registry.local_folder() as folder:
        model = encoder.build()
        model.save(folder / "model.keras")
        model.export(folder / "saved_model", verbose=False)
        (folder / "spec.json").write_text(json.dumps({"kind": "encoder", "fingerprint": "any"}))
        receipts, info = registry.save(storage, "encoder", version, folder, {})
    lake.commit(storage, lake.model_folder("encoder", version), Manifest("encoder", tuple(receipts), info))


def run_embed(run: MonthRun, version: str, window: list[MonthRun]) -> None:
    run_pipeline(functools.partial(embed.define_pack_pipeline, run=run, encoder=version), [])
    for earlier in window:
        run_pipeline(functools.partial(embed.define_gather_pipeline, run=run, encoder=version, month=earlier.month, id=earlier.id), [])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MonthRun]:
    """Two sample months embedded one after the other by the first encoder, and both at once by the second."""
    storage, runs = Folder(str(tmp_path_factory.mktemp("embed"))), {}
    write_months(storage, list(MONTHS), 200, 40, 0, lambda line: None)
    for seed, version in enumerate(ENCODERS):
        save_encoder(storage, version, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(creatives, "IMAGES_PER_UNIT", 15)
        patch.setattr(embed, "BATCH_THUMBNAILS", 4)
        for month in MONTHS:
            runs[month] = run = prepare(Config(lake=storage.uri), month)
            run_pipeline(functools.partial(creatives.define_pack_pipeline, run=run), [])
            run_pipeline(functools.partial(creatives.define_index_pipeline, run=run, shards=SHARDS), [])
            run_embed(run, "first", [run])
        run_embed(runs[MONTHS[-1]], "second", list(runs.values()))
    return runs


def rows(storage: Storage, files: list[str]) -> Iterator[dict[str, Any]]:
    return (row for file in files for batch in read_parquet(storage, file) for row in batch.to_pylist())


def embedded(run: MonthRun, version: str) -> Manifest:
    return run.manifest(lake.embeddings_folder(version, run.month, run.id) + "/packs")


def thumbnails(runs: dict[str, MonthRun]) -> dict[str, dict[str, bytes]]:
    """Thumbnails by creative, by the month that they were new in."""
    return {
        month: {
            row["creative"]: row["thumbnail"]
            for row in rows(run.storage, run.manifest(run.stage("creatives") + "/packs").files)
            if row["thumbnail"] is not None
        }
        for month, run in runs.items()
    }


def direct(run: MonthRun, version: str, of: dict[str, bytes]) -> dict[str, np.ndarray]:
    pixels = np.stack([np.frombuffer(thumbnail, np.uint8).reshape(64, 64, 3) for thumbnail in of.values()])
    return dict(zip(of, registry.load(run.storage, "encoder", version).embed(pixels), strict=True))


def assert_embeddings(found: list[dict[str, Any]], expected: dict[str, np.ndarray]) -> None:
    assert sorted(row["creative"] for row in found) == sorted(expected)
    for row in found:
        np.testing.assert_allclose(np.frombuffer(row["embedding"], np.float32), expected[row["creative"]], atol=1e-5)


@pytest.mark.parametrize("month", MONTHS)
def test_each_creative_is_embedded_when_it_is_new(runs: dict[str, MonthRun], month: str) -> None:
    run, of = runs[month], thumbnails(runs)[month]
    manifest = embedded(run, "first")
    assert_embeddings(list(rows(run.storage, manifest.files)), direct(run, "first", of))
    assert manifest.count("embedded") == manifest.rows == len(of) > 0
    assert manifest.info == {"encoder": "first"}


def test_another_encoder_embeds_all_again(runs: dict[str, MonthRun]) -> None:
    last, of = runs[MONTHS[-1]], thumbnails(runs)
    both = {creative: thumbnail for month in MONTHS for creative, thumbnail in of[month].items()}
    assert len(both) == sum(map(len, of.values()))
    manifest = embedded(last, "second")
    assert_embeddings(list(rows(last.storage, manifest.files)), direct(last, "second", both))
    some = next(iter(both))
    assert not np.allclose(direct(last, "first", both)[some], direct(last, "second", both)[some])


@pytest.mark.parametrize("month", MONTHS)
@pytest.mark.parametrize("version", ENCODERS)
def test_each_shard_has_exactly_its_creatives(runs: dict[str, MonthRun], version: str, month: str) -> None:
    run, of = runs[month], thumbnails(runs)
    all_of_them = direct(run, version, {creative: thumbnail for new in of.values() for creative, thumbnail in new.items()})
    index = run.manifest(run.stage("creatives"))
    wanted = {shard_of_unit(r.unit): {row["creative"] for row in rows(run.storage, [r.file])} - {None} for r in index.receipts}
    gathered = run.manifest(lake.embeddings_folder(version, run.month, run.id))
    assert {shard_of_unit(receipt.unit) for receipt in gathered.receipts} == {shard for shard, found in wanted.items() if found}
    for receipt in gathered.receipts:
        found = list(rows(run.storage, [receipt.file]))
        assert_embeddings(found, {creative: all_of_them[creative] for creative in wanted[shard_of_unit(receipt.unit)]})
        assert [row["creative"] for row in found] == sorted(row["creative"] for row in found)
    assert gathered.count("creatives") == sum(map(len, wanted.values()))
    assert gathered.info == {"encoder": version, "shards": SHARDS, "width": encoder.EMBEDDING_WIDTH}


def test_thumbnails_are_named_by_where_they_start(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Folder(str(tmp_path))
    pack = pa.RecordBatch.from_pylist(
        [{"creative": str(i), "thumbnail": None if i % 3 == 0 or 4 <= i < 8 else bytes(12288)} for i in range(10)], creatives.PACK
    )
    receipt = write_parquet(storage, "packs", "pack", [pack])
    monkeypatch.setattr(embed, "BATCH_THUMBNAILS", 4)
    found = [(name.rpartition("@")[2], batch["creative"].to_pylist()) for name, batch in embed.read_thumbnails(storage, receipt.file)]
    assert found == [("0", ["1", "2"]), ("2", ["8"])]


def test_a_creative_in_two_packs_is_written_once(tmp_path: pathlib.Path) -> None:
    """Two runs that looked at the same creative at the same time both have its embedding."""
    storage, width = Folder(str(tmp_path)), encoder.EMBEDDING_WIDTH
    embeddings = embedding_column(np.repeat([[2.0], [1.0], [2.0]], width, axis=1))
    batch = pa.RecordBatch.from_pydict({"creative": ["b", "a", "b"], "shard": pa.array([0, 0, 0], pa.int32()), "embedding": embeddings})
    pieces, ((shard, section),) = spill_sections(by_shard([batch], 1, embed._shard_column), 1, "spill")
    storage.write("spill", *pieces)
    receipt = embed.write_embeddings(Unit(shard, 0, (section,)), storage, "out")
    assert [(row["creative"], np.frombuffer(row["embedding"], np.float32)[0]) for row in rows(storage, [receipt.file])] == [
        ("a", 1.0),
        ("b", 2.0),
    ]
