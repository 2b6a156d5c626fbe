"""Columns that give the outcome away, found before a model is trained on them.

A column leaks if it alone removes over half of the normalized entropy, or if its being missing tells labelled rows from unlabelled ones.
Both are judged by coarse values: a category itself, or the sign and the power of two of a number.
"""

import numpy as np
import pyarrow as pa

from model.seen import Tally, hashes_of_rows
from schemas.contract import Contract

_MOST_REMOVED, _MOST_TOLD = 0.5, 0.5
_ENOUGH_CLICKS, _ENOUGH_ROWS = 100, 100
_PRIOR = 2.0


class LeakageError(ValueError):
    """A feature that would not be known when an ad is scored."""


class Guard:
    """Takes in the TRAIN rows of the window, in bounded memory; `check` then names the first column that leaks."""

    def __init__(self, contract: Contract) -> None:
        self._columns = [column for column in contract.features if "allow" not in column.tags]
        # What half of the keys say of a value is judged on the others, or a name that each row has to itself would seem to tell all.
        self._tallies = {column.name: (Tally(), Tally()) for column in self._columns}
        # Rows by labelled (no, yes) and missing (no, yes).
        self._missing = {column.name: np.zeros((2, 2)) for column in self._columns}

    def add(self, rows: pa.RecordBatch, clicks: np.ndarray, impressions: np.ndarray) -> None:
        labelled = impressions > 0
        half = hashes_of_rows(rows["key"], "guard") % np.uint64(2) == 0
        for column in self._columns:
            missing = rows[column.name].is_null().to_numpy(zero_copy_only=False)
            counts = np.bincount(2 * labelled + missing, minlength=4).reshape(2, 2)
            self._missing[column.name] += counts
            values = hashes_of_rows(rows[column.name], column.name) if column.categorical else _coarse(rows[column.name])
            self._tallies[column.name] = tuple(  # type: ignore[assignment]
                tally.plus(values[use], clicks[use], impressions[use])
                for tally, use in zip(self._tallies[column.name], (labelled & half, labelled & ~half), strict=True)
            )

    def check(self) -> None:
        """Raises: LeakageError."""
        for column in self._columns:
            counts = self._missing[column.name]
            if counts.sum(axis=1).min() >= _ENOUGH_ROWS:
                share = counts[:, 1] / counts.sum(axis=1)
                if abs(share[1] - share[0]) > _MOST_TOLD:
                    raise LeakageError(
                        f"column {column.name!r} is missing in {share[1]:.0%} of labelled and {share[0]:.0%} of unlabelled rows, so it is "
                        "known only with the outcome; tag it 'ignore' in the contract, or 'allow' if ads to be scored have it"
                    )
            removed = _removed(*self._tallies[column.name])
            if removed > _MOST_REMOVED:
                raise LeakageError(
                    f"column {column.name!r} alone removes {removed:.0%} of the normalized entropy of clicks, so it looks like an outcome; "
                    "tag it 'ignore' in the contract, or 'allow' if it is known before an ad is shown"
                )


def _coarse(column: pa.Array) -> np.ndarray:
    """uint64 (rows,): sign, exponent and the first four bits of the mantissa, so that whole numbers up to 32 are apart; 0 for missing."""
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    # Zero has two signs.
    code = ((values + 0.0).view(np.uint64) >> np.uint64(48)) + np.uint64(1)
    return np.where(np.isnan(values), np.uint64(0), code)


def _removed(one: Tally, other: Tally) -> float:
    """Share of the normalized entropy that is gone when each half's rows are given the click rate that their value has in the other."""
    loss = entropy = total = 0.0
    for train, judged in ((one, other), (other, one)):
        clicks, impressions = judged.clicks.astype(np.float64), judged.impressions.astype(np.float64)
        if not 0 < train.clicks.sum() < train.impressions.sum():
            return 0.0
        base = float(train.clicks.sum(dtype=np.float64) / train.impressions.sum(dtype=np.float64))
        known_clicks, known_impressions = train.of(judged.hashes)
        rate = (known_clicks + _PRIOR * base) / (known_impressions + _PRIOR)
        loss -= float((clicks * np.log(rate) + (impressions - clicks) * np.log1p(-np.minimum(rate, 1 - 1e-9))).sum())
        entropy -= float((clicks * np.log(base) + (impressions - clicks) * np.log1p(-base)).sum())
        total += float(clicks.sum())
    return 1 - loss / entropy if total >= _ENOUGH_CLICKS else 0.0
