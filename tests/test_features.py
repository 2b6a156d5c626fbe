import numpy as np
import pyarrow as pa
import pytest

from model import splits
from model.features import Features, Fitter, embedding_column, embedding_matrix, embedding_type, learnable, minibatches, outcomes
from model.survey import survey
from schemas.contract import Column, Contract

CONTRACT = Contract(
    (
        Column("ad_id", "bytes", frozenset({"key"}), True),
        Column("campaign", "bytes", frozenset({"allow"})),
        Column("device", "bytes", frozenset({"segment"})),
        Column("hour", "int", frozenset({"categorical", "allow"})),
        Column("bid", "float", frozenset({"allow"})),
        Column("age", "int", frozenset({"allow"})),
        Column("position", "int", frozenset({"position"}), reference=2.0),
        Column("image", "bytes", frozenset({"image"})),
        Column("impressions", "int", frozenset({"impressions"})),
        Column("clicks", "int", frozenset({"clicks"})),
    )
)
CLICKED = Contract(
    (Column("ad_id", "bytes", frozenset({"key"}), True), Column("x", "float"), Column("clicked", "int", frozenset({"clicked"})))
)


def fit(*batches: pa.RecordBatch) -> Features:
    return survey(batches, CONTRACT, 4, None).features


def joined(rows: int, width: int = 4, seed: int = 0) -> pa.RecordBatch:
    rng = np.random.default_rng(seed)
    some = rng.random(rows) < 0.2
    no_image = rng.random(rows) < 0.3
    creatives = np.array([f"{number:064x}" for number in rng.integers(0, 50, rows)], object)
    embedding = embedding_column(np.where(no_image[:, None], np.nan, rng.normal(size=(rows, width))))
    return pa.RecordBatch.from_pydict(
        {
            "key": [f"k{i}" for i in range(rows)],
            "ad_id": [f"k{i}" for i in range(rows)],
            "campaign": pa.array([f"c{i}" for i in rng.integers(0, 300, rows)], mask=some),
            "device": pa.array(rng.choice(["tv", "mobile"], rows)),
            "hour": pa.array(rng.integers(0, 24, rows), mask=some),
            "bid": pa.array(rng.lognormal(size=rows), mask=some),
            "age": pa.array(rng.integers(0, 3, rows), mask=~some),
            "position": pa.array(rng.integers(1, 7, rows), mask=rng.random(rows) < 0.1),
            "impressions": pa.array(rng.integers(0, 20, rows), mask=some),
            "clicks": pa.array(rng.integers(0, 2, rows), mask=some),
            "creative": pa.array(creatives, pa.string(), mask=no_image),
            "embedding": embedding,
        }
    )


@pytest.fixture(scope="module")
def batch() -> pa.RecordBatch:
    return joined(3000)


@pytest.fixture(scope="module")
def features(batch: pa.RecordBatch) -> Features:
    return fit(batch)


def replaced(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), name, values)


def test_unlabelled_rows_have_no_impressions() -> None:
    batch = pa.RecordBatch.from_pydict({"clicks": [1, None, 0, 3, None, 0], "impressions": [4, 5, 0, 2, None, None]})
    clicks, impressions = outcomes(batch, CONTRACT)
    assert clicks.dtype == impressions.dtype == np.float32
    assert clicks.tolist() == [1, 0, 0, 2, 0, 0]
    assert impressions.tolist() == [4, 0, 0, 2, 0, 0]


def test_a_clicked_row_is_one_impression() -> None:
    clicks, impressions = outcomes(pa.RecordBatch.from_pydict({"clicked": pa.array([1, 0, None], pa.int64())}), CLICKED)
    assert clicks.tolist() == [1, 0, 0]
    assert impressions.tolist() == [1, 1, 0]


def test_shapes_and_types(features: Features, batch: pa.RecordBatch) -> None:
    arrays = features.arrays(batch, at_reference=False)
    assert {name: array.shape[1] for name, array in arrays.items()} == features.widths
    kinds = {name: array.dtype.name for name, array in arrays.items()}
    assert {name for name, kind in kinds.items() if kind == "int32"} == {"categorical", "creative"}
    assert set(kinds.values()) == {"int32", "float32"}
    assert all(np.isfinite(array).all() and len(array) == len(batch) for array in arrays.values())
    assert arrays["categorical"].max(axis=0).tolist() < list(features.buckets)
    assert np.abs(arrays["numeric"]).max() <= 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_row_has_the_same_arrays_in_any_batch(features: Features, batch: pa.RecordBatch, size: int) -> None:
    few = batch.slice(11, 100) if size == 1 else batch
    whole = features.arrays(few, at_reference=False)
    parts = [features.arrays(few.slice(start, size), at_reference=False) for start in range(0, len(few), size)]
    order = np.random.default_rng(1).permutation(len(few))
    shuffled = features.arrays(few.take(pa.array(order)), at_reference=False)
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
        np.testing.assert_array_equal(shuffled[name], array[order])


def test_missing_values(features: Features, batch: pa.RecordBatch) -> None:
    rows = len(batch)
    for name in ("campaign", "hour", "bid", "position", "creative", "embedding"):
        batch = replaced(batch, name, pa.nulls(rows, batch.schema.field(name).type))
    arrays = features.arrays(batch, at_reference=False)
    assert (arrays["categorical"][:, [0, 2]] == 0).all()
    assert (arrays["numeric"][:, 0] == 0).all() and (arrays["numeric"][:, 2] == 1).all()
    assert (arrays["position"][:, :-1] == 0).all() and (arrays["position"][:, -1] == 1).all()
    assert not arrays["embedding"].any() and not arrays["has_image"].any() and not arrays["creative"].any()
    without = batch.drop_columns(["embedding"])
    np.testing.assert_array_equal(features.arrays(without, False)["embedding"], arrays["embedding"])


def test_new_categories_and_outliers(features: Features, batch: pa.RecordBatch) -> None:
    new = replaced(batch, "campaign", pa.array([f"new {i}" for i in range(len(batch))]))
    new = replaced(new, "bid", pa.array(np.tile([1e300, -np.inf, np.nan], len(batch) // 3)))
    arrays = features.arrays(new, at_reference=True)
    assert (arrays["categorical"][:, 0] == 1).all()
    assert arrays["numeric"][:3, 0].tolist() == [1, -1, 0]
    assert arrays["numeric"][:3, 2].tolist() == [0, 0, 1]


def test_reference_position(features: Features, batch: pa.RecordBatch) -> None:
    at_reference = features.arrays(batch, at_reference=True)
    moved = replaced(batch, "position", pa.array(np.full(len(batch), 2)))
    np.testing.assert_array_equal(at_reference["position"], features.arrays(moved, at_reference=False)["position"])
    beyond = features.arrays(replaced(batch, "position", pa.array(np.full(len(batch), 99))), at_reference=False)
    last = features.arrays(replaced(batch, "position", pa.array(np.full(len(batch), 6))), at_reference=False)
    np.testing.assert_array_equal(beyond["position"], last["position"])


def test_the_spec_survives_json(features: Features, batch: pa.RecordBatch) -> None:
    again = Features.from_json(features.to_json())
    assert again.contract.fingerprint == CONTRACT.fingerprint
    assert again.to_json() == features.to_json()
    for name, array in features.arrays(batch, False).items():
        np.testing.assert_array_equal(again.arrays(batch, False)[name], array)


def test_fit_only_sees_train_rows_and_no_outcome(features: Features, batch: pa.RecordBatch) -> None:
    held_out = splits.split_of_rows(batch["key"], batch["creative"]) != splits.TRAIN
    bids = np.where(held_out, 1e9, np.nan_to_num(batch["bid"].to_numpy(zero_copy_only=False)))
    changed = replaced(batch, "bid", pa.array(bids, mask=batch["bid"].is_null().to_numpy(zero_copy_only=False)))
    changed = replaced(changed, "clicks", pa.array(np.full(len(batch), 7)))
    assert held_out.any()
    assert fit(changed.slice(0, 1000), changed.slice(1000)).buckets == features.buckets
    assert fit(changed).to_json() == features.to_json()


def test_fit_without_values() -> None:
    fitter = Fitter(CONTRACT, 4)
    fitter.add(joined(0), joined(0))
    features = fitter.fit()
    assert all(len(array) == 5 for array in features.arrays(joined(5), True).values())


def test_learnable_drops_gate_rows(batch: pa.RecordBatch) -> None:
    kept, split = learnable(batch)
    every = splits.split_of_rows(batch["key"], batch["creative"])
    assert len(kept) == len(split) == np.count_nonzero(every != splits.GATE)
    assert set(split.tolist()) == {splits.TRAIN, splits.TUNE}


def test_another_encoders_width_is_refused(features: Features) -> None:
    with pytest.raises(ValueError, match=r"type fixed_size_binary\[12\]; expected fixed_size_binary\[16\], 4 float32"):
        features.arrays(joined(5, width=3), True)


def test_embeddings_as_a_column_and_back() -> None:
    vectors = np.arange(12, dtype=np.float64).reshape(4, 3)
    vectors[2, 1] = np.nan
    column = embedding_column(vectors)
    assert column.type == embedding_type(3) and column.is_valid().to_pylist() == [True, True, False, True]
    np.testing.assert_array_equal(embedding_matrix(column), vectors.astype(np.float32))
    np.testing.assert_array_equal(embedding_matrix(column.slice(1, 2)), vectors[1:3].astype(np.float32))
    np.testing.assert_array_equal(embedding_matrix(column.take(pa.array([3, None, 0])))[[0, 2]], vectors[[3, 0]].astype(np.float32))
    for none in (embedding_column(vectors[:0]), pa.nulls(0, embedding_type(3)), column.slice(4)):
        assert embedding_matrix(none).shape == (0, 3)
    assert embedding_matrix(pa.nulls(2, embedding_type(3))).shape == (2, 3)


def test_minibatches_lose_no_row_and_fill_the_last() -> None:
    blocks = [{"x": np.arange(n) + 10 * n, "clicks": np.ones(n)} for n in (3, 8, 0, 5)]
    batches = list(minibatches(blocks, 6, 0, np.random.default_rng(0)))
    assert [len(batch["x"]) for batch in batches] == [6, 6, 6]
    real = np.concatenate([batch["x"][batch["clicks"] > 0] for batch in batches])
    assert sorted(real) == sorted(np.concatenate([block["x"] for block in blocks]))
    assert set(batches[-1]["x"]) <= set(real)
