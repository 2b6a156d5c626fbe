import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import model
from beam_jobs.realised import position_effect
from model import encoder, features, golden, ranker, splits, training
from model.ranker import BATCH, Ranker
from model.seen import UNKNOWN, Vocabulary
from model.survey import survey
from schemas.contract import Column, Contract

CONTRACT = Contract(
    (
        Column("ad_id", "bytes", frozenset({"key"}), True),
        Column("campaign", "bytes"),
        Column("bid", "float"),
        Column("position", "int", frozenset({"position"})),
        Column("image", "bytes", frozenset({"image"})),
        Column("impressions", "int", frozenset({"impressions"})),
        Column("clicks", "int", frozenset({"clicks"})),
    )
)
ROWS = 12_000
QUICK = training.Settings(batch=256, epochs=5, max_epochs=5)


def joined(flip_gate: bool = False) -> pa.RecordBatch:
    rng = np.random.default_rng(0)
    campaign, creative, position = rng.integers(0, 10, ROWS), rng.integers(0, 200, ROWS), rng.integers(1, 5, ROWS)
    vectors = rng.normal(size=(200, encoder.EMBEDDING_WIDTH)).astype(np.float32)
    no_image = rng.random(ROWS) < 0.1
    log_odds = 0.2 * (campaign - 5) + vectors[creative, 0] * ~no_image - 0.5 * position
    clicks = rng.binomial(10, 1 / (1 + np.exp(-log_odds)))
    batch = pa.RecordBatch.from_pydict(
        {
            "key": [f"k{i}" for i in range(ROWS)],
            "campaign": [f"c{i}" for i in campaign],
            "bid": rng.lognormal(size=ROWS),
            "position": position,
            "impressions": pa.array(np.full(ROWS, 10), mask=rng.random(ROWS) < 0.1),
            "creative": pa.array([f"{i:064x}" for i in creative], mask=no_image),
            "embedding": features.embedding_column(np.where(no_image[:, None], np.nan, vectors[creative])),
        }
    )
    if flip_gate:
        gate = splits.split_of_rows(batch["key"], batch["creative"]) == splits.GATE
        clicks = np.where(gate, 10 - clicks, clicks)
    return batch.append_column("clicks", pa.array(clicks))


def source(batch: pa.RecordBatch) -> training.Examples:
    return lambda epoch: iter([batch.slice(0, 5000), batch.slice(5000)])


def train(
    folder: pathlib.Path, batch: pa.RecordBatch, seed: int = 3, digest: str = "d", parent: pathlib.Path | None = None
) -> dict[str, Any]:
    return training.train_ranker(source(batch), CONTRACT, seed, folder, "v1", digest, parent, lambda line: None, QUICK)


def weights(folder: pathlib.Path) -> list[np.ndarray]:
    import keras

    return keras.models.load_model(folder / "model.keras", compile=False).get_weights()


@pytest.fixture(scope="module")
def batch() -> pa.RecordBatch:
    return joined()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, batch: pa.RecordBatch) -> tuple[pathlib.Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranker")
    return folder, train(folder, batch)


@pytest.fixture(scope="module")
def loaded(trained: tuple[pathlib.Path, dict[str, Any]]) -> Ranker:
    return Ranker(trained[0])


def test_learns_columns_image_and_position(loaded: Ranker, batch: pa.RecordBatch) -> None:
    p = loaded.predict(batch)
    assert p.dtype == np.float64 and p.shape == (ROWS,) and p.min() > 0 and p.max() < 1
    vectors = loaded.features.arrays(batch, True)["embedding"]
    with_image = vectors.any(axis=1)
    log_odds = np.log(p / (1 - p))
    assert np.corrcoef(log_odds[with_image], vectors[with_image, 0])[0, 1] > 0.7
    own = loaded.predict(batch, at_reference=False)
    fourth = batch["position"].to_numpy() == 4
    shift = np.log(own / (1 - own)) - log_odds
    assert -2.0 < shift[fourth].mean() < -1.0
    assert np.abs(shift[batch["position"].to_numpy() == 1]).max() < 1e-5


def test_outcomes_and_positions_do_not_change_scores(loaded: Ranker, batch: pa.RecordBatch) -> None:
    bare = batch.drop_columns(["clicks", "impressions"])
    moved = bare.set_column(bare.schema.get_field_index("position"), "position", pa.array(np.full(ROWS, 4)))
    np.testing.assert_array_equal(loaded.predict(moved), loaded.predict(batch))


def test_golden_scores_of_several_months_are_given_again(
    trained: tuple[pathlib.Path, dict[str, Any]], loaded: Ranker, batch: pa.RecordBatch, tmp_path: pathlib.Path
) -> None:
    """What happened in the months before is another for each, so a batch is of one month."""
    folder = shutil.copytree(trained[0], tmp_path / "ranker")
    months = [batch.append_column("month_number", pa.array(np.full(ROWS, number))).slice(0, 300) for number in (0, 1, 999)]
    # A file of the lake may have codes for what another has as texts.
    at = months[0].schema.get_field_index("campaign")
    months[1:] = [month.set_column(at, "campaign", month["campaign"].dictionary_encode()) for month in (months[1], months[2][100:])]
    golden.write(folder, months)
    assert golden.differences(loaded, folder) == ""
    kept = pa.ipc.open_file(folder / golden.FILE)
    assert [set(kept.get_batch(i)["month_number"].to_pylist()) for i in range(kept.num_record_batches)] == [{0}, {1}, {999}]


@pytest.mark.parametrize("size", [1, 999, BATCH, BATCH + 1])
def test_scores_are_the_same_in_any_batch(loaded: Ranker, batch: pa.RecordBatch, size: int) -> None:
    few = batch.slice(100, 20) if size == 1 else batch
    parts = [loaded.predict(few.slice(start, size)) for start in range(0, len(few), size)]
    np.testing.assert_allclose(np.concatenate(parts), loaded.predict(few), rtol=1e-6)


def test_padding_does_not_show(trained: tuple[pathlib.Path, dict[str, Any]], loaded: Ranker, batch: pa.RecordBatch) -> None:
    import tensorflow as tf

    few = batch.slice(0, 100)
    saved = tf.saved_model.load(str(trained[0] / "saved_model"))
    logits = saved.serve(loaded.features.arrays(few, True))["calibrated"].numpy()[:, 0]
    np.testing.assert_allclose(1 / (1 + np.exp(-logits.astype(np.float64))), loaded.predict(few), rtol=1e-6)
    assert loaded.predict(batch.slice(0, 0)).shape == (0,)


def test_scores_without_images(loaded: Ranker, batch: pa.RecordBatch) -> None:
    bare = batch.drop_columns(["embedding"])
    bare = bare.set_column(bare.schema.get_field_index("creative"), "creative", pa.nulls(ROWS, pa.string()))
    p = loaded.predict(bare)
    assert np.isfinite(p).all() and 0.5 < p.mean() / loaded.predict(batch).mean() < 1.5
    without = bare.drop_columns(["creative"])
    np.testing.assert_array_equal(loaded.predict(without), p)
    for found, expected in zip(loaded.score(without), loaded.score(bare), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="the batch has no column 'key'; expected key, "):
        loaded.predict(batch.drop_columns(["key"]))


def test_what_a_folder_says(trained: tuple[pathlib.Path, dict[str, Any]], loaded: Ranker, batch: pa.RecordBatch) -> None:
    summary = trained[1]
    assert summary["mode"] == "scratch" and 0 < summary["rows"] < 0.9 * ROWS and summary["values_sharing_an_id"] == 0
    assert loaded.base_rate == pytest.approx(summary["clicks"] / summary["impressions"])
    assert (loaded.encoder_version, loaded.encoder_digest) == ("v1", "d")
    assert loaded.fingerprint == CONTRACT.fingerprint


def test_values_that_find_no_room_are_counted(tmp_path: pathlib.Path, batch: pa.RecordBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    settings = training.Settings(epochs=1, max_epochs=1)
    monkeypatch.setattr(features, "MAX_VALUES", 5)
    told = training.train_ranker(source(batch), CONTRACT, 3, tmp_path, "v1", "d", None, lines.append, settings)
    # Five of ten campaigns.
    assert told["values_sharing_an_id"] == pytest.approx(0.5, abs=0.02)
    assert lines[-1] == f"values that share an id, in the column with the most: {told['values_sharing_an_id']:.2%} of impressions"


def test_repeat_is_bit_equal_and_gate_outcomes_never_matter(trained: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    import keras

    # Behind nine others in the same process: names of more digits sort otherwise.
    keras.utils.clear_session()
    for name in ("add", "multiply", "concatenate", "flatten", "dropout") * 9:
        keras.backend.get_uid(name)
    train(tmp_path / "again", joined(flip_gate=True))
    train(tmp_path / "other", joined(), seed=4)
    first, again, other = weights(trained[0]), weights(tmp_path / "again"), weights(tmp_path / "other")
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_the_newest_months_clicks_are_what_is_expected_in_sum(tmp_path: pathlib.Path, batch: pa.RecordBatch) -> None:
    """Also where they are fewer than the month before, training was short, and learnt from half of the impressions without a click."""
    fewer = pa.array(np.random.default_rng(8).binomial(batch["clicks"].to_numpy(), 0.5))
    later = batch.set_column(batch.schema.get_field_index("clicks"), "clicks", fewer)
    months = [
        part.append_column(features.MONTH, pa.repeat(pa.scalar(number, pa.int32()), ROWS)) for number, part in enumerate((batch, later))
    ]
    short = dataclasses.replace(QUICK, epochs=1, max_epochs=1, negatives=0.5)
    # With a position it is half-way between the sums at the rows' own and at the reference.
    contract = Contract(tuple(column for column in CONTRACT.columns if column.name != "position"))
    training.train_ranker(lambda epoch: iter(months), contract, 3, tmp_path, "v1", "d", None, lambda line: None, short)
    rows, _ = features.learnable(months[1])
    clicks, shown = features.outcomes(rows, CONTRACT)
    assert (Ranker(tmp_path).predict(rows) * shown).sum() / clicks.sum() == pytest.approx(1, abs=0.01)


def test_refresh_starts_from_the_parent(
    trained: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path, batch: pa.RecordBatch
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(trained[0], parent)
    summary = train(tmp_path / "refreshed", batch.slice(0, 6000), parent=parent)
    assert summary["mode"] == "refresh" and summary["epochs"] <= QUICK.refresh_epochs
    refreshed = Ranker(tmp_path / "refreshed")
    before = Ranker(parent)
    assert [seen.plain() for seen in refreshed.features.vocabularies] == [seen.plain() for seen in before.features.vocabularies]
    old = before.predict(batch)
    assert 0 < np.abs(np.log(refreshed.predict(batch) / old)).mean() < 0.5


def test_new_values_begin_with_what_was_learnt_of_the_unknown() -> None:
    rng, sizes = np.random.default_rng(0), (4, 3, 6, 5)
    contract = dataclasses.replace(CONTRACT, columns=(*CONTRACT.columns, Column("slot", "bytes"), Column("device", "bytes")))
    vocabularies = tuple(Vocabulary(np.empty(0, np.uint64), np.empty(0, np.int32), size) for size in sizes)
    spec = features.Features(contract, vocabularies, (), (), encoder.EMBEDDING_WIDTH)
    new = [np.array([3]), np.array([2]), np.array([], np.int64), np.array([2, 4])]
    # Pairs in the order of how many there are: of 3 x 4, 6 x 3 and 6 x 4 values, the later column's in rows.
    pairs, linear, own = rng.normal(size=(12 + 18 + 24, 1)), rng.normal(size=(13, 1)), rng.normal(size=(5, 1))
    begun = [pairs.copy(), linear.copy(), own.copy()]
    for path, weight in zip(("pair_effect/w", "linear/w", "creative_effect/w"), begun, strict=True):
        ranker.begin_anew(path, weight, spec, new)
    assert begun[2][:, 0].tolist() == own[[0, 1, 1, 3, 1], 0].tolist()
    assert begun[1][:, 0].tolist() == linear[[0, 1, 2, 1, 4, 5, 5, *range(7, 13)], 0].tolist()
    first, second = [0, 1, 2, 1], [0, 1, 1]
    for start, rows, columns in ((0, second, first), (12, range(6), second), (30, range(6), first)):
        shape = (len(rows), len(columns))
        table = pairs[start : start + shape[0] * shape[1]].reshape(shape)
        np.testing.assert_array_equal(begun[0][start : start + table.size].reshape(shape), table[np.ix_(rows, columns)])


def test_what_was_never_labelled_is_as_unknown_as_what_comes_later(batch: pa.RecordBatch) -> None:
    """The month that is scored is in the window, and often has no outcomes yet."""
    train = splits.split_of_rows(batch["key"], batch["creative"]) == splits.TRAIN
    some = batch.filter(pa.array(train & batch["creative"].is_valid().to_numpy(zero_copy_only=False)))
    new = pc.binary_join_element_wise(some["creative"], "new", "-")
    later = some.set_column(some.schema.get_field_index("creative"), "creative", new)
    later = later.set_column(later.schema.get_field_index("campaign"), "campaign", pa.repeat("another", len(later)))
    later = later.set_column(later.schema.get_field_index("impressions"), "impressions", pa.nulls(len(later), pa.int64()))
    found = survey([some, later], CONTRACT, encoder.EMBEDDING_WIDTH, None).features
    arrays = [found.arrays(rows, at_reference=True) for rows in (some, later)]
    labelled = pc.is_in(some["creative"], pc.unique(some["creative"].filter(some["impressions"].is_valid()))).to_numpy(zero_copy_only=False)
    assert ((arrays[0]["creative"][:, 0] > UNKNOWN) == labelled).all() and (arrays[0]["categorical"] > UNKNOWN).all()
    assert (arrays[1]["creative"] == UNKNOWN).all() and (arrays[1]["categorical"] == UNKNOWN).all()


def test_images_of_new_creatives_are_trusted_as_far_as_they_tell(
    trained: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path, batch: pa.RecordBatch
) -> None:
    split = splits.split_of_rows(batch["key"], batch["creative"])
    learnt = pc.is_in(batch["creative"], pc.unique(batch["creative"].filter(pa.array(split == splits.TRAIN))))
    vectors = features.embedding_matrix(batch["embedding"]).copy()
    # Of creatives that it has not learnt from, half of what this encoder says is wrong.
    new = np.flatnonzero(~learnt.to_numpy(zero_copy_only=False))
    wrong = np.random.default_rng(1).permutation(200)[[int(name or "0", 16) for name in batch["creative"].take(pa.array(new)).to_pylist()]]
    by_creative = {name: vector for name, vector in zip(batch["creative"].to_pylist(), vectors, strict=True) if name}
    vectors[new] += [by_creative[f"{number:064x}"] for number in wrong]
    bent = batch.set_column(batch.schema.get_field_index("embedding"), "embedding", features.embedding_column(vectors))
    told = train(tmp_path / "bent", bent)
    assert told["trust_of_unseen_creatives"] < 0.75 < 0.9 < trained[1]["trust_of_unseen_creatives"]


def test_a_new_encoder_renews_the_image_side_alone(
    trained: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path, batch: pa.RecordBatch
) -> None:
    still = dataclasses.replace(QUICK, refresh_epochs=1, rate=1e-9)
    for digest in ("d", "another"):
        training.train_ranker(source(batch), CONTRACT, 3, tmp_path / digest, "v1", digest, trained[0], lambda line: None, still)
    same, renewed = (Ranker(tmp_path / digest) for digest in ("d", "another"))
    blind = batch.drop_columns(["embedding"])
    blind = blind.set_column(blind.schema.get_field_index("creative"), "creative", pa.nulls(ROWS, pa.string()))
    told = [np.log(ranker.predict(batch) / ranker.predict(blind)).std() for ranker in (same, renewed)]
    assert told[0] > 0.1 and told[1] < 0.01
    by_columns = [np.log(ranker.predict(blind)) for ranker in (same, renewed)]
    assert np.corrcoef(*by_columns)[0, 1] > 0.95
    with pytest.raises(ValueError, match="takes embeddings of encoder 'v1'"):
        model.load(tmp_path / "d", encoder_digest="another")


def test_another_contract_starts_from_scratch_and_says_so(
    trained: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path, batch: pa.RecordBatch
) -> None:
    other = Contract(tuple(column for column in CONTRACT.columns if column.name != "bid"))
    lines: list[str] = []
    arguments = (source(batch), other, 3, tmp_path, "v1", "d", trained[0], lines.append, QUICK)
    assert training.train_ranker(*arguments)["mode"] == "scratch"
    assert "the contract has changed" in lines[0]
    with pytest.raises(ValueError, match=r"the contract has changed .* use train.mode auto or scratch"):
        training.train_ranker(*arguments, "refresh")


def test_errors(trained: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path, batch: pa.RecordBatch) -> None:
    unlabelled = batch.set_column(batch.schema.get_field_index("clicks"), "clicks", pa.nulls(ROWS, pa.int64()))
    with pytest.raises(ValueError, match=r"0 clicks in 0 impressions of 0 labelled rows .* expected at least one click"):
        train(tmp_path, unlabelled)
    with pytest.raises(ValueError, match="kind 'ranker'; expected 'encoder'"):
        encoder.Encoder(trained[0])


def test_position_adds_the_same_to_the_log_odds_of_every_row(loaded: Ranker, batch: pa.RecordBatch) -> None:
    at, there = (loaded.predict(batch, at_reference=which) for which in (True, False))
    positions = batch["position"].to_numpy().astype(float)
    added = position_effect(loaded, CONTRACT, positions)
    assert np.allclose(np.log(there / (1 - there)), np.log(at / (1 - at)) + added, atol=1e-4)
    assert np.abs(added[positions == 1]).max() < 1e-9 and len(np.unique(added)) == 4
    assert np.isfinite(position_effect(loaded, CONTRACT, np.array([np.nan, 1.0, 99.0]))).all()


def test_an_epoch_takes_a_share_of_old_months_rows_and_of_the_impressions_without_a_click() -> None:
    rng = np.random.default_rng(0)
    impressions = rng.integers(1, 20, 40_000).astype(np.float32)
    arrays = {
        "number": np.arange(40_000),
        "month": np.repeat(np.array([0, 1], np.int32), 20_000),
        "clicks": rng.binomial(impressions.astype(int), 0.1).astype(np.float32),
        "impressions": impressions,
    }
    assert training.taken(arrays, np.ones(2), 1.0, rng) is arrays
    found = training.taken(arrays, np.array([0.25, 1.0]), 1.0, rng)
    old = found["month"] == 0
    assert old.sum() == pytest.approx(5000, rel=0.05) and (~old).sum() == 20_000 and "offset" not in found
    # A row that is taken stands for those that are not.
    for name in ("clicks", "impressions"):
        np.testing.assert_array_equal(found[name], arrays[name][found["number"]] * np.where(old, 4, 1))
    again = training.taken(arrays, np.array([0.25, 1.0]), 1.0, rng)
    assert set(again["number"][again["month"] == 0].tolist()) != set(found["number"][old].tolist())
    thinned = training.taken(arrays, np.ones(2), 0.2, rng)
    assert thinned["clicks"].sum() == arrays["clicks"].sum() and (thinned["impressions"] >= thinned["clicks"]).all()
    without = arrays["impressions"].sum() - arrays["clicks"].sum()
    assert thinned["impressions"].sum() - thinned["clicks"].sum() == pytest.approx(0.2 * without, rel=0.02)
    # What is fitted is the model's log-odds and this, so the model's own are those of all impressions.
    np.testing.assert_allclose(thinned["offset"], -np.log(0.2), rtol=1e-6)
