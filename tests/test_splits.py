"""Which rows are held out: a tenth and a tenth, always the same ones, and the gate above all."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from model.splits import GATE, TRAIN, TUNE, split_of_creatives, split_of_rows

KEYS = pa.array([f"ad-{n:09d}" for n in range(40_000)])
CREATIVES = pa.array([hashlib.sha256(b"%d" % n).hexdigest() for n in range(40_000)])
NONE = pa.nulls(len(KEYS), pa.string())


def shares(split: np.ndarray) -> list[float]:
    return [float((split == part).mean()) for part in (GATE, TUNE, TRAIN)]


@pytest.mark.parametrize("split", [split_of_rows(KEYS, NONE), split_of_creatives(CREATIVES)], ids=["keys", "creatives"])
def test_a_tenth_of_each_is_the_gate_s_and_a_tenth_is_for_tuning(split: np.ndarray) -> None:
    assert split.dtype == np.int8
    assert shares(split) == pytest.approx([0.1, 0.1, 0.8], abs=0.01)


def test_key_and_creative_are_drawn_independently() -> None:
    # Neither is the gate's: 0.9²; neither is held out at all: 0.8².
    assert shares(split_of_rows(KEYS, CREATIVES)) == pytest.approx([0.19, 0.17, 0.64], abs=0.01)
    assert shares(split_of_rows(CREATIVES, CREATIVES)) == pytest.approx([0.19, 0.17, 0.64], abs=0.01)


def test_the_gate_wins_over_tuning_and_tuning_over_training() -> None:
    by_key, by_creative = split_of_rows(KEYS, NONE), split_of_creatives(CREATIVES)
    both = split_of_rows(KEYS, CREATIVES)
    assert (both[(by_key == GATE) | (by_creative == GATE)] == GATE).all()
    neither = (by_key != GATE) & (by_creative != GATE)
    assert (both[neither & ((by_key == TUNE) | (by_creative == TUNE))] == TUNE).all()
    assert (both[(by_key == TRAIN) & (by_creative == TRAIN)] == TRAIN).all()
    assert {(k, c) for k, c in zip(by_key.tolist(), by_creative.tolist(), strict=True)} == {(k, c) for k in range(3) for c in range(3)}


def test_a_row_without_a_creative_goes_by_its_key() -> None:
    some = pa.array([creative if n % 2 else None for n, creative in enumerate(CREATIVES.to_pylist())], pa.string())
    expected = np.where(np.arange(len(KEYS)) % 2, split_of_rows(KEYS, CREATIVES), split_of_rows(KEYS, NONE))
    assert (split_of_rows(KEYS, some) == expected).all()


def test_a_row_s_part_does_not_depend_on_the_rows_beside_it() -> None:
    order = np.random.default_rng(0).permutation(len(KEYS))[:5_000]
    taken = pa.array(order)
    assert (split_of_rows(KEYS.take(taken), CREATIVES.take(taken)) == split_of_rows(KEYS, CREATIVES)[order]).all()
    assert (split_of_rows(KEYS.slice(100, 50), CREATIVES.slice(100, 50)) == split_of_rows(KEYS, CREATIVES)[100:150]).all()


def test_no_row_has_no_part() -> None:
    assert len(split_of_rows(KEYS[:0], CREATIVES[:0])) == 0


def test_a_row_s_part_never_changes() -> None:
    assert split_of_rows(KEYS[:30], NONE[:30]).tolist() == [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        2,
        0,
        0,
        1,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        0,
    ]
    assert split_of_creatives(CREATIVES[:30]).tolist() == [
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        2,
        0,
        0,
        2,
        2,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        2,
        0,
        0,
        0,
        0,
        0,
        0,
        2,
        0,
    ]
