"""From a joined batch to the numbers a model sees: one preprocessing, used by training and scoring alike.

A *joined batch* is a `pyarrow.RecordBatch` of rows with their image: `key` (string), the contract's kept columns by name (null is
missing), `creative` (string, null where the row has no usable image) and `embedding` (as of `embedding_column`, null where none).
Nothing here looks at a row at a time, and nothing but `outcomes` looks at an outcome.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model import splits
from model.seen import MAX_VALUES, History, Vocabulary, coded, present
from schemas import contract as contracts
from schemas.contract import Contract

# What a model is given, by name, all of one length; in training `clicks`, `impressions` and perhaps `offset` are beside the inputs.
Arrays = dict[str, np.ndarray]
# From an epoch's number, the joined batches of the window in an order that only depends on that number.
Examples = Callable[[int], Iterator[pa.RecordBatch]]
# Of rows that have been through `learnable`, named as no column of a contract is.
SPLIT = "adstocrat:split"

QUANTILES = 64
# The month of a batch, as 12 x year + month, beside its columns; a batch without one counts as later than all that was learnt from.
MONTH = "month_number"
_LATER = 1 << 30
_POSITION_KNOTS = 12


def outcomes(batch: pa.RecordBatch, contract: Contract) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and impressions of each row, two float32 arrays of shape (rows,); impressions are 0 where the row is unlabelled."""
    clicks = contract.clicked or contract.clicks
    if not clicks:
        return np.zeros(len(batch), np.float32), np.zeros(len(batch), np.float32)
    known = pc.is_valid(batch[clicks.name]).to_numpy(zero_copy_only=False) & is_mature(batch, contract, month_of(batch))
    shown = known.astype(np.float32)
    if contract.impressions:
        shown *= _filled(batch[contract.impressions.name]).clip(0)
    return np.minimum(_filled(batch[clicks.name]).clip(0), shown), shown


def is_mature(rows: pa.RecordBatch | pa.Table, contract: Contract, month: int) -> np.ndarray:
    """bool (rows,): False where a row of the month is too young for its outcome to count."""
    if not contract.mature_before or month == _LATER:
        return np.ones(len(rows), bool)
    # The month's number is one that its own first day has not reached.
    last = datetime.date(month // 12, month % 12 + 1, 1) - datetime.timedelta(days=contract.mature_before.mature_days)
    return np.asarray(pc.fill_null(pc.less(rows[contract.mature_before.name], last.isoformat()), False))


def month_of(batch: pa.RecordBatch) -> int:
    return batch[MONTH][0].as_py() if len(batch) and MONTH in batch.schema.names else _LATER


def learnable(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, np.ndarray]:
    """The batch without its gate rows, and TRAIN or TUNE for each row left, shape (rows,), dtype int8.

    Whatever is fitted passes its batches through here first, so that a gate row's outcome is gone before anything could read it.
    """
    if SPLIT in batch.schema.names:
        return batch.drop_columns([SPLIT]), batch[SPLIT].to_numpy()
    split = splits.split_of_rows(batch["key"], batch["creative"])
    keep = split != splits.GATE
    return batch.filter(pa.array(keep)), split[keep]


@dataclasses.dataclass(frozen=True)
class Features:
    """What is fixed when a model is first trained, and stays so while it is refreshed.

    Attributes:
        contract: the columns.
        vocabularies: the values of each of the contract's `categoricals` and, for a model that sees images, of the creative.
        boundaries: for each column of its `numerics`, values in ascending order and the place in [-1, 1] that each is mapped to.
        knots: positions between which the position's effect is linear, ascending; empty without a position column.
        embedding_width: D, the width of an image embedding; 0 for a model that sees no image.
        history: outcomes of the months learnt from; None for a model that does not look at them.
    """

    contract: Contract
    vocabularies: tuple[Vocabulary, ...]
    boundaries: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    knots: tuple[float, ...]
    embedding_width: int
    history: History | None = None

    @property
    def buckets(self) -> tuple[int, ...]:
        """Ids of each categorical column, the reserved ids included."""
        return tuple(vocabulary.size for vocabulary in self.vocabularies[: len(self.contract.categoricals)])

    @property
    def widths(self) -> dict[str, int]:
        """Columns of each array that `arrays` returns."""
        widths = {"categorical": len(self.contract.categoricals), "numeric": 2 * len(self.contract.numerics)}
        widths |= {"position": len(self.knots) + 1} if self.contract.position else {}
        widths |= {"embedding": self.embedding_width, "has_image": 1, "creative": 1} if self.embedding_width else {}
        widths |= {"history": 2 * len(self.history.names)} if self.history else {}
        # Where there is nothing else to learn from, a constant stands in.
        widths |= {} if widths["categorical"] or widths["numeric"] or self.embedding_width or self.history else {"constant": 1}
        return {name: width for name, width in widths.items() if width}

    def arrays(self, batch: pa.RecordBatch, at_reference: bool, evidence: bool = False) -> Arrays:
        """The model's inputs.

        Args:
            batch: a joined batch; its outcome columns are not looked at and may be absent.
            at_reference: take every row's position as the contract's reference position, as scoring does.
            evidence: whether to look that up as well.

        Returns:
            categorical: int32 (rows, categoricals): 0 is missing, 1 is a value never seen or one that training hides, others are known.
            numeric: float32 (rows, 2 x numerics): the values in [-1, 1], then 1 where missing (its value is 0 then).
            position: float32 (rows, knots + 1): weights of the two knots beside the position, then 1 where it is missing;
                a position outside the knots counts as the nearest. Absent without a position column.
            embedding: float32 (rows, D), zeros where there is no image; absent where D is 0, and so is
            has_image: float32 (rows, 1), and
            creative: int32 (rows, 1), like a categorical; for what no image shows of a creative that was seen in training.
            history: float32 (rows, 2 x names), of the months before the batch's own.
            evidence: where asked for, and no input: int64 (rows, 2), impressions that each row's key and creative had in training.
        """
        out: Arrays = {}
        if self.embedding_width:
            # It is looked up twice, and takes long to be told apart.
            batch = batch.set_column(batch.schema.get_field_index("creative"), "creative", coded(batch["creative"]))
        if self.contract.categoricals:
            columns = zip(self.contract.categoricals, self.vocabularies, strict=False)
            out["categorical"] = np.stack([vocabulary.ids(batch[c.name], c.name) for c, vocabulary in columns], axis=1)
        if self.boundaries:
            values = [_numbers(batch[column.name]) for column in self.contract.numerics]
            scaled = [np.interp(v, *bounds) for v, bounds in zip(values, self.boundaries, strict=True)]
            missing = np.stack([np.isnan(v) for v in values], axis=1)
            numeric = np.where(missing, 0, np.stack(scaled, axis=1))
            out["numeric"] = np.concatenate([numeric, missing], axis=1, dtype=np.float32)
        if position := self.contract.position:
            at = np.full(len(batch), position.reference) if at_reference else _numbers(batch[position.name])
            out["position"] = _hats(at, self.knots)
        if self.embedding_width:
            out |= _images(batch, self.embedding_width)
            out["creative"] = self.vocabularies[-1].ids(batch["creative"], "creative")[:, None]
        if self.history:
            out |= self.history.arrays(batch, month_of(batch), evidence)
        elif evidence:
            out["evidence"] = np.zeros((len(batch), 2), np.int64)
        if "constant" in self.widths:
            out["constant"] = np.ones((len(batch), 1), np.float32)
        return out

    def to_json(self) -> str:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain |= {"contract": contracts.dumps(self.contract), "vocabularies": [vocabulary.plain() for vocabulary in self.vocabularies]}
        return json.dumps(plain | {"history": self.history and self.history.plain()})

    @classmethod
    def from_json(cls, text: str) -> "Features":
        plain = json.loads(text)
        return cls(
            contract=contracts.parse(plain["contract"]),
            vocabularies=tuple(Vocabulary.from_plain(vocabulary) for vocabulary in plain["vocabularies"]),
            boundaries=tuple((tuple(values), tuple(places)) for values, places in plain["boundaries"]),
            knots=tuple(plain["knots"]),
            embedding_width=plain["embedding_width"],
            history=plain["history"] and History.from_plain(plain["history"]),
        )


class Fitter:
    """Fits `Features` to a stream of batches in bounded memory; the same batches in the same order give the same spec."""

    def __init__(self, contract: Contract, embedding_width: int) -> None:
        from tfx_bsl.sketches import QuantilesSketch

        self._contract, self._width = contract, embedding_width
        names = [column.name for column in contract.categoricals] + ["creative"] * bool(embedding_width)
        self._seen = {name: np.empty(0, np.uint64) for name in names}
        places = (*contract.numerics, contract.position) if contract.position else contract.numerics
        self._sketches = {column.name: QuantilesSketch(1e-3, 1 << 40, 1) for column in places}

    def add(self, batch: pa.RecordBatch, labelled: pa.RecordBatch) -> None:
        """Take in feature values: TRAIN rows, and those of them that have an outcome, which is not looked at.

        Only values of the latter are given ids: of others nothing is learnt, so they are as unknown as those that come later.
        """
        for name, seen in self._seen.items():
            # Past the bound those of the lowest hashes stay, whatever order they came in.
            self._seen[name] = np.union1d(seen, present(labelled[name], name))[:MAX_VALUES]
        for name, sketch in self._sketches.items():
            values = _numbers(batch[name])
            sketch.AddValues(pa.array(values[np.isfinite(values)]))

    def fit(self) -> Features:
        knots: tuple[float, ...] = ()
        if position := self._contract.position:
            values = np.unique(self._quantiles(position.name, 4 * QUANTILES))
            if len(values) > _POSITION_KNOTS:
                values = np.unique(self._quantiles(position.name, _POSITION_KNOTS - 1))
            knots = tuple(values.tolist())
        boundaries = tuple(_places(self._quantiles(column.name, QUANTILES)) for column in self._contract.numerics)
        return Features(self._contract, tuple(map(Vocabulary.of, self._seen.values())), boundaries, knots, self._width)

    def grown(self, features: Features) -> tuple[Features, list[np.ndarray]]:
        """The features of a refresh: the parent's, with the values that are new; and the ids of those, by vocabulary."""
        grown = [vocabulary.grown(seen) for vocabulary, seen in zip(features.vocabularies, self._seen.values(), strict=True)]
        return dataclasses.replace(features, vocabularies=tuple(vocabulary for vocabulary, _ in grown)), [ids for _, ids in grown]

    def _quantiles(self, name: str, count: int) -> np.ndarray:
        values = self._sketches[name].GetQuantiles(count).flatten().to_numpy(zero_copy_only=False)
        return np.sort(values[np.isfinite(values)]) if len(values) and np.isfinite(values).any() else np.zeros(1)


def minibatches(blocks: Iterable[Arrays], size: int, pool: int = 0, rng: np.random.Generator | None = None) -> Iterator[Arrays]:
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
    # Four times as fast as indexing, for rows of several numbers.
    return {name: array.take(order, axis=0) for name, array in whole.items()}


def _places(quantiles: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Distinct quantiles and their mean rank, scaled to [-1, 1]: a value that fills many quantiles sits in their middle."""
    values, inverse = np.unique(quantiles, return_inverse=True)
    ranks = np.bincount(inverse, np.linspace(-1, 1, len(quantiles))) / np.bincount(inverse)
    return tuple(values.tolist()), tuple((ranks if len(values) > 1 else np.zeros(1)).tolist())


def _filled(column: pa.Array) -> np.ndarray:
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.float32)


def _numbers(column: pa.Array) -> np.ndarray:
    """float64 (rows,), NaN where missing."""
    return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)


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
    if column.type != embedding_type(width):
        raise ValueError(f"embedding column has type {column.type}; expected {embedding_type(width)}, {width} float32: another encoder's?")
    valid = column.is_valid().to_numpy(zero_copy_only=False)[:, None]
    return {"embedding": np.where(valid, embedding_matrix(column), np.float32(0)), "has_image": valid.astype(np.float32)}


def embedding_type(width: int) -> pa.DataType:
    """Of embeddings of that many float32: bytes of a fixed size, which Parquet reads several times as fast as lists."""
    return pa.binary(4 * width)


def embedding_column(embeddings: np.ndarray) -> pa.Array:
    """Embeddings, float32 (n, width), as a column of the lake; null where there is a NaN."""
    fine = pa.array(~np.isnan(embeddings).any(axis=1)).buffers()[1]
    values = np.ascontiguousarray(embeddings, "<f4")
    return pa.Array.from_buffers(embedding_type(values.shape[1]), len(values), [fine, pa.py_buffer(values)])


def embedding_matrix(column: pa.Array) -> np.ndarray:
    """What `embedding_column` was given, float32 (n, width), without a copy; where the column is null, the row may be anything."""
    return _bytes_of(column).view("<f4")


def pixels_of(thumbnails: pa.Array) -> np.ndarray:
    """Thumbnails, uint8 (n, 64, 64, 3), of a column of their bytes, without a copy."""
    from model.images import THUMBNAIL_SIZE  # With it comes Pillow, which few who look at features need.

    return _bytes_of(thumbnails).reshape(-1, THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3)


def _bytes_of(column: pa.Array) -> np.ndarray:
    """The bytes of a column of a fixed size, uint8 (rows, size)."""
    size, end = column.type.byte_width, column.offset + len(column)
    return np.frombuffer(column.buffers()[1] or b"", np.uint8)[: end * size].reshape(-1, size)[column.offset :]
