"""What training saw of each value, known by its 64-bit hash: an id of its own for a category, and the months' outcomes behind history.

Both are exact up to a bound on their size, past which values are left out and so count as never seen; nothing is mixed into another's.
"""

import base64
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.hashing import hash64_column, salted

MISSING, UNKNOWN, FIRST_ID = 0, 1, 2
MAX_VALUES = 1 << 20
# Expected clicks that a value is taken to have had at the base rate before anything is known of it.
_PRIOR_CLICKS = 5.0
_ROWS_AT_ONCE = 1 << 19
_CACHED = 1 << 16
# Of so many rows, the share that may have a value of their own in a column that is taken to repeat its values.
_SAMPLE_ROWS, _DISTINCT = 1000, 0.9
# What a history is of in any case, before the columns tagged so; and how many columns of `History.arrays` are of these, the first ones.
ALWAYS = ("key", "creative")
OF_KEY_AND_CREATIVE = 2 * len(ALWAYS)


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The values of a column and their ids, with room for values that later months bring.

    Attributes:
        hashes: of the values, uint64, in ascending order.
        order: their ids, int32.
        size: ids there may be; those not given out yet are there for growth.
    """

    hashes: np.ndarray
    order: np.ndarray
    size: int

    @classmethod
    def of(cls, hashes: np.ndarray) -> "Vocabulary":
        """Of sorted distinct hashes."""
        size = 1 << int(np.ceil(np.log2(max(1.5 * len(hashes) + FIRST_ID, 32))))
        return cls(hashes, np.arange(FIRST_ID, FIRST_ID + len(hashes), dtype=np.int32), size)

    def grown(self, hashes: np.ndarray) -> tuple["Vocabulary", np.ndarray]:
        """With those of the sorted distinct hashes that are new; and their ids.

        Where ids run out, those of values that are not among the hashes are given out again; what finds no room even so is left out.
        """
        new, gone = np.setdiff1d(hashes, self.hashes, assume_unique=True), ~np.isin(self.hashes, hashes)
        if len(hashes) == MAX_VALUES:
            # Those with higher hashes were left out, and may be there.
            gone &= self.hashes < hashes[-1]
        room = self.size - FIRST_ID - len(self.hashes)
        new = new[: room + np.count_nonzero(gone)]
        freed = np.flatnonzero(gone)[: max(len(new) - room, 0)]
        unused = np.arange(FIRST_ID + len(self.hashes), FIRST_ID + len(self.hashes) + len(new) - len(freed), dtype=np.int32)
        ids = np.concatenate([unused, self.order[freed]])
        both, all_ids = np.concatenate([np.delete(self.hashes, freed), new]), np.concatenate([np.delete(self.order, freed), ids])
        order = np.argsort(both)
        return Vocabulary(both[order], all_ids[order], self.size), ids

    def ids(self, column: pa.Array, name: str) -> np.ndarray:
        """int32 (rows,): MISSING for a null, UNKNOWN for a value that is not among them."""
        hashes, rows = _coded(column, name)
        known, place = among(self.hashes, hashes)
        ids = np.where(known, self.order[place] if len(self.order) else UNKNOWN, UNKNOWN).astype(np.int32)
        return np.append(ids, np.int32(MISSING))[rows]

    def plain(self) -> dict[str, Any]:
        return {"packed": _text(self.hashes), "order": _text(self.order), "size": self.size}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Vocabulary":
        return cls(_array(plain["packed"], "<u8"), _array(plain["order"], "<i4"), plain["size"])


class Tally(NamedTuple):
    """Clicks and impressions of a column's values in one month, float32, beside their sorted hashes."""

    hashes: np.ndarray = np.empty(0, np.uint64)
    clicks: np.ndarray = np.empty(0, np.float32)
    impressions: np.ndarray = np.empty(0, np.float32)

    def plus(self, hashes: np.ndarray, clicks: np.ndarray, impressions: np.ndarray) -> "Tally":
        """With more rows; past `MAX_VALUES` the values with the fewest impressions are dropped."""
        values, inverse = np.unique(np.concatenate([self.hashes, hashes]), return_inverse=True)
        pairs = ((self.clicks, clicks), (self.impressions, impressions))
        sums = [np.bincount(inverse, np.concatenate(pair), len(values)) for pair in pairs]
        keep = np.sort(np.argsort(-sums[1], kind="stable")[:MAX_VALUES])
        return Tally(values[keep], *(total[keep].astype(np.float32) for total in sums))

    def of(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clicks and impressions of each, 0 for one that is not there."""
        known, clicks, impressions = self
        there, place = among(known, hashes)
        return (np.where(there, clicks[place], 0), np.where(there, impressions[place], 0)) if len(known) else (there * 0.0, there * 0.0)


class Tallies:
    """Tallies of months as rows come. Adding rows up sorts all values, so it is done for many rows at a time."""

    def __init__(self, names: tuple[str, ...]):
        self._names, self._months = names, dict[int, tuple[Tally, ...]]()
        self._held, self._rows = dict[int, list[list[tuple[np.ndarray, ...]]]](), Counter[int]()

    def add(self, batch: pa.RecordBatch, month: int, clicks: np.ndarray, impressions: np.ndarray) -> None:
        """Labelled TRAIN rows of a month."""
        columns = list[tuple[np.ndarray, ...]]()
        for name in self._names:
            valid = batch[name].is_valid().to_numpy(zero_copy_only=False)
            columns.append((hashes_of_rows(batch[name], name)[valid], clicks[valid], impressions[valid]))
        self._held.setdefault(month, []).append(columns)
        self._rows[month] += len(clicks)
        if self._rows[month] >= _ROWS_AT_ONCE:
            self._add_up(month)

    def months(self) -> dict[int, tuple[Tally, ...]]:
        """By month a tally for each name, of all rows so far."""
        for month in list(self._held):
            self._add_up(month)
        return dict(self._months)

    def _add_up(self, month: int) -> None:
        before, held = self._months.get(month, (Tally(),) * len(self._names)), zip(*self._held.pop(month), strict=True)
        self._months[month] = tuple(
            tally.plus(*map(np.concatenate, zip(*parts, strict=True))) for tally, parts in zip(before, held, strict=True)
        )
        del self._rows[month]


@dataclasses.dataclass(frozen=True)
class History:
    """Outcomes of earlier months' TRAIN rows by key, creative and the columns tagged `history`.

    Attributes:
        names: `ALWAYS` and the columns, in the order of the tallies.
        months: by month (as `month_number`), a tally for each name.
        base_rate: clicks an impression that a value without history is taken to have.
    """

    names: tuple[str, ...]
    months: dict[int, tuple[Tally, ...]]
    base_rate: float

    def folded(self, first: int) -> "History":
        """With the months before `first` as one, the last of them: a model is refreshed for years, and no row that it will learn from has a
        month among those."""
        old = sorted(month for month in self.months if month < first)
        months = {month: tallies for month, tallies in self.months.items() if month >= first}
        if old:
            by_name = zip(*(self.months[month] for month in old), strict=True)
            months[old[-1]] = tuple(functools.reduce(lambda one, more: one.plus(*more), tallies) for tallies in by_name)
        return dataclasses.replace(self, months=dict(sorted(months.items())))

    def arrays(self, batch: pa.RecordBatch, month: int, evidence: bool = False) -> dict[str, np.ndarray]:
        """What the months say of each row.

        Returns:
            history: float32 (rows, 2 x names): smoothed log-odds against the base rate, and log impressions, of the months before `month`.
            evidence: where asked for, int64 (rows, 2): impressions that the row's key and its creative had in training.
        """
        history, shown = [], []
        for number, name in enumerate(self.names):
            hashes, rows = _coded(batch[name], name)
            clicks, impressions = self._sums(number, hashes, [earlier for earlier in self.months if earlier < month])
            odds = np.log((clicks + _PRIOR_CLICKS) / (impressions * self.base_rate + _PRIOR_CLICKS))
            history += [np.append(values.astype(np.float32), np.float32(0))[rows] for values in (odds, np.log1p(impressions) / 4)]
            if evidence and name in ALWAYS:
                impressions = impressions + self._sums(number, hashes, [later for later in self.months if later >= month])[1]
                shown.append(np.append(np.rint(impressions).astype(np.int64), 0)[rows])
        out = {"history": np.stack(history, axis=1)}
        return out | {"evidence": np.stack(shown, axis=1)} if evidence else out

    def _sums(self, number: int, hashes: np.ndarray, months: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Clicks and impressions of the hashes of the values of a name, float64, in some months."""
        clicks, impressions = np.zeros(len(hashes)), np.zeros(len(hashes))
        for month in sorted(months):
            more = self.months[month][number].of(hashes)
            clicks += more[0]
            impressions += more[1]
        return clicks, impressions

    def plain(self) -> dict[str, Any]:
        months = {str(month): [[_text(array) for array in tally] for tally in tallies] for month, tallies in self.months.items()}
        return {"names": self.names, "months": months, "base_rate": self.base_rate}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "History":
        kinds = ("<u8", "<f4", "<f4")
        months = {int(month): tuple(Tally(*map(_array, parts, kinds)) for parts in tallies) for month, tallies in plain["months"].items()}
        return cls(tuple(plain["names"]), months, plain["base_rate"])


def among(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of the wanted hashes is among the sorted known ones, and where."""
    if len(known) > _CACHED and (wanted[1:] < wanted[:-1]).any():
        # In order, a search finds what it reads in the caches, which takes half of the time, sorting included. Keys of rows come so.
        order, place = np.argsort(wanted), np.empty(len(wanted), np.int64)
        place[order] = np.searchsorted(known, wanted[order])
    else:
        place = np.searchsorted(known, wanted)
    place = np.minimum(place, max(len(known) - 1, 0))
    return (known[place] == wanted if len(known) else np.zeros(len(wanted), bool)), place


def coded(column: pa.Array) -> pa.Array:
    """As codes of its distinct values, or as it is where nearly all are distinct: to find that out would cost more than it spares."""
    some = column[:_SAMPLE_ROWS]
    if pa.types.is_dictionary(column.type) or len(pc.unique(some)) > _DISTINCT * len(some):
        return column
    return column.dictionary_encode()


def hashes_of(values: pa.Array, name: str) -> np.ndarray:
    """uint64; salted by the column's name, so that two columns of the same values are apart."""
    return hash64_column(values, salted(name))


def present(column: pa.Array, name: str) -> np.ndarray:
    """Hashes of the values that rows have, uint64, in any order, some of them perhaps more than once."""
    hashes, rows = _coded(column, name)
    return hashes[np.bincount(rows, minlength=len(hashes) + 1)[:-1] > 0]


def _coded(column: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of a column's values, uint64, and of each row the place of its own among them, behind the last for a null."""
    values = coded(column)
    if pa.types.is_dictionary(values.type):
        values, places = values.dictionary, values.indices
    else:
        places = pc.if_else(values.is_valid(), pa.array(np.arange(len(values))), None)
    return hashes_of(values.cast(pa.string()), name), pc.fill_null(places, len(values)).to_numpy(zero_copy_only=False)


def hashes_of_rows(column: pa.Array, name: str) -> np.ndarray:
    """uint64 (rows,): 0 for a null."""
    hashes, rows = _coded(column, name)
    return np.append(hashes, np.uint64(0))[rows]


def _text(array: np.ndarray) -> str:
    """The array's bytes, little-endian."""
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _array(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)
