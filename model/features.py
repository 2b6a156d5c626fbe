"""From a joined batch to the numbers a model sees: one preprocessing, used by training and scoring alike.

A *joined batch* is a `pyarrow.RecordBatch` of rows with their image: `key` (string), the contract's kept columns by name (null is
missing), `creative` (string, null where the row has no usable image) and `embedding` (FixedSizeList<float32>[D], null where none).
Nothing here looks at a row at a time, and nothing but `outcomes` looks at an outcome.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model import splits
from schemas import contract as contracts
from schemas.contract import Column, Contract
from schemas.hashing import hash64_column, salted

# What a model is given, by name, all of one length; in training `clicks`, `impressions` and perhaps `offset` are beside the inputs.
Arrays = dict[str, np.ndarray]

MISSING, UNKNOWN, FIRST_HASHED = 0, 1, 2
QUANTILES = 64
# Ids a value that was seen, so that a new value seldom gets the id of another.
HEADROOM = 4
MIN_BUCKETS, MAX_BUCKETS, MAX_CREATIVE_BUCKETS = 1 << 6, 1 << 15, 1 << 20
# Distinct values are counted by linear counting (Whang et al. 1990) in a bitmap of this many bits per column.
_BITMAP = 1 << 18
_POSITION_KNOTS = 12


def outcomes(batch: pa.RecordBatch, contract: Contract) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and impressions of each row, two float32 arrays of shape (rows,); impressions are 0 where the row is unlabelled."""
    if contract.clicked:
        clicked = batch[contract.clicked.name]
        return _filled(clicked).clip(0, 1), pc.is_valid(clicked).to_numpy(zero_copy_only=False).astype(np.float32)
    if not (contract.clicks and contract.impressions):
        return np.zeros(len(batch), np.float32), np.zeros(len(batch), np.float32)
    clicks, impressions = batch[contract.clicks.name], batch[contract.impressions.name]
    known = pc.is_valid(clicks).to_numpy(zero_copy_only=False)
    shown = np.where(known, _filled(impressions).clip(0), 0).astype(np.float32)
    return np.minimum(_filled(clicks).clip(0), shown), shown


def learnable(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, np.ndarray]:
    """The batch without its gate rows, and TRAIN or TUNE for each row left, shape (rows,), dtype int8.

    Whatever is fitted passes its batches through here first, so that a gate row's outcome is gone before anything could read it.
    """
    split = splits.split_of_rows(batch["key"], batch["creative"])
    keep = split != splits.GATE
    return batch.filter(pa.array(keep)), split[keep]


@dataclasses.dataclass(frozen=True)
class Features:
    """What is fixed when a model is first trained, and stays so while it is refreshed.

    Attributes:
        contract: the columns.
        buckets: ids of each categorical column, the reserved ids included; in the order of `categoricals`.
        boundaries: for each column of `numerics`, values in ascending order and the place in [-1, 1] that each is mapped to.
        knots: positions between which the position's effect is linear, ascending; empty without a position column.
        embedding_width: D, the width of an image embedding; 0 for a model that sees no image.
        creative_buckets: ids of the creative itself, the reserved ids included; 0 for a model that sees no image.
    """

    contract: Contract
    buckets: tuple[int, ...]
    boundaries: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    knots: tuple[float, ...]
    embedding_width: int
    creative_buckets: int

    @property
    def categoricals(self) -> tuple[Column, ...]:
        return tuple(column for column in self.contract.features if column.categorical)

    @property
    def numerics(self) -> tuple[Column, ...]:
        return tuple(column for column in self.contract.features if not column.categorical)

    @property
    def widths(self) -> dict[str, int]:
        """Columns of each array that `arrays` returns."""
        widths = {"categorical": len(self.categoricals), "numeric": 2 * len(self.numerics)}
        widths |= {"position": len(self.knots) + 1} if self.contract.position else {}
        widths |= {"embedding": self.embedding_width, "has_image": 1, "creative": 1} if self.embedding_width else {}
        # Where there is nothing else to learn from, a constant stands in.
        widths |= {} if widths["categorical"] or widths["numeric"] or self.embedding_width else {"constant": 1}
        return {name: width for name, width in widths.items() if width}

    def arrays(self, batch: pa.RecordBatch, at_reference: bool) -> Arrays:
        """The model's inputs.

        Args:
            batch: a joined batch; its outcome columns are not looked at and may be absent.
            at_reference: take every row's position as the contract's reference position, as scoring does.

        Returns:
            categorical: int32 (rows, categoricals): 0 is missing, 1 is kept for values that training hides, others are hashed.
            numeric: float32 (rows, 2 x numerics): the values in [-1, 1], then 1 where missing (its value is 0 then).
            position: float32 (rows, knots + 1): weights of the two knots beside the position, then 1 where it is missing;
                a position outside the knots counts as the nearest. Absent without a position column.
            embedding: float32 (rows, D), zeros where there is no image; absent where D is 0, and so is
            has_image: float32 (rows, 1), and
            creative: int32 (rows, 1), hashed like a categorical; for what no image shows of a creative that was seen in training.
        """
        out: Arrays = {}
        if self.buckets:
            columns = zip(self.categoricals, self.buckets, strict=True)
            out["categorical"] = np.stack([_ids(batch[c.name], c.name, buckets) for c, buckets in columns], axis=1)
        if self.boundaries:
            values = [_numbers(batch[column.name]) for column in self.numerics]
            scaled = [np.interp(v, *bounds) for v, bounds in zip(values, self.boundaries, strict=True)]
            missing = np.stack([np.isnan(v) for v in values], axis=1)
            numeric = np.where(missing, 0, np.stack(scaled, axis=1))
            out["numeric"] = np.concatenate([numeric, missing], axis=1, dtype=np.float32)
        if position := self.contract.position:
            at = np.full(len(batch), position.reference) if at_reference else _numbers(batch[position.name])
            out["position"] = _hats(at, self.knots)
        if self.embedding_width:
            out |= _images(batch, self.embedding_width)
            out["creative"] = _ids(batch["creative"], "creative", self.creative_buckets)[:, None]
        if "constant" in self.widths:
            out["constant"] = np.ones((len(batch), 1), np.float32)
        return out

    def to_json(self) -> str:
        plain = dataclasses.asdict(self) | {"contract": contracts.dumps(self.contract)}
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> "Features":
        plain = json.loads(text)
        return cls(
            contract=contracts.parse(plain["contract"]),
            buckets=tuple(plain["buckets"]),
            boundaries=tuple((tuple(values), tuple(places)) for values, places in plain["boundaries"]),
            knots=tuple(plain["knots"]),
            embedding_width=plain["embedding_width"],
            creative_buckets=plain["creative_buckets"],
        )


class Fitter:
    """Fits `Features` to a stream of batches in bounded memory; the same batches in the same order give the same spec."""

    def __init__(self, contract: Contract, embedding_width: int) -> None:
        from tfx_bsl.sketches import QuantilesSketch

        self._contract, self._width = contract, embedding_width
        empty = Features(contract, (), (), (), 0, 0)
        self._categoricals, self._numerics = empty.categoricals, empty.numerics
        # The last is the creative's.
        self._seen = np.zeros((len(self._categoricals) + 1, _BITMAP), bool)
        places = (*self._numerics, contract.position) if contract.position else self._numerics
        self._sketches = {column.name: QuantilesSketch(1e-3, 1 << 40, 1) for column in places}

    def add(self, batch: pa.RecordBatch) -> None:
        """Take in feature values: TRAIN rows, labelled or not. No outcome is looked at."""
        for seen, name in zip(self._seen, (*(column.name for column in self._categoricals), "creative"), strict=True):
            seen[_hashes(_texts(batch[name]).dictionary, name) % np.uint64(_BITMAP)] = True
        for name, sketch in self._sketches.items():
            values = _numbers(batch[name])
            sketch.AddValues(pa.array(values[np.isfinite(values)]))

    def fit(self) -> Features:
        full = np.minimum(self._seen.sum(axis=1), _BITMAP - 1)
        *distinct, creatives = -_BITMAP * np.log1p(-full / _BITMAP)
        buckets = tuple(_power_of_two(HEADROOM * count, MIN_BUCKETS, MAX_BUCKETS) for count in distinct)
        creative_buckets = _power_of_two(HEADROOM * creatives, MIN_BUCKETS, MAX_CREATIVE_BUCKETS) if self._width else 0
        knots: tuple[float, ...] = ()
        if position := self._contract.position:
            values = np.unique(self._quantiles(position.name, 4 * QUANTILES))
            if len(values) > _POSITION_KNOTS:
                values = np.unique(self._quantiles(position.name, _POSITION_KNOTS - 1))
            knots = tuple(values.tolist())
        boundaries = tuple(_places(self._quantiles(column.name, QUANTILES)) for column in self._numerics)
        return Features(self._contract, buckets, boundaries, knots, self._width, creative_buckets)

    def _quantiles(self, name: str, count: int) -> np.ndarray:
        values = self._sketches[name].GetQuantiles(count).flatten().to_numpy(zero_copy_only=False)
        return np.sort(values[np.isfinite(values)]) if len(values) and np.isfinite(values).any() else np.zeros(1)


def fit(batches: Iterable[pa.RecordBatch], contract: Contract, embedding_width: int) -> Features:
    """`Features` of the TRAIN rows of these batches."""
    fitter = Fitter(contract, embedding_width)
    for batch in batches:
        rows, split = learnable(batch)
        fitter.add(rows.filter(pa.array(split == splits.TRAIN)))
    return fitter.fit()


def minibatches(blocks: Iterable[Arrays], size: int, pool: int, rng: np.random.Generator | None) -> Iterator[Arrays]:
    """Cut blocks of any length into batches of `size` rows, shuffled within pools of at least `pool` rows if `rng` is given.

    The last batch is filled up with its own rows again, of 0 clicks and 0 impressions, so that they weigh nothing.
    """
    held: list[Arrays] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(next(iter(block.values())))
        if count >= max(pool, size):
            whole = _joined(held, rng)
            for start in range(0, count - size + 1, size):
                yield {name: array[start : start + size] for name, array in whole.items()}
            held = [{name: array[count - count % size :] for name, array in whole.items()}]
            count %= size
    if count:
        whole = _joined(held, rng)
        for start in range(0, count, size):
            rows = min(size, count - start)
            part = {name: array[start + np.arange(size) % rows] for name, array in whole.items()}
            for name in part.keys() & {"clicks", "impressions"}:
                part[name][rows:] = 0
            yield part


def _joined(blocks: list[Arrays], rng: np.random.Generator | None) -> Arrays:
    whole = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    if rng is None:
        return whole
    order = rng.permutation(len(next(iter(whole.values()))))
    return {name: array[order] for name, array in whole.items()}


@dataclasses.dataclass
class Survey:
    """What one pass over the window finds: counts of labelled TRAIN rows, and the features' spec."""

    features: Features
    rows: int
    clicks: float
    impressions: float

    @property
    def base_rate(self) -> float:
        return min(max(self.clicks / self.impressions, 1e-6), 1 - 1e-6)


def survey(batches: Iterable[pa.RecordBatch], contract: Contract, embedding_width: int, features: Features | None) -> Survey:
    """Count the labelled TRAIN rows and, unless `features` are given, fit them to the TRAIN rows.

    Raises:
        ValueError: no click or only clicks among them.
    """
    fitter = None if features else Fitter(contract, embedding_width)
    rows, clicks, impressions = 0, 0.0, 0.0
    for batch in batches:
        kept, split = learnable(batch)
        train = kept.filter(pa.array(split == splits.TRAIN))
        some_clicks, some_impressions = outcomes(train, contract)
        rows += int(np.count_nonzero(some_impressions))
        clicks += float(some_clicks.sum(dtype=np.float64))
        impressions += float(some_impressions.sum(dtype=np.float64))
        if fitter:
            fitter.add(train)
    if not 0 < clicks < impressions:
        raise ValueError(
            f"{clicks:,.0f} clicks in {impressions:,.0f} impressions of {rows:,} labelled rows to learn from; "
            "expected at least one click and one impression without: are these the right months, and are their outcomes filled in?"
        )
    return Survey(features or (fitter.fit() if fitter else Features(contract, (), (), (), 0, 0)), rows, clicks, impressions)


def _places(quantiles: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Distinct quantiles and their mean rank, scaled to [-1, 1]: a value that fills many quantiles sits in their middle."""
    values, inverse = np.unique(quantiles, return_inverse=True)
    ranks = np.bincount(inverse, np.linspace(-1, 1, len(quantiles))) / np.bincount(inverse)
    return tuple(values.tolist()), tuple((ranks if len(values) > 1 else np.zeros(1)).tolist())


def _power_of_two(least: float, low: int, high: int) -> int:
    return int(np.clip(1 << int(np.ceil(np.log2(max(least, 1)))), low, high))


def _filled(column: pa.Array) -> np.ndarray:
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.float32)


def _numbers(column: pa.Array) -> np.ndarray:
    """float64 (rows,), NaN where missing."""
    return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)


def _texts(column: pa.Array) -> pa.DictionaryArray:
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return pa.DictionaryArray.from_arrays(coded.indices, coded.dictionary.cast(pa.string()))


def _hashes(texts: pa.Array, name: str) -> np.ndarray:
    # Salted by the column's name, so that two columns of the same values do not collide alike.
    return hash64_column(texts, salted(name))


def _ids(column: pa.Array, name: str, buckets: int) -> np.ndarray:
    """int32 (rows,)."""
    coded = _texts(column)
    hashed = FIRST_HASHED + _hashes(coded.dictionary, name) % np.uint64(buckets - FIRST_HASHED)
    # A null's index is filled with that of the entry behind the last.
    ids = np.append(hashed.astype(np.int32), np.int32(MISSING))
    return ids[pc.fill_null(coded.indices, len(hashed)).to_numpy(zero_copy_only=False)]


def _hats(values: np.ndarray, knots: tuple[float, ...]) -> np.ndarray:
    """Piecewise-linear basis, float32 (rows, knots + 1); the last column is 1 where the value is missing."""
    out = np.zeros((len(values), len(knots) + 1), np.float32)
    missing = np.isnan(values)
    place = np.interp(np.where(missing, knots[0], values), knots, np.arange(len(knots)))
    left = np.minimum(place.astype(np.int64), max(len(knots) - 2, 0))
    rows = np.arange(len(values))
    out[rows, left] = 1 - (place - left)
    if len(knots) > 1:
        out[rows, left + 1] = place - left
    out[missing] = 0
    out[:, -1] = missing
    return out


def _images(batch: pa.RecordBatch, width: int) -> Arrays:
    """Embeddings and whether there is one; a batch without the column has none."""
    if "embedding" not in batch.schema.names:
        return {"embedding": np.zeros((len(batch), width), np.float32), "has_image": np.zeros((len(batch), 1), np.float32)}
    column = batch["embedding"]
    if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != width:
        raise ValueError(f"embedding column has type {column.type}; expected fixed_size_list<float>[{width}]: another encoder's?")
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.values.slice(column.offset * width, len(column) * width).to_numpy(zero_copy_only=False)
    embedding = np.where(valid[:, None], values.reshape(len(column), width), 0).astype(np.float32)
    return {"embedding": embedding, "has_image": valid[:, None].astype(np.float32)}
