"""Metrics from columns are those of one impression after another; they merge; and their intervals hold what they should."""

import datetime
import math

import numpy as np
import pyarrow as pa
import pytest

from model.evaluation import (
    COLD,
    OVERALL,
    REPLICATES,
    WARM,
    Z_TWO_SIDED,
    Evaluation,
    Slice,
    _poisson_table,
    _weights,
    clusters_of,
    evaluate,
    merged,
    quality,
)
from schemas import tables

ALL = (OVERALL, None)
HALF = ("device", "mobile")


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clicks, impressions and predicted probability of random rows."""
    source = np.random.default_rng(seed)
    impressions = source.integers(0, 30, count)
    probability = source.beta(1, 9, count) * 0.98 + 0.01
    return source.binomial(impressions, probability), impressions, probability


def judged(clicks: np.ndarray, impressions: np.ndarray, *probabilities: np.ndarray, replicates: int = 0) -> Evaluation:
    """Models m0, m1, … on the rows, the first half of them in a segment of its own; every row is a cluster."""
    predictions = {f"m{i}": probability for i, probability in enumerate(probabilities)}
    half = {HALF: np.arange(len(clicks) // 2)} if len(clicks) > 1 else {}
    return evaluate(clicks, impressions, predictions, np.arange(len(clicks)).astype(np.uint64), half, replicates)


def one_by_one(clicks: np.ndarray, impressions: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """The metrics by a loop over impressions, as the textbook has them."""
    losses, labels, predicted = [], [], []
    for k, n, p in zip(clicks.tolist(), impressions.tolist(), probability.tolist(), strict=True):
        for impression in range(int(n)):
            label = impression < k
            losses.append(-math.log(p if label else 1 - p))
            labels.append(label)
            predicted.append(p)
    rate = sum(labels) / len(labels)
    entropy = -sum(math.log(rate if label else 1 - rate) for label in labels) / len(labels)
    loss = sum(losses) / len(losses)
    brier = sum((p - label) ** 2 for p, label in zip(predicted, labels, strict=True)) / len(labels)
    return {"log_loss": loss, "normalized_entropy": loss / entropy, "calibration": sum(predicted) / sum(labels), "brier": brier}


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float64, np.float32])
@pytest.mark.parametrize("count", [5, 400])
def test_metrics_are_those_of_a_loop_over_impressions(count: int, kind: type) -> None:
    clicks, impressions, probability = rows(count)
    found = judged(clicks.astype(kind), impressions.astype(kind), probability)
    for segment, part in ((ALL, slice(None)), (HALF, slice(count // 2))):
        metrics = found.slices[segment].metrics(0)
        expected = (len(clicks[part]), clicks[part].sum(), impressions[part].sum())
        assert (metrics["rows"], metrics["clicks"], metrics["impressions"]) == expected
        for name, value in one_by_one(clicks[part], impressions[part], probability[part]).items():
            assert metrics[name] == pytest.approx(value, rel=1e-9)


def test_roc_auc_is_the_share_of_pairs_in_order_with_ties_half() -> None:
    clicks, impressions, probability = rows(300)
    probability = probability.round(2).clip(0.01, 0.99)
    k, n = clicks.astype(float), (impressions - clicks).astype(float)
    above = (probability[:, None] > probability) + 0.5 * (probability[:, None] == probability)
    expected = (k[:, None] * n * above).sum() / (k.sum() * n.sum())
    assert judged(clicks, impressions, probability).overall.metrics(0)["roc_auc"] == pytest.approx(expected, abs=1e-4)
    assert judged(clicks, impressions, np.full(300, 0.1)).overall.metrics(0)["roc_auc"] == pytest.approx(0.5)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_pr_auc_is_between_the_sums_from_both_sides(spread: float) -> None:
    """Average precision takes the precision at the end of each step; the area between is bounded by those at both ends."""
    clicks, impressions, probability = rows(4000)
    logits = np.log(probability / (1 - probability)) + spread * np.random.default_rng(1).standard_normal(4000)
    probability = 1 / (1 + np.exp(-logits))
    order = np.argsort(-probability)
    hits, shown = np.cumsum(clicks[order]), np.cumsum(impressions[order])
    average_precision = float((np.diff(hits, prepend=0) * hits / np.maximum(shown, 1)).sum() / hits[-1])
    assert judged(clicks, impressions, probability).overall.metrics(0)["pr_auc"] == pytest.approx(average_precision, abs=3e-3)


def test_a_perfect_order_has_areas_of_one_and_a_constant_those_of_chance() -> None:
    clicks, impressions = np.array([10, 0, 0, 5]), np.array([10, 90, 30, 5])
    perfect = judged(clicks, impressions, np.array([0.9, 0.1, 0.2, 0.8])).overall.metrics(0)
    assert (perfect["roc_auc"], perfect["pr_auc"]) == pytest.approx((1, 1))
    constant = judged(clicks, impressions, np.full(4, 0.2)).overall.metrics(0)
    assert (constant["roc_auc"], constant["pr_auc"]) == pytest.approx((0.5, 15 / 135))


def test_calibration_error_is_on_twenty_bins_of_equal_impressions() -> None:
    clicks, impressions, probability = rows(20_000)
    order = np.argsort(probability, kind="stable")
    group = np.minimum((np.cumsum(impressions[order]) - 1) * 20 // impressions.sum(), 19)
    off = np.bincount(group, (impressions * probability * 1.3 - clicks)[order])
    overall = judged(clicks, impressions, np.minimum(probability * 1.3, 0.999)).overall
    assert overall.metrics(0)["ece"] == pytest.approx(np.abs(off).sum() / impressions.sum(), rel=0.02)
    shown, clicked, predicted = np.array(overall.reliability(0)).T
    assert len(shown) == 20 and shown == pytest.approx(np.full(20, shown.mean()), rel=0.25)
    assert (shown.sum(), clicked.sum()) == (impressions.sum(), clicks.sum()) and (np.diff(predicted / shown) > 0).all()
    assert clicked / shown == pytest.approx(np.bincount(group, clicks[order]) / np.bincount(group, impressions[order]), rel=0.1)
    assert judged(clicks[:0], impressions[:0], probability[:0]).overall.reliability(0) == []


def test_impressions_of_their_own_are_the_same_as_summed_rows() -> None:
    clicks, impressions, probability = rows(50)
    each = np.concatenate([[1] * k + [0] * (n - k) for k, n in zip(clicks, impressions, strict=True)])
    spread = judged(each, np.ones(len(each)), np.repeat(probability, impressions)).overall.metrics(0)
    summed = judged(clicks, impressions, probability).overall.metrics(0)
    for name, value in summed.items():
        assert name == "rows" or spread[name] == (value if value is None else pytest.approx(value, rel=1e-9)), name


@pytest.mark.parametrize("cuts", [[], [0], [100], [1, 1, 57, 99]])
def test_parts_merge_to_the_whole_replicates_too(cuts: list[int]) -> None:
    clicks, impressions, probability = rows(100)
    clusters, mobile = np.repeat(np.arange(20), 5).astype(np.uint64), np.arange(100) % 3 == 0

    def of(part: np.ndarray) -> Evaluation:
        where = np.flatnonzero(mobile[part])
        slices = {HALF: where} if len(where) else {}
        return evaluate(clicks[part], impressions[part], {"m0": probability[part]}, clusters[part], slices)

    whole, parts = of(np.arange(100)), merged(of(part) for part in np.split(np.arange(100), cuts))
    assert set(parts.slices) == set(whole.slices) == {ALL, HALF}
    for segment in whole.slices:
        assert parts.slices[segment].rows == whole.slices[segment].rows
        np.testing.assert_allclose(parts.slices[segment].sums, whole.slices[segment].sums, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(parts.slices[segment].bins, whole.slices[segment].bins, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(parts.slices[segment].drawn, whole.slices[segment].drawn, rtol=1e-5, atol=1e-5)


def test_a_cluster_has_one_poisson_weight_a_replicate_wherever_it_is() -> None:
    clusters = np.random.default_rng(0).integers(0, 1 << 63, 5000).astype(np.uint64)
    weights = _weights(clusters, REPLICATES)
    assert weights.shape == (5000, REPLICATES)
    np.testing.assert_array_equal(_weights(clusters[77:78], REPLICATES)[0], weights[77])
    share = np.bincount(weights.ravel().astype(int), minlength=9) / weights.size
    np.testing.assert_allclose(share[:6], [math.exp(-1) / math.factorial(k) for k in range(6)], atol=1e-3)
    # No two replicates, and no two clusters, go together.
    for matrix in (weights[:, :40], weights[:40].T):
        assert np.abs(np.corrcoef(matrix.T) - np.eye(40)).max() < 0.3
    assert _poisson_table().mean() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", [1, 8])
def test_intervals_hold_the_truth_19_times_in_20(size: int) -> None:
    """Also where the rows of a creative go together: its clicks are of one draw."""
    rng, held, trials = np.random.default_rng(0), 0, 100
    for _ in range(trials):
        rate = np.repeat(rng.beta(2, 18, 400), size)
        clicks, impressions = rng.binomial(20, rate), np.full(400 * size, 20)
        clusters = np.repeat(rng.integers(0, 1 << 63, 400).astype(np.uint64), size)
        metrics = evaluate(clicks, impressions, {"m0": np.full(400 * size, 0.1)}, clusters, {}).overall.metrics(0)
        held += metrics["calibration_low"] <= 1 <= metrics["calibration_high"]
    assert 0.89 <= held / trials <= 0.99


def test_a_replicate_is_the_rows_as_often_as_it_has_drawn_them() -> None:
    clicks, impressions, probability = rows(6000)
    clusters = np.random.default_rng(1).integers(0, 1 << 63, 5000).astype(np.uint64)[np.arange(6000) % 5000]
    found = evaluate(clicks, impressions, {"m0": probability}, clusters, {HALF: np.arange(1000, 4000)}).slices[HALF]
    for replicate in (0, 1, 59):
        often = _weights(clusters, REPLICATES)[:, replicate]
        again = evaluate(clicks * often, impressions * often, {"m0": probability}, clusters, {HALF: np.arange(1000, 4000)}, 0).slices[HALF]
        np.testing.assert_allclose(found.sums[1 + replicate], again.sums[0], rtol=1e-9)
        coarser = again.bins.reshape(1, 3, -1, 4).sum(axis=3)
        assert again.first == found.first
        np.testing.assert_allclose(found.drawn[:, :, replicate], coarser, rtol=1e-5)


def test_the_intervals_of_all_metrics_are_as_wide_as_other_draws_of_the_rows_differ() -> None:
    told = []
    for seed in range(60):
        clicks, impressions, probability = rows(800, seed)
        told.append(judged(clicks, impressions, probability, replicates=REPLICATES).overall.metrics(0))
    for name in METRICS:
        spread = np.std([one[name] for one in told])
        width = np.mean([one[f"{name}_high"] - one[f"{name}_low"] for one in told]) / (2 * Z_TWO_SIDED)
        assert 0.7 < width / spread < 1.4, name
        assert all(0 <= one[f"{name}_low"] < one[name] < one[f"{name}_high"] for one in told)


def test_predicting_the_base_rate_has_a_normalized_entropy_of_one() -> None:
    clicks, impressions, _ = rows(300)
    metrics = judged(clicks, impressions, np.full(300, clicks.sum() / impressions.sum()), replicates=REPLICATES).overall.metrics(0)
    assert (metrics["normalized_entropy"], metrics["calibration"]) == pytest.approx((1, 1))
    assert metrics["normalized_entropy_low"] <= 1 <= metrics["normalized_entropy_high"]


METRICS = ("log_loss", "normalized_entropy", "calibration", "ece", "roc_auc", "pr_auc", "brier")
ALWAYS = {"rows", "clicks", "impressions"}
INTERVALS = {f"{name}_{end}" for name in METRICS for end in ("low", "high")}


@pytest.mark.parametrize(
    ("clicks", "impressions", "undefined"),
    [
        ([], [], set(METRICS)),
        ([0, 0], [5, 5], {"normalized_entropy", "calibration", "roc_auc", "pr_auc"}),
        ([5, 5], [5, 5], {"normalized_entropy", "roc_auc", "pr_auc"}),
        ([1, 0], [5, 5], set()),
    ],
)
def test_what_is_undefined_is_none(clicks: list[int], impressions: list[int], undefined: set[str]) -> None:
    evaluation = judged(np.array(clicks, float), np.array(impressions, float), np.full(len(clicks), 0.1))
    found = evaluation.overall.metrics(0)
    assert {name for name, value in found.items() if value is None} == undefined | INTERVALS


@pytest.mark.parametrize("probability", [1e-12, 1e-300, 1 - 1e-12])
def test_probabilities_near_the_ends_have_a_finite_loss(probability: float) -> None:
    loss = judged(np.array([0, 1]), np.array([1, 1]), np.array([probability, probability])).overall.metrics(0)["log_loss"]
    assert loss is not None and math.isfinite(loss)


def test_a_row_is_drawn_with_its_creative_or_else_alone() -> None:
    batch = pa.RecordBatch.from_pydict({"creative": pa.array(["a", "a", None, None, "b"], pa.string()), "key": list("12345")})
    clusters = clusters_of(batch)
    assert clusters[0] == clusters[1] and len(set(clusters.tolist())) == 4


def test_the_quality_table_has_every_slice_of_every_model() -> None:
    clicks, impressions, probability = rows(100)
    evaluation = judged(clicks, impressions, probability, np.full(100, 0.1))
    same = {"month": datetime.date(2026, 10, 1), "run_id": "r", "kind": "evaluation", "judged_month": datetime.date(2026, 9, 1)}
    found = quality(evaluation, same, {"m0": "v", "m1": None}).to_pylist()
    told = [(row["model"], row["model_version"], row["segment"], row["value"]) for row in found]
    assert told == [(m, v, *segment) for m, v in (("m0", "v"), ("m1", None)) for segment in (ALL, HALF)]
    for row in found:
        metrics = evaluation.slices[row["segment"], row["value"]].metrics(int(row["model"][1]))
        assert {name: row[name] for name in metrics} == metrics
    assert set(tables.schema("quality").names) == {*same, "model", "model_version", "segment", "value", *metrics}
    assert {WARM, COLD, OVERALL} == {"warm", "cold", "overall"}
    assert Slice(0, np.zeros((1, 5)), np.zeros((1, 3, 4)), np.zeros((1, 3, 0, 4)), 0).impressions == 0
