import functools
import json
from collections import Counter

import pyarrow as pa
import pytest
from test_embed import save_encoder

from beam_jobs import creatives, embed, ingest, score
from beam_jobs.config import Config
from beam_jobs.inference import scored
from beam_jobs.join import MonthRows
from beam_jobs.run import MonthRun, prepare
from beam_jobs.runner import run_pipeline
from model import encoder, ranker, registry
from model.features import Fitter
from schemas import lake, tables
from schemas.lake import Manifest, raw_ads, raw_images
from schemas.parquet import read_parquet
from schemas.sample import write_months
from schemas.storage import Folder

MONTH, SHARDS, ROWS = "2026-08", 3, 600


def save_ranker(run: MonthRun, version: str) -> None:
    """A ranker that was never trained but for its features, in the lake as training leaves it."""
    import keras

    keras.utils.set_random_seed(0)
    rows, fitter = MonthRows(run, run.month, run.id, "e"), Fitter(run.contract, encoder.EMBEDDING_WIDTH)
    for unit in rows.units:
        for batch in rows.batches(unit):
            fitter.add(batch, batch)
    features = fitter.fit()
    model = ranker.build(features, 0.02)
    # Its head starts at zero: without this all rows would score alike.
    head = model.get_layer("head")
    head.set_weights([keras.random.normal(head.get_weights()[0].shape, stddev=0.3), head.get_weights()[1]])
    spec = {"kind": "ranker", "fingerprint": run.contract.fingerprint, "features": features.to_json(), "base_rate": 0.02}
    with registry.local_folder() as folder:
        model.save(folder / "model.keras")
        model.export(folder / "saved_model", verbose=False)
        (folder / "spec.json").write_text(json.dumps({**spec, "encoder_version": "e", "encoder_digest": "d"}))
        receipts, info = registry.save(run.storage, "ranker", version, folder, {})
    lake.commit(run.storage, lake.model_folder("ranker", version), Manifest("ranker", tuple(receipts), info))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MonthRun:
    """A sample month that is scored, with an image that is broken and one that was not delivered."""
    storage = Folder(str(tmp_path_factory.mktemp("score")))
    write_months(storage, [MONTH], ROWS, 30, 0, lambda line: None)
    first, second, *_ = storage.names(raw_images(MONTH))
    storage.write(first, b"broken")
    storage.delete(second)
    some = storage.names(raw_ads(MONTH))[0]
    storage.write(raw_ads(MONTH) + "bare.csv", b"".join(_without_image(line) for line in storage.read(some).splitlines()[:20]))
    run = prepare(Config(lake=storage.uri), MONTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "shards_for", lambda rows: SHARDS)
        run_pipeline(functools.partial(ingest.define_pipeline, run=run), [])
    run_pipeline(functools.partial(creatives.define_pack_pipeline, run=run), [])
    run_pipeline(functools.partial(creatives.define_index_pipeline, run=run, shards=SHARDS), [])
    save_encoder(storage, "e", 0)
    run_pipeline(functools.partial(embed.define_pack_pipeline, run=run, encoder="e"), [])
    run_pipeline(functools.partial(embed.define_gather_pipeline, run=run, encoder="e", month=run.month, id=run.id), [])
    save_ranker(run, "r")
    evaluation = Manifest("evaluate", (), {"encoder": "e", "ranker": "r"})
    run_pipeline(functools.partial(score.define_pipeline, run=run, evaluation=evaluation), [])
    return run


def _without_image(line: bytes) -> bytes:
    """The header as it is; a row with another key and no image."""
    fields = line.split(b",")
    return line + b"\n" if fields[0] == b"ad_id" else b",".join([b"bare-" + fields[0], *fields[1:9], b"", *fields[10:]]) + b"\n"


def scores(run: MonthRun) -> pa.Table:
    files = run.manifest(run.stage("scores")).files
    return pa.Table.from_batches([batch for file in files for batch in read_parquet(run.storage, file)])


def test_scores_equal_the_ranker_asked_directly(run: MonthRun) -> None:
    loaded = registry.load(run.storage, "ranker", "r")
    rows = MonthRows(run, run.month, run.id, "e")
    carried = [column.name for column in run.contract.carried]
    expected = {row["key"]: row for unit in rows.units for b in rows.batches(unit) for row in scored(b, loaded, carried).to_pylist()}
    found = {row["key"]: row for row in scores(run).to_pylist()}
    assert len(found) == scores(run).num_rows == len(expected) == ROWS + 19
    for key, row in expected.items():
        assert found[key].pop("p_click") == pytest.approx(row.pop("p_click"), rel=1e-6)
        assert found[key].items() >= row.items()
    assert len({row["p_click"] for row in scores(run).to_pylist()}) > ROWS / 2


def test_every_ingested_row_is_scored_in_its_unit(run: MonthRun) -> None:
    rows, scored_units = MonthRows(run, run.month, run.id, None), run.manifest(run.stage("scores")).receipts
    assert [f"{unit.unit}@000000000" for unit in rows.units] == [receipt.unit for receipt in scored_units] and len(scored_units) == SHARDS
    for unit, receipt in zip(rows.units, scored_units, strict=True):
        keys = [
            [key for batch in read_parquet(run.storage, file, ["key"]) for key in batch["key"].to_pylist()]
            for file in (unit.file, receipt.file)
        ]
        assert keys[0] == keys[1] and len(keys[0]) == receipt.rows == receipt.counts["scored"]


def test_scores_are_rows_of_the_score_table(run: MonthRun) -> None:
    table = scores(run)
    assert table.schema.equals(tables.schema("scores", run.contract))
    same = {(str(row["month"]), row["encoder_version"], row["model_version"], row["run_id"]) for row in table.to_pylist()}
    assert same == {(f"{MONTH}-01", "e", "r", run.id)}


def test_counts_are_those_of_the_files(run: MonthRun) -> None:
    manifest, table = run.manifest(run.stage("scores")), scores(run)
    for status in ("image_status", "score_status"):
        assert manifest.counts(f"{status}:") == Counter(table[status].to_pylist())
    assert {"ok", "no_image", "missing", "not_an_image"} == set(manifest.counts("image_status:"))
    assert manifest.count("scored") == table.num_rows and manifest.info == {"encoder": "e", "ranker": "r"}
    by_image = {(row["image_status"] == "ok", row["score_status"]) for row in table.to_pylist()}
    assert by_image == {(True, "ok"), (False, "no_image")}
