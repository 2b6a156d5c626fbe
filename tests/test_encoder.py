import os
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from model import encoder, encoder_training, splits, training
from schemas.contract import Column, Contract

CONTRACT = Contract(
    (
        Column("ad_id", "bytes", frozenset({"key"}), True),
        Column("device", "bytes"),
        Column("image", "bytes", frozenset({"image"})),
        Column("impressions", "int", frozenset({"impressions"})),
        Column("clicks", "int", frozenset({"clicks"})),
    )
)
CREATIVES, ROWS = 300, 3000
NAMES = [f"{number:064x}" for number in range(CREATIVES)]


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Noise, and in every second thumbnail a bright square that is clicked."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (CREATIVES, 64, 64, 3), np.uint8)
    bright = np.arange(CREATIVES) % 2
    for number in np.flatnonzero(bright):
        top, left = rng.integers(0, 40, 2)
        pixels[number, top : top + 20, left : left + 20] = 250
    return pixels, bright


def thumbnails() -> Iterator[pa.RecordBatch]:
    pixels, _ = pictures()
    table = {"creative": NAMES, "thumbnail": pa.array([p.tobytes() for p in pixels], pa.binary(64 * 64 * 3))}
    whole = pa.RecordBatch.from_pydict(table)
    yield whole.slice(0, 130)
    yield whole.slice(130)


def examples(flip_gate: bool = False, clicks: bool = True) -> training.Examples:
    rng = np.random.default_rng(1)
    creative = rng.integers(0, CREATIVES, ROWS)
    clicked = rng.binomial(20, np.where(pictures()[1][creative], 0.4, 0.05)) * clicks
    columns = {"key": [f"k{i}" for i in range(ROWS)], "creative": [NAMES[i] for i in creative]}
    batch = pa.RecordBatch.from_pydict({**columns, "device": pa.array(rng.choice(["tv", "pc"], ROWS))})
    gate = splits.split_of_rows(batch["key"], batch["creative"]) == splits.GATE
    if flip_gate:
        clicked = np.where(gate, 20 - clicked, clicked)
    batch = batch.append_column("clicks", pa.array(clicked)).append_column("impressions", pa.array(np.full(ROWS, 20)))
    return lambda epoch: iter([batch.slice(0, 1000), batch.slice(1000)])


def train(folder: pathlib.Path, source: training.Examples, epochs: int = 2) -> list[np.ndarray]:
    import keras

    encoder_training.train_encoder(source, thumbnails, CONTRACT, 7, folder, lambda line: None, epochs)
    return keras.models.load_model(folder / "model.keras", compile=False).get_weights()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("encoder")
    return folder, train(folder, examples())


def test_embeddings_know_what_is_clicked(tmp_path: pathlib.Path) -> None:
    lines: list[str] = []
    summary = encoder_training.train_encoder(examples(), thumbnails, CONTRACT, 7, tmp_path, lines.append, 6)
    pixels, bright = pictures()
    embedding = encoder.Encoder(tmp_path).embed(pixels)
    gate = splits.split_of_creatives(pa.array(NAMES)) == splits.GATE
    train_rows = splits.split_of_creatives(pa.array(NAMES)) == splits.TRAIN
    assert embedding.shape == (CREATIVES, encoder.EMBEDDING_WIDTH) and embedding.dtype == np.float32
    assert np.corrcoef(embedding[gate, -1], bright[gate])[0, 1] > 0.8
    np.testing.assert_allclose(embedding[train_rows].mean(axis=0), 0, atol=0.1)
    assert summary["creatives"] == np.count_nonzero(train_rows)
    assert any("epoch 1/6" in line and "tune loss" in line for line in lines)


def test_repeat_is_bit_equal_and_gate_outcomes_never_matter(trained: tuple[pathlib.Path, list[np.ndarray]], tmp_path: pathlib.Path) -> None:
    for again, weights in zip(trained[1], train(tmp_path, examples(flip_gate=True)), strict=True):
        np.testing.assert_array_equal(again, weights)


def test_on_a_gpu_it_learns_in_mixed_precision_and_is_written_in_float32(
    trained: tuple[pathlib.Path, list[np.ndarray]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU the same layers compute in the same precision, only no faster."""
    import keras
    import tensorflow

    monkeypatch.setattr(tensorflow.config, "list_physical_devices", lambda kind: [kind])
    weights = train(tmp_path, examples())
    # The dense layers' weights are close to those of float32, and not the same.
    assert np.abs(weights[-1] - trained[1][-1]).max() > 0
    model = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert {layer.compute_dtype for layer in model.layers} == {"float32"} and {array.dtype.name for array in weights} == {"float32"}
    pixels, _ = pictures()
    np.testing.assert_allclose(
        model({"thumbnail": pixels[:10]}, training=False)["embedding"], encoder.Encoder(tmp_path).embed(pixels[:10]), atol=1e-4
    )


def test_an_embedding_does_not_depend_on_its_batch(trained: tuple[pathlib.Path, list[np.ndarray]]) -> None:
    import keras

    loaded = encoder.Encoder(trained[0])
    pixels, _ = pictures()
    whole = loaded.embed(pixels)
    np.testing.assert_allclose(np.concatenate([loaded.embed(pixels[:3]), loaded.embed(pixels[3:])]), whole, atol=1e-5)
    model = keras.models.load_model(trained[0] / "model.keras", compile=False)
    np.testing.assert_allclose(model({"thumbnail": pixels[:10]}, training=False)["embedding"], whole[:10], atol=1e-4)
    assert loaded.embed(pixels[:0]).shape == (0, encoder.EMBEDDING_WIDTH)
    assert loaded.fingerprint == CONTRACT.fingerprint


def test_errors(trained: tuple[pathlib.Path, list[np.ndarray]], tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no model folder"):
        encoder.Encoder(tmp_path)
    with pytest.raises(ValueError, match="expected uint8"):
        encoder.Encoder(trained[0]).embed(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"0 clicks in .* labelled rows"):
        encoder_training.train_encoder(examples(clicks=False), thumbnails, CONTRACT, 0, tmp_path, lambda line: None)


def test_a_backbone_is_named_with_a_file_of_its_weights(tmp_path: pathlib.Path) -> None:
    import keras

    body = keras.applications.MobileNetV3Small(include_top=False, weights=None, input_shape=(64, 64, 3))
    body.save_weights(path := tmp_path / "small.weights.h5")
    model = encoder.build(backbone=("MobileNetV3Small", path))
    inside = next(layer for layer in model.layers if "mobilenet" in layer.name.lower())
    for kept, given in zip(inside.get_weights(), body.get_weights(), strict=True):
        np.testing.assert_array_equal(kept, given)
    assert len(model.trainable_variables) == 4
    assert model(pictures()[0][:3])["embedding"].shape == (3, encoder.EMBEDDING_WIDTH)
    for name, wrong in (("MobileNetV9", "has no network 'MobileNetV9'"), ("VGG16", "small.weights.h5 has no weights of VGG16")):
        with pytest.raises(ValueError, match=wrong):
            encoder.build(backbone=(name, path))
    if os.environ.get("ADSTOCRAT_LONG"):
        backbone = ("MobileNetV3Small", path)
        encoder_training.train_encoder(examples(), thumbnails, CONTRACT, 7, tmp_path / "encoder", lambda line: None, 1, backbone)
        trained = keras.models.load_model(tmp_path / "encoder" / "model.keras", compile=False)
        embedding = encoder.Encoder(tmp_path / "encoder").embed(pictures()[0][:20])
        np.testing.assert_allclose(embedding, trained(pictures()[0][:20])["embedding"], atol=1e-3)


def test_without_pictures_it_stays_untrained_and_runs(tmp_path: pathlib.Path) -> None:
    summary = encoder_training.train_encoder(examples(), lambda: iter(()), CONTRACT, 0, tmp_path, lambda line: None)
    assert summary["mode"] == "untrained" and summary["creatives"] == 0
    assert np.isfinite(encoder.Encoder(tmp_path).embed(np.zeros((3, 64, 64, 3), np.uint8))).all()


@pytest.mark.parametrize(("creatives", "times"), [(1, 16), (150, 16), (4_000, 26), (16_000, 16), (80_000, 4), (100_000_000, 4)])
def test_the_more_pictures_there_are_the_less_often_each_is_seen(creatives: int, times: int) -> None:
    assert encoder_training.passes(creatives) == times
