"""Metrics from columns are those of one impression after another, and the gate decides by them."""

import math
from typing import Any

import numpy as np
import pytest

from model.evaluation import Sums, verdict


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clicks, impressions and predicted probability of random rows."""
    source = np.random.default_rng(seed)
    impressions = source.integers(0, 30, count)
    probability = source.beta(1, 9, count) * 0.98 + 0.01
    return source.binomial(impressions, probability), impressions, probability


def one_by_one(clicks: np.ndarray, impressions: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """The metrics by a loop over impressions, as the textbook has them."""
    losses, labels, predicted = [], [], []
    for k, n, p in zip(clicks.tolist(), impressions.tolist(), probability.tolist(), strict=True):
        for impression in range(n):
            label = impression < k
            losses.append(-math.log(p if label else 1 - p))
            labels.append(label)
            predicted.append(p)
    rate = sum(labels) / len(labels)
    entropy = -sum(math.log(rate if label else 1 - rate) for label in labels) / len(labels)
    loss = sum(losses) / len(losses)
    return {"log_loss": loss, "normalized_entropy": loss / entropy, "calibration": sum(predicted) / sum(labels)}


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float64, np.float32])
@pytest.mark.parametrize("count", [5, 400])
def test_metrics_are_those_of_a_loop_over_impressions(count: int, kind: type) -> None:
    clicks, impressions, probability = rows(count)
    metrics = Sums.of(clicks.astype(kind), impressions.astype(kind), probability).metrics()
    assert (metrics["rows"], metrics["clicks"], metrics["impressions"]) == (count, clicks.sum(), impressions.sum())
    for name, expected in one_by_one(clicks, impressions, probability).items():
        assert metrics[name] == pytest.approx(expected, rel=1e-9)


def test_impressions_of_their_own_are_the_same_as_summed_rows() -> None:
    clicks, impressions, probability = rows(50)
    each = [np.concatenate([[1] * k + [0] * (n - k) for k, n in zip(clicks, impressions, strict=True)])]
    spread = Sums.of(each[0], np.ones(len(each[0])), np.repeat(probability, impressions)).metrics()
    summed = Sums.of(clicks, impressions, probability).metrics()
    assert {**spread, "rows": 0} == pytest.approx({**summed, "rows": 0}, rel=1e-9)


@pytest.mark.parametrize("cuts", [[], [0], [100], [1, 1, 57, 99]])
def test_sums_of_parts_are_the_sum_of_the_whole(cuts: list[int]) -> None:
    columns = rows(100)
    parts = zip(*(np.split(column, cuts) for column in columns), strict=True)
    merged = sum((Sums.of(*part) for part in parts), Sums())
    assert merged.metrics() == pytest.approx(Sums.of(*columns).metrics(), rel=1e-12)


def test_predicting_the_base_rate_has_a_normalized_entropy_of_one() -> None:
    clicks, impressions, _ = rows(300)
    rate = clicks.sum() / impressions.sum()
    metrics = Sums.of(clicks, impressions, np.full(300, rate)).metrics()
    assert (metrics["normalized_entropy"], metrics["calibration"]) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("sums", "undefined"),
    [
        (Sums(), {"log_loss", "normalized_entropy", "calibration"}),
        (Sums(3, 0, 10, 1.0, 0.5), {"normalized_entropy", "calibration"}),
        (Sums(3, 10, 10, 1.0, 9.0), {"normalized_entropy"}),
        (Sums(3, 4, 10, 6.0, 4.0), set()),
    ],
)
def test_what_is_undefined_is_none(sums: Sums, undefined: set[str]) -> None:
    assert {name for name, value in sums.metrics().items() if value is None} == undefined


@pytest.mark.parametrize("probability", [1e-12, 1e-300, 1 - 1e-12])
def test_probabilities_near_the_ends_have_a_finite_loss(probability: float) -> None:
    loss = Sums.of(np.array([0, 1]), np.array([1, 1]), np.array([probability, probability])).metrics()["log_loss"]
    assert loss is not None and math.isfinite(loss)


def judged(log_loss: float, impressions: float = 1000) -> Sums:
    return Sums(100, 10, impressions, log_loss * impressions, 10)


NOTHING = Sums()
BASE = judged(0.5)


@pytest.mark.parametrize(
    ("candidate", "champion", "base_rate", "promoted", "flagged", "why"),
    [
        (judged(0.3), judged(0.4), BASE, True, False, "log loss 0.30000 against the champion's 0.40000 on 100 gate rows with 10 clicks"),
        (judged(0.4), judged(0.4), BASE, True, False, "against the champion's 0.40000"),
        (judged(0.45), judged(0.4), BASE, False, False, "log loss 0.45000 against the champion's 0.40000"),
        (judged(0.6), judged(0.7), BASE, True, False, "against the champion's 0.70000"),
        (judged(math.nan), judged(0.4), BASE, False, False, "log loss nan against the champion's"),
        (NOTHING, NOTHING, NOTHING, False, False, "there is no labelled gate row to judge by"),
        (judged(0.4), None, BASE, True, False, "log loss 0.40000 against the base rate's 0.50000"),
        (judged(0.6), None, BASE, True, True, "log loss 0.60000 against the base rate's 0.50000"),
        (judged(math.nan), None, BASE, True, True, "log loss nan against the base rate's"),
        (NOTHING, None, NOTHING, True, True, "there is no labelled gate row to judge by"),
    ],
    ids=[
        "better",
        "equal",
        "worse",
        "better, if not than the base rate",
        "no number",
        "unlabelled",
        "first",
        "first and bad",
        "first without a number",
        "first and unlabelled",
    ],
)
def test_the_verdict(candidate: Sums, champion: Sums | None, base_rate: Sums, promoted: bool, flagged: bool, why: str) -> None:
    ruling: dict[str, Any] = verdict(candidate, champion, base_rate)
    assert (ruling["promoted"], ruling["flagged"]) == (promoted, flagged)
    assert why in ruling["why"]
