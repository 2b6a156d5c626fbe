"""Each value seen has an id of its own, any other is unknown, and history is of the months before."""

import numpy as np
import pyarrow as pa
import pytest

from model.features import MONTH, outcomes
from model.seen import MISSING, UNKNOWN, History, Tallies, Tally, Vocabulary, among, coded, hashes_of, hashes_of_rows, present
from schemas import contract as contracts

VALUES = pa.array([f"v{i}" for i in range(500)])
DATED = """
feature { name: "ad" type: BYTES annotation { tag: "key" } }
feature { name: "began" type: BYTES annotation { tag: "mature_before:7" } }
feature { name: "clicks" type: INT annotation { tag: "clicks" } }
feature { name: "impressions" type: INT annotation { tag: "impressions" } }
"""


def test_no_two_values_share_an_id_and_a_new_one_is_unknown() -> None:
    vocabulary = Vocabulary.of(np.sort(hashes_of(VALUES, "x")))
    ids = vocabulary.ids(pa.concat_arrays([VALUES, pa.array([None, "new"])]), "x")
    assert len(set(ids[:500].tolist())) == 500 and ids[:500].min() > UNKNOWN and ids.max() < vocabulary.size
    assert ids[500:].tolist() == [MISSING, UNKNOWN]
    assert Vocabulary.of(np.empty(0, np.uint64)).ids(VALUES[:3], "x").tolist() == [UNKNOWN] * 3


def test_a_vocabulary_grows_without_moving_what_is_there_and_stops_when_full() -> None:
    few = Vocabulary.of(np.sort(hashes_of(VALUES[:100], "x")))
    grown, new = few.grown(np.sort(hashes_of(VALUES, "x")))
    np.testing.assert_array_equal(grown.ids(VALUES[:100], "x"), few.ids(VALUES[:100], "x"))
    more = grown.ids(VALUES[100:], "x")
    assert sorted(more[more != UNKNOWN].tolist()) == new.tolist() == list(range(102, few.size))
    assert Vocabulary.from_plain(grown.plain()).plain() == grown.plain()


def test_a_full_vocabulary_gives_ids_of_values_that_are_gone_to_new_ones() -> None:
    before = Vocabulary.of(np.sort(hashes_of(VALUES[:100], "x")))
    grown, new = before.grown(np.sort(hashes_of(VALUES[50:400], "x")))
    stayed = grown.ids(VALUES[50:100], "x")
    np.testing.assert_array_equal(stayed, before.ids(VALUES[50:100], "x"))
    gone, came = grown.ids(VALUES[:50], "x"), grown.ids(VALUES[100:400], "x")
    assert (gone != UNKNOWN).sum() == 0 and (came != UNKNOWN).sum() == before.size - 2 - 50 == len(new)
    assert sorted(came[came != UNKNOWN]) == sorted(new) and not set(new) & set(stayed)
    # Where there is room, what is gone stays: it may come again.
    assert (before.grown(np.sort(hashes_of(VALUES[50:110], "x")))[0].ids(VALUES[:50], "x") != UNKNOWN).all()


@pytest.mark.parametrize("size", [0, 1, 1000, 200_000])
def test_hashes_are_found_among_few_and_many(size: int) -> None:
    rng = np.random.default_rng(0)
    known = np.unique(rng.integers(0, 1 << 63, size).astype(np.uint64))
    wanted = np.concatenate([known[:: max(1, size // 500)], rng.integers(0, 1 << 63, 500).astype(np.uint64), known[-3:]])[::-1]
    there, place = among(known, wanted)
    np.testing.assert_array_equal(there, np.isin(wanted, known))
    np.testing.assert_array_equal(known[place[there]], wanted[there])
    assert not len(known) or ((place >= 0) & (place < len(known))).all()


def test_values_are_the_same_whether_they_come_as_codes_or_not() -> None:
    few, many = ["a", None, "b"] * 1000, [f"v{i}" for i in range(2000)] + [None]
    for values, repeats in ((few, True), (many, False), ([], True), ([None], False), ([3, 4, None, 3], True)):
        column = pa.array(values, pa.int64() if 3 in values else pa.string())
        assert pa.types.is_dictionary(coded(column).type) == repeats
        known = [str(value) for value in values if value is not None]
        by_value = dict(zip(known, hashes_of(pa.array(known, pa.string()), "x").tolist(), strict=True))
        for same in (column, column.dictionary_encode()):
            assert hashes_of_rows(same, "x").tolist() == [by_value[str(v)] if v is not None else 0 for v in values]
            assert set(present(same, "x").tolist()) == set(by_value.values())
            # A filter leaves a dictionary as it is, with values that no row has any longer.
            assert set(present(same[1:2], "x").tolist()) == ({by_value[str(values[1])]} if values[1:2] not in ([], [None]) else set())


def rows(keys: list[str], creatives: list[str | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"key": keys, "creative": pa.array(creatives, pa.string())})


def test_history_is_of_the_months_before_and_evidence_of_all() -> None:
    first, second = rows(["a", "b"], ["x", None]), rows(["a", "a"], ["x", "y"])
    tallies = Tallies(("key", "creative"))
    tallies.add(first, 10, np.array([2.0, 1.0]), np.array([20.0, 10.0]))
    tallies.add(second, 11, np.array([9.0, 0.0]), np.array([30.0, 5.0]))
    history = History(("key", "creative"), tallies.months(), 0.1)
    wanted = rows(["a", "b", "c"], ["x", None, "y"])
    assert not history.arrays(wanted, 10)["history"].any()
    at = history.arrays(wanted, 11)["history"]
    np.testing.assert_allclose(at[:, 1], np.log1p([20, 10, 0]) / 4, rtol=1e-6)
    np.testing.assert_allclose(at[0, 0], np.log(7 / 7), atol=1e-6)
    assert history.arrays(wanted, 12)["history"][0, 0] > 0
    for month in (10, 11, 12):
        assert history.arrays(wanted, month, evidence=True)["evidence"].tolist() == [[55, 50], [10, 0], [0, 5]]
    # What happens in a month leaves its own history as it was.
    tallies.add(second, 11, np.array([20.0, 5.0]), np.array([30.0, 5.0]))
    other = History(("key", "creative"), tallies.months(), 0.1)
    np.testing.assert_array_equal(other.arrays(wanted, 11)["history"], at)
    assert (other.arrays(wanted, 12)["history"] != history.arrays(wanted, 12)["history"]).any()
    assert History.from_plain(history.plain()).plain() == history.plain()


def test_months_before_the_window_are_folded_into_one() -> None:
    tallies, wanted = Tallies(("key", "creative")), rows(["a", "b", "c"], ["x", None, "y"])
    for month, clicks in ((7, 1.0), (8, 2.0), (9, 0.0), (10, 3.0)):
        tallies.add(rows(["a", "b"], ["x", "y"]), month, np.array([clicks, 1.0]), np.array([20.0, month]))
    history = History(("key", "creative"), tallies.months(), 0.1)
    folded = history.folded(9)
    assert list(folded.months) == [8, 9, 10] and history.folded(7).plain() == history.plain() == history.folded(8).plain()
    for month in (9, 10, 11):
        np.testing.assert_array_equal(folded.arrays(wanted, month)["history"], history.arrays(wanted, month)["history"])
        assert folded.arrays(wanted, month, True)["evidence"].tolist() == history.arrays(wanted, month, True)["evidence"].tolist()
    # Months that are folded have no history any more: none of what came later gets into it.
    assert not folded.arrays(wanted, 8)["history"].any()


def test_rows_are_added_up_many_at_a_time(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    keys, clicks = rng.integers(0, 9, (20, 50)).astype(str), rng.integers(0, 3, (20, 50)).astype(np.float64)
    found = []
    for at_once in (1, 120, 10_000):
        monkeypatch.setattr("model.seen._ROWS_AT_ONCE", at_once)
        tallies = Tallies(("key",))
        for number, (some, outcomes_of) in enumerate(zip(keys.tolist(), clicks, strict=True)):
            tallies.add(rows(some, [None] * 50), number % 2, outcomes_of, outcomes_of + 1)
        found.append(History(("key",), tallies.months(), 0.1))
    assert found[0].plain() == found[1].plain() == found[2].plain() and found[0].months.keys() == {0, 1}
    (tally,) = found[0].months[1]
    assert tally.clicks.sum() == clicks[1::2].sum() and tally.impressions.sum() == clicks[1::2].sum() + 500


def test_a_full_tally_keeps_the_values_with_the_most_impressions(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("model.seen.MAX_VALUES", 2)
    tally = Tally().plus(np.array([5, 6, 7, 5], np.uint64), np.zeros(4), np.array([1, 5, 3, 1]))
    assert tally.hashes.tolist() == [6, 7] and tally.impressions.tolist() == [5, 3]


def test_rows_that_are_too_young_have_no_outcome() -> None:
    contract = contracts.parse(DATED)
    assert contracts.parse(contracts.dumps(contract)) == contract and not contract.features
    columns = {"began": ["2026-12-25", "2026-12-24", None, "2026-11-30"], "clicks": [1] * 4, "impressions": [2] * 4}
    batch = pa.RecordBatch.from_pydict({**columns, MONTH: [12 * 2026 + 12] * 4})
    assert [array.tolist() for array in outcomes(batch, contract)] == [[0, 1, 0, 1], [0, 2, 0, 2]]
