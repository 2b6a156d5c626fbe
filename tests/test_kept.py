"""What is kept is read again as it was, in another order each time, and nothing is kept where there is no room."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from model import kept, splits
from model.features import Fitter, learnable
from model.kept import read_once
from schemas.contract import Column, Contract

BATCHES = [pa.record_batch({"a": [i, i + 1, i + 2], "b": [f"b{i}", None, ""]}) for i in range(0, 30, 3)]
CONTRACT = Contract(
    (
        Column("ad", "bytes", frozenset({"key"}), required=True),
        Column("clicks", "int", frozenset({"clicks"})),
        Column("impressions", "int", frozenset({"impressions"})),
    )
)


def test_batches_come_again_as_they_were_and_in_another_order() -> None:
    orders = []
    with kept.kept() as held:
        for batch in BATCHES:
            held.put(batch)
        for seed in range(3):
            again = held.again(np.random.default_rng(seed))
            assert again is not None
            found = list(again)
            assert all(batch.equals(BATCHES[batch["a"][0].as_py() // 3]) for batch in found)
            orders.append(tuple(batch["a"][0].as_py() for batch in found))
    assert all(sorted(order) == list(range(0, 30, 3)) for order in orders) and len(set(orders)) == 3


def test_half_of_the_disk_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2_000}))
    with kept.kept() as held:
        held.put(BATCHES[0])
        assert held.again(np.random.default_rng(0)) is not None
        for batch in BATCHES:
            held.put(batch)
        assert held.again(np.random.default_rng(0)) is None and not held._file.seek(0, 2)


def test_arrays_come_again_as_they_were() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "categorical": rng.integers(0, 9, (5, 3)).astype(np.int32),
        "embedding": rng.standard_normal((5, 4), np.float32),
        "clicks": rng.random(5).astype(np.float32),
        "month": np.arange(5, dtype=np.int32),
    }
    with kept.kept() as held:
        held.put(arrays)
        (found,) = held.again(rng) or ()
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_codes_of_texts_and_of_numbers_give_the_same_arrays() -> None:
    columns = (Column("shop", "int", frozenset({"categorical"})), Column("place", "bytes"), *CONTRACT.columns)
    contract, rng = Contract(columns), np.random.default_rng(0)
    rows = {"shop": rng.integers(0, 5, 600), "place": rng.choice(["a", "b", None], 600), "creative": rng.choice(["c", "d", None], 600)}
    batch = pa.record_batch({"key": [f"k{i}" for i in range(600)], **rows, "clicks": [1] * 600, "impressions": [7] * 600})
    fitter = Fitter(contract, 4)
    fitter.add(batch, batch)
    features = fitter.fit()
    plain, _ = learnable(batch)
    with read_once(lambda epoch: iter([batch]), contract) as once:
        for _ in range(2):
            (again,) = once(0)
            assert pa.types.is_dictionary(again["place"].type) and pa.types.is_dictionary(again["creative"].type)
            expected = features.arrays(plain, at_reference=False)
            found = features.arrays(learnable(again)[0], at_reference=False)
            assert list(found) == list(expected)
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[name])
            of_codes = Fitter(contract, 4)
            of_codes.add(again, again)
            assert of_codes.fit().to_json() == features.to_json()


@pytest.mark.parametrize("room", [True, False])
def test_the_lake_is_read_once_unless_there_is_no_room(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    if not room:
        monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    epochs = list[int]()
    keys = [f"k{i}" for i in range(400)]
    columns = {"key": keys, "clicks": [0, None] * 200, "impressions": [7, None] * 200, "creative": pa.nulls(400, pa.string())}
    lake = pa.record_batch(columns)

    def examples(epoch: int) -> Iterator[pa.RecordBatch]:
        epochs.append(epoch)
        yield from (lake.slice(start, 100) for start in range(0, 400, 100))

    def found(batches: Iterator[pa.RecordBatch]) -> dict[str, int]:
        return {key: split for rows, of in map(learnable, batches) for key, split in zip(rows["key"].to_pylist(), of.tolist(), strict=True)}

    plain = found(examples(0))
    assert splits.GATE not in plain.values() and len(plain) < 400
    with read_once(examples, CONTRACT) as once:
        assert found(once(0)) == plain
        for epoch in (0, 1):
            assert found(once(epoch)) == ({key: split for key, split in plain.items() if int(key[1:]) % 2 == 0} if room else plain)
    assert epochs == ([0, 0] if room else [0, 0, 0, 1])
