"""How good models are on the same rows: metrics from columns, with intervals, out of sums that merge.

Every number is per impression: a row is `clicks` positives and `impressions - clicks` negatives. The intervals are by Poisson bootstrap
over clusters, a cluster being the rows of one creative: a cluster's weight in a replicate follows from the hash of both, so it is the
same in every batch, worker and run, and the sums of a replicate merge as the sums themselves do.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas import tables
from schemas.hashing import hash64_column, mix_all, salted

REPLICATES = 400
OVERALL, WARM, COLD = "overall", "warm", "cold"
Z_TWO_SIDED = 1.959964
# Probabilities are binned by log-odds for the metrics that depend on their order, finely enough that ROC AUC is off by less than 1e-4.
_LOGIT_END, _BINS = 16.0, 1024
_ECE_BINS = 20
# For their intervals so many replicates are enough, and so many of these bins in one.
_BY_ORDER, _COARSER = 60, 4
_BLOCK = 4096
_SHARED, _EACH = 2, 3  # columns of `Slice.sums`: impressions and clicks, then of each model log loss, predicted clicks, squared error
Segment = tuple[str, str | None]  # a column and one of its values; overall, warm and cold have none


@dataclasses.dataclass(frozen=True)
class Slice:
    """Mergeable sums over some evaluated rows.

    Attributes:
        rows: labelled rows.
        sums: float64 (1 + replicates, 2 + 3 x models): impressions and clicks, then of each model the log loss in nats, the predicted
            clicks and the squared error. The first row has the sums themselves, each other one those of a bootstrap replicate.
        bins: float64 (models, 3, bins): impressions, clicks and predicted clicks by the model's log-odds.
        drawn: float32 (models, 3, replicates, coarser bins): the same of the first bootstrap replicates.
        first: the coarser bin that both begin with; the empty ends are left out, since there are many slices.
    """

    rows: int
    sums: np.ndarray
    bins: np.ndarray
    drawn: np.ndarray
    first: int

    def __add__(self, other: "Slice") -> "Slice":
        first, end = min(self.first, other.first), max(part.first + part.drawn.shape[3] for part in (self, other))
        bins = np.zeros((*self.bins.shape[:2], (end - first) * _COARSER))
        drawn = np.zeros((*self.drawn.shape[:3], end - first), np.float32)
        for part in (self, other):
            start = part.first - first
            bins[..., start * _COARSER :][..., : part.bins.shape[2]] += part.bins
            drawn[..., start:][..., : part.drawn.shape[3]] += part.drawn
        return Slice(self.rows + other.rows, self.sums + other.sums, bins, drawn, first)

    @property
    def impressions(self) -> float:
        return float(self.sums[0, 0])

    @property
    def clicks(self) -> float:
        return float(self.sums[0, 1])

    def loss(self, model: int) -> np.ndarray:
        """Log loss, summed over impressions, of the rows and of each replicate: shape (1 + replicates,)."""
        return self.sums[:, _SHARED + _EACH * model]

    def predicted(self, model: int) -> np.ndarray:
        """Predicted clicks of the rows and of each replicate: shape (1 + replicates,)."""
        return self.sums[:, _SHARED + _EACH * model + 1]

    def metrics(self, model: int) -> dict[str, float | int | None]:
        """Metrics of one model by the names of the quality table; None where undefined."""
        drawn = [_by_bins(bins) for bins in self.drawn[model].swapaxes(0, 1)]
        out = {"rows": self.rows, "impressions": self.impressions, "clicks": self.clicks, **self.ratios(model)}
        for name, value in _by_bins(self.bins[model]).items():
            out |= _around(name, value, np.array([one[name] for one in drawn]))
        return out

    def ratios(self, model: int) -> dict[str, float | None]:
        """Those of the metrics that are ratios of sums."""
        impressions, clicks = self.sums[:, 0], self.sums[:, 1]
        return {
            **_with_interval("log_loss", self.loss(model), impressions),
            **_with_interval("normalized_entropy", self.loss(model), impressions * _entropy(clicks, impressions)),
            **_with_interval("calibration", self.predicted(model), clicks),
            **_with_interval("brier", self.sums[:, _SHARED + _EACH * model + 2], impressions),
        }

    def reliability(self, model: int) -> list[list[float]]:
        """Impressions, clicks and predicted clicks by the model's probability, lowest first, in bins of about equal impressions."""
        return [column for column in _equal_bins(self.bins[model]).T.tolist() if column[0]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Models judged on the same rows.

    Attributes:
        models: names, in the order of the sums.
        slices: overall, warm, cold and the segments; absent where there is no row.
    """

    models: tuple[str, ...]
    slices: Mapping[Segment, Slice]

    @property
    def overall(self) -> Slice:
        return self.slices.get((OVERALL, None)) or _nothing(len(self.models))

    @property
    def segments(self) -> dict[Segment, Slice]:
        """The slices by a column of the contract."""
        return {segment: found for segment, found in self.slices.items() if segment[1] is not None}


def merged(evaluations: Iterable[Evaluation]) -> Evaluation:
    """The evaluation of all their rows; sums of floats depend on the order that they are given in, in their last digits."""
    models: tuple[str, ...] = ()
    slices: dict[Segment, Slice] = {}
    for evaluation in evaluations:
        models = evaluation.models or models
        for segment, found in evaluation.slices.items():
            slices[segment] = slices[segment] + found if segment in slices else found
    return Evaluation(models, slices)


def evaluate(
    clicks: np.ndarray,
    impressions: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    clusters: np.ndarray,
    slices: Mapping[Segment, np.ndarray],
    replicates: int = REPLICATES,
) -> Evaluation:
    """Judge models on labelled rows.

    Args:
        clicks, impressions: shape (rows,).
        predictions: probabilities inside (0, 1) by model, shape (rows,).
        clusters: uint64 (rows,), the same in rows that are drawn together.
        slices: the row numbers of each slice but the one of all rows; none is empty.
        replicates: of the bootstrap, a multiple of 4; 0 for none.
    """
    rows, models = len(clicks), len(predictions)
    clicks, impressions = clicks.astype(np.float64), impressions.astype(np.float64)
    columns, places = [impressions, clicks], []
    for p in predictions.values():
        log_p, log_not = np.log(p), np.log1p(-p)
        columns += [(clicks - impressions) * log_not - clicks * log_p, impressions * p, clicks * (1 - 2 * p) + impressions * p * p]
        place = ((log_p - log_not + _LOGIT_END) * (_BINS / (2 * _LOGIT_END))).astype(np.int64)
        places.append(place.clip(0, _BINS - 1))
    values = np.stack(columns, axis=1)
    chosen: dict[Segment, np.ndarray] = {(OVERALL, None): np.arange(rows), **slices} if rows else {}
    found = {}
    for segment, where in chosen.items():
        sums = np.zeros((1 + replicates, values.shape[1]))
        sums[0] = values[where].sum(axis=0)
        ends = [end // _COARSER for place in places for end in (place[where].min(), place[where].max())]
        first, coarser = min(ends), max(ends) + 1 - min(ends)
        bins = np.empty((models, 3, coarser * _COARSER))
        for model, place in enumerate(places):
            for i, column in enumerate(_binned(model)):
                bins[model, i] = np.bincount(place[where] - first * _COARSER, values[where, column], bins.shape[2])
        drawn = np.zeros((models, 3, min(replicates, _BY_ORDER), coarser), np.float32)
        found[segment] = Slice(len(where), sums, bins, drawn, first)
    if replicates:
        _replicate(values, [place // _COARSER for place in places], clusters, chosen, found)
    return Evaluation(tuple(predictions), found)


def clusters_of(batch: pa.RecordBatch) -> np.ndarray:
    """The cluster of each joined row, uint64 (rows,): its creative, or its key where it has none."""
    return hash64_column(pc.coalesce(batch["creative"], batch["key"]), salted("bootstrap"))


def _binned(model: int) -> tuple[int, int, int]:
    """The columns of the sums that are also counted by the model's log-odds."""
    return 0, 1, _SHARED + _EACH * model + 1


def _replicate(
    values: np.ndarray,
    places: list[np.ndarray],
    clusters: np.ndarray,
    chosen: Mapping[Segment, np.ndarray],
    slices: Mapping[Segment, Slice],
) -> None:
    """Fill in the sums of all replicates, and of the first ones those by log-odds, some clusters at a time; `places` are coarser bins."""
    known, cluster = np.unique(clusters, return_inverse=True)
    totals = {}
    for segment, where in chosen.items():
        # Rows of one cluster have one weight, so they are summed before anything is weighted.
        present, inverse = np.unique(cluster[where], return_inverse=True)
        summed = [np.bincount(inverse, values[where, column], len(present)) for column in range(values.shape[1])]
        order = np.argsort(inverse)
        totals[segment] = present, np.stack(summed, axis=1), where[order], inverse[order]
    for start in range(0, len(known), _BLOCK):
        weights = _weights(known[start : start + _BLOCK], len(slices[OVERALL, None].sums) - 1)
        for segment, (present, total, where, inverse) in totals.items():
            first, last = np.searchsorted(present, (start, start + _BLOCK))
            weight = weights[present[first:last] - start].T
            slices[segment].sums[1:] += weight @ total[first:last]
            begin, end = np.searchsorted(inverse, (first, last))
            rows, own = where[begin:end], inverse[begin:end] - first
            lowest, drawn = slices[segment].first, slices[segment].drawn
            for model, place in enumerate(places):
                # Few bins have any row.
                bins, at = np.unique(place[rows] - lowest, return_inverse=True)
                for i, column in enumerate(_binned(model)):
                    each = np.bincount(own * len(bins) + at, values[rows, column], (last - first) * len(bins))
                    drawn[model, i][:, bins] += weight[:_BY_ORDER] @ each.reshape(last - first, len(bins))


def _weights(clusters: np.ndarray, replicates: int) -> np.ndarray:
    """Poisson(1) weights by cluster and replicate, float64 (clusters, replicates): a function of both alone."""
    # One hash of 64 bits is four weights.
    streams = mix_all(np.arange(1, replicates // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return _poisson_table()[mix_all(clusters[:, None] ^ streams).astype("<u8").view("<u2")]


@functools.cache
def _poisson_table() -> np.ndarray:
    """The Poisson(1) quantile of each 16-bit number."""
    probability = np.array([math.exp(-1) / math.factorial(count) for count in range(9)])
    return np.searchsorted(np.cumsum(probability)[:-1], (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float64)


def _entropy(clicks: np.ndarray, impressions: np.ndarray) -> np.ndarray:
    """Entropy of the click rate in nats; NaN where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = clicks / impressions
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    return np.where(entropy > 0, entropy, math.nan)


def log_ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Logarithm of a ratio of sums and its bootstrap standard error; arrays of shape (1 + replicates,), the sums themselves first.

    NaN where it is undefined, the error also where it is so in some replicate: too little is there to tell.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(above) - np.log(below)
    known = len(ratios) > 1 and np.isfinite(ratios).all()
    return float(ratios[0]), float(np.std(ratios[1:], ddof=1)) if known else math.nan


def _with_interval(name: str, above: np.ndarray, below: np.ndarray) -> dict[str, float | None]:
    """A ratio with its 95 % interval."""
    ratio, error = log_ratio(above, below)
    return interval(name, math.exp(ratio), math.exp(ratio - Z_TWO_SIDED * error), math.exp(ratio + Z_TWO_SIDED * error))


def _around(name: str, value: float, drawn: np.ndarray) -> dict[str, float | None]:
    """A number from 0 to 1 with its 95 % interval, by the standard deviation of what replicates have."""
    error = float(np.std(drawn, ddof=1)) if len(drawn) > 1 else math.nan
    low, high = np.clip([value - Z_TWO_SIDED * error, value + Z_TWO_SIDED * error], 0, 1).tolist()
    return interval(name, value, low, high)


def interval(name: str, value: float, low: float, high: float) -> dict[str, float | None]:
    """A number and the ends of its 95 % interval by the names that reports know them by; None where undefined."""
    named = {name: value, f"{name}_low": low, f"{name}_high": high}
    return {name: float(number) if math.isfinite(number) else None for name, number in named.items()}


def _equal_bins(bins: np.ndarray) -> np.ndarray:
    """A model's bins, shape (3, bins), summed up to `_ECE_BINS` of equal impressions, each cut at the fine bin that is nearest."""
    shown = np.cumsum(bins[0])
    cuts = np.searchsorted(shown, np.arange(1, _ECE_BINS) / _ECE_BINS * shown[-1])
    ends = np.concatenate([[0], np.unique(cuts + 1), [len(shown)]])
    return np.diff(np.concatenate([np.zeros((3, 1)), np.cumsum(bins, axis=1)], axis=1)[:, ends], axis=1)


def _by_bins(bins: np.ndarray) -> dict[str, float]:
    """What depends on the order of a model's log-odds, of its bins, shape (3, bins); NaN where undefined.

    ECE is the expected calibration error on bins of equal impressions; then come the areas under the ROC curve, ties counted half, and
    under the precision-recall curve (Davis and Goadrich 2006).
    """
    impressions, clicks, predicted = _equal_bins(bins)
    shown, clicked = impressions.sum(), clicks.sum()
    ece = float(np.abs(predicted - clicks).sum() / shown) if shown else math.nan
    if not 0 < clicked < shown:
        return {"ece": ece, "roc_auc": math.nan, "pr_auc": math.nan}
    positives, negatives = bins[1][::-1], (bins[0] - bins[1])[::-1]
    hits, misses = np.cumsum(positives), np.cumsum(negatives)
    roc_auc = np.sum(positives * (misses[-1] - misses + negatives / 2)) / (hits[-1] * misses[-1])
    # Between two cuts, false positives grow in proportion to true ones.
    there = positives > 0
    hits, misses, positives, negatives = hits[there], misses[there], positives[there], negatives[there]
    slope, above = 1 + negatives / positives, hits + misses
    before = above - positives - negatives
    rest = before - slope * (hits - positives)
    area = (positives - rest / slope * np.log(above / np.where(before > 0, before, above))) / slope
    return {"ece": ece, "roc_auc": float(roc_auc), "pr_auc": float(area.sum() / hits[-1])}


def _nothing(models: int) -> Slice:
    return Slice(0, np.zeros((1, _SHARED + _EACH * models)), np.zeros((models, 3, _COARSER)), np.zeros((models, 3, 0, 1), np.float32), 0)


def quality(evaluation: Evaluation, columns: Mapping[str, Any], versions: Mapping[str, str | None]) -> pa.RecordBatch:
    """The evaluation as rows of the quality table.

    Args:
        columns: values that are the same in every row.
        versions: the ranker of each model; None for what is no ranker.
    """
    rows: list[dict[str, Any]] = [
        {**columns, "model": name, "model_version": versions[name], "segment": segment, "value": value, **found.metrics(model)}
        for model, name in enumerate(evaluation.models)
        for (segment, value), found in evaluation.slices.items()
    ]
    return pa.RecordBatch.from_pylist(rows, schema=tables.schema("quality"))
