"""A column that tells the outcome is refused by name, one that merely says a lot is not, and the contract has the last word."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from model.leakage import Guard, LeakageError
from schemas.contract import Column, Contract

ROWS = 20_000
KEY, CLICKED = Column("ad", "bytes", frozenset({"key"}), True), Column("clicked", "int", frozenset({"clicked"}))


def check(column: Column, values: pa.Array, clicked: np.ndarray, labelled: np.ndarray) -> None:
    guard = Guard(Contract((KEY, CLICKED, column)))
    batch = pa.RecordBatch.from_pydict({"key": [f"k{i}" for i in range(ROWS)], column.name: values})
    for start in range(0, ROWS, 6000):
        part = slice(start, start + 6000)
        shown = labelled[part].astype(np.float32)
        guard.add(batch.slice(start, 6000), clicked[part].astype(np.float32) * shown, shown)
    guard.check()


@pytest.fixture(scope="module")
def outcome() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random(ROWS) < 0.1, rng.random(ROWS) < 0.9


def test_what_leaks_is_refused_by_name(outcome: tuple[np.ndarray, np.ndarray]) -> None:
    clicked, labelled = outcome
    rng = np.random.default_rng(1)
    revenue = pa.array(np.where(clicked, rng.lognormal(size=ROWS), 0.0))
    for column, values, told in (
        (Column("revenue", "float"), revenue, "'revenue' alone removes"),
        (Column("state", "bytes"), pa.array(np.where(clicked, "converted", "open")), "'state' alone removes"),
        (Column("status", "int"), pa.array(np.where(clicked, 3, 2)), "'status' alone removes"),
        (Column("share", "float"), pa.array(np.where(clicked, -0.9, -0.6)), "'share' alone removes"),
        (Column("landed", "float"), pa.array(rng.random(ROWS), mask=~labelled), "'landed' is missing in 0% of labelled and 100% of"),
    ):
        with pytest.raises(LeakageError, match=told):
            check(column, values, clicked, labelled)
        check(dataclasses.replace(column, tags=frozenset({"allow"})), values, clicked, labelled)


def test_what_says_a_lot_is_no_leak(outcome: tuple[np.ndarray, np.ndarray]) -> None:
    clicked, labelled = outcome
    rng = np.random.default_rng(2)
    check(Column("good", "bytes"), pa.array(np.where(clicked ^ (rng.random(ROWS) < 0.1), "yes", "no")), clicked, labelled)
    # A name of each row's own tells nothing, though in hindsight it would tell all.
    check(Column("own", "bytes"), pa.array([f"n{i}" for i in range(ROWS)]), clicked, labelled)
    check(Column("odd", "float"), pa.array(rng.normal(size=ROWS), mask=rng.random(ROWS) < 0.5), clicked, labelled)
