"""Three months of which each trains an encoder of its own: the gate compares pairs, each by the embeddings of its own encoder."""

import csv
import hashlib
import io
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import model
from beam_jobs.cli import main
from model import registry
from model.features import MONTH, embedding_column
from model.images import decode
from model.splits import GATE, split_of_rows
from schemas import contract as contracts
from schemas import lake
from schemas.contract import Column, Contract
from schemas.lake import Champion
from schemas.parquet import read_parquet
from schemas.storage import Folder

MONTHS = ("2026-08", "2026-09", "2026-10")
ROWS, IMAGES, SHOWN = 1500, 60, 40
CONTRACT = Contract(
    (
        Column("id", "bytes", frozenset({"key"}), required=True),
        Column("image", "bytes", frozenset({"image"})),
        Column("slot", "bytes"),
        Column("clicks", "int", frozenset({"clicks"})),
        Column("impressions", "int", frozenset({"impressions"})),
    )
)
# The newest month's candidate is judged whatever it is like, by few clicks.
FLAGS = ("--encoder-refresh", "months 1", "--min-gate-clicks", "50", "--max-ne-loss", "0.5")


def deliver(storage: Folder, month: str) -> None:
    """Rows whose clicks follow how bright their picture is."""
    rng = np.random.default_rng(int(month[-2:]))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([column.name for column in CONTRACT.columns])
    for row in range(ROWS):
        image, slot = rng.integers(0, IMAGES, 2)
        writer.writerow([f"k{row}", f"i{image}.png", f"s{slot % 3}", rng.binomial(SHOWN, 0.05 + 0.3 * image / IMAGES), SHOWN])
    storage.write(lake.raw_ads(month) + "ads.csv", file.getvalue().encode())
    for image in range(IMAGES):
        data = io.BytesIO()
        Image.new("RGB", (80, 40), (4 * image, 4 * image, 60)).save(data, "PNG")
        storage.write(f"{lake.raw_images(month)}i{image}.png", data.getvalue())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = tmp_path_factory.mktemp("pairs")
    path, storage = folder / "contract.pbtxt", Folder(str(folder / "lake"))
    path.write_text(contracts.dumps(CONTRACT))
    for month in MONTHS:
        deliver(storage, month)
        assert main(["month", month, "--lake", storage.uri, "--contract", str(path), *FLAGS]) == 0
    return storage


def evaluation(storage: Folder, month: str, run: str) -> dict[str, Any]:
    manifest = lake.read_manifest(storage, lake.stage_folder("evaluation", month, run))
    assert manifest is not None
    return dict(manifest.info)


def pairs(storage: Folder) -> list[Champion]:
    """Of each month, what it was scored with."""
    found = []
    for month in MONTHS:
        (note,) = lake.publications(storage, month)
        info = evaluation(storage, month, note.run)
        assert info["promoted"], info["why"]
        found.append(Champion(info["encoder"], info["ranker"], month, note.run))
    return found


def test_every_month_has_another_encoder_and_the_gate_three_pairs(storage: Folder) -> None:
    august, september, october = pairs(storage)
    assert len({pair.encoder for pair in (august, september, october)}) == 3
    inputs = storage.read_json(f"runs/{october.month}/{october.run}/inputs.json")
    assert inputs["champion"] == [september.encoder, september.ranker]
    assert inputs["earlier_champion"] == [august.encoder, august.ranker]
    for pair in (august, september, october):
        assert lake.read_manifest(storage, lake.embeddings_folder(pair.encoder, october.month, october.run))
    info = evaluation(storage, october.month, october.run)
    assert set(info["metrics"]) == {"candidate", "champion", "earlier_champion", "base_rate"}
    assert "against the champion" in info["why"] and "against the earlier champion" in info["why"]
    scores = lake.read_manifest(storage, lake.stage_folder("scores", october.month, october.run))
    rows = pa.Table.from_batches([batch for file in scores.files for batch in read_parquet(storage, file)])
    assert set(rows["encoder_version"].to_pylist()) == {october.encoder}
    assert set(rows["model_version"].to_pylist()) == {october.ranker}


def test_each_pair_is_judged_by_its_own_embeddings(storage: Folder, tmp_path: pathlib.Path) -> None:
    """Log loss on the gate rows by plain code, from the CSV file, the pictures and the models' own files."""
    import tensorflow as tf

    published = pairs(storage)
    newest = published[-1]
    metrics = evaluation(storage, newest.month, newest.run)["metrics"]
    text = storage.read(lake.raw_ads(newest.month) + "ads.csv").decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    names = sorted({row["image"] for row in rows})
    contents = [storage.read(lake.raw_images(newest.month) + name) for name in names]
    creatives = {name: hashlib.sha256(data).hexdigest() for name, data in zip(names, contents, strict=True)}
    keys, of_rows = (pa.array(values) for values in zip(*((row["id"], creatives[row["image"]]) for row in rows), strict=True))
    judged = np.flatnonzero(split_of_rows(keys, of_rows) == GATE)
    clicks = np.array([int(rows[at]["clicks"]) for at in judged])
    assert metrics["candidate"]["clicks"] == clicks.sum() > 50
    losses = {}
    for name, pair in zip(("earlier_champion", "champion", "candidate"), published, strict=True):
        for kind, version in (("encoder", pair.encoder), ("ranker", pair.ranker)):
            registry.fetch(storage, kind, version, tmp_path / name / kind)
        thumbnails = tf.constant(np.stack([decode(data)[0] for data in contents]))
        embed = tf.saved_model.load(str(tmp_path / name / "encoder" / "saved_model"))
        embeddings = embed.serve({"thumbnail": thumbnails})["embedding"].numpy()
        place = {image: at for at, image in enumerate(names)}
        batch = pa.RecordBatch.from_pydict(
            {
                "key": keys.take(judged),
                "id": keys.take(judged),
                "slot": pa.array([rows[at]["slot"] for at in judged]),
                "creative": of_rows.take(judged),
                "embedding": embedding_column(embeddings[[place[rows[at]["image"]] for at in judged]]),
                MONTH: pa.array([lake.month_number(newest.month)] * len(judged), pa.int32()),
            }
        )
        said = model.load(tmp_path / name / "ranker").predict(batch, at_reference=False)
        losses[name] = -(clicks * np.log(said) + (SHOWN - clicks) * np.log1p(-said)).sum() / (SHOWN * len(judged))
    assert losses == pytest.approx({name: metrics[name]["log_loss"] for name in losses}, rel=1e-5)
    # So that one pair's embeddings in place of another's would show.
    assert len({round(loss, 6) for loss in losses.values()}) == 3
