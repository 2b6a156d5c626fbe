"""What the gate lets through and what it refuses: on outcomes drawn again and again from a known truth, and on candidates that are bad.

At full size, 400 trials, where ADSTOCRAT_LONG is set, at a tenth of it otherwise.
"""

import dataclasses
import functools
import math
import os
from collections import Counter
from typing import Any

import numpy as np
import pytest

from model.evaluation import REPLICATES, Evaluation, Segment, Slice, evaluate
from model.gate import (
    BASE_RATE,
    CANDIDATE,
    CHAMPION,
    EARLIER_CHAMPION,
    FIRST,
    INSUFFICIENT,
    KEPT,
    PROMOTED,
    compared,
    verdict,
    worse_segments,
)
from schemas import sample

LONG = bool(os.environ.get("ADSTOCRAT_LONG"))
TRIALS = 400 if LONG else 30
MONTHS = ["2026-10"]
OVERALL: Segment = ("overall", None)


@dataclasses.dataclass(frozen=True)
class World:
    """Gate rows of a sample month with about 2,000 clicks, and models of which the truth is known.

    Attributes:
        creative: of each row; impressions, truth: of each row.
        segments: code of each row by segment column.
        models: probabilities by name; their normalized entropy under the truth is what the name says, relative to the champion's.
    """

    creative: np.ndarray
    impressions: np.ndarray
    truth: np.ndarray
    segments: dict[str, np.ndarray]
    models: dict[str, np.ndarray]


def expected_loss(world_truth: np.ndarray, impressions: np.ndarray, p: np.ndarray) -> float:
    return float(-(impressions * (world_truth * np.log(p) + (1 - world_truth) * np.log1p(-p))).sum() / impressions.sum())


def calibrated(logits: np.ndarray, truth: np.ndarray, impressions: np.ndarray) -> np.ndarray:
    """Probabilities at these log-odds, moved so that they predict the clicks of the truth."""
    for _ in range(8):
        p = 1 / (1 + np.exp(-logits))
        logits = logits + math.log(float(impressions @ truth) / float(impressions @ p))
    return 1 / (1 + np.exp(-logits))


@functools.cache
def world() -> World:
    rng = np.random.default_rng(5)
    population = sample._next_population(None, rng, 80_000, 3_300)
    drawn = sample._outcome(sample._calibrated(np.random.default_rng(6), population), population, rng)
    # A tenth of keys and a tenth of creatives, as the gate's rows are.
    by_creative = rng.random(3_300) < 0.1
    rows = np.flatnonzero((rng.random(80_000) < 0.1) | by_creative[population.ads["creative"]])
    rows = rows[drawn["impressions"][rows] > 0]
    truth, impressions = drawn["p_click"][rows], drawn["impressions"][rows].astype(float)
    # What no model knows, most of what no picture shows; errors that a refresh inherits; and what each training adds of its own.
    common = np.log(truth) - np.log1p(-truth) - 0.8 * drawn["invisible"][rows]
    inherited, champions, candidates = (rng.standard_normal(len(rows)) for _ in range(3))
    champion = calibrated(common + 0.3 * inherited + 0.1 * champions, truth, impressions)
    base = expected_loss(truth, impressions, champion)
    models = {CHAMPION: champion}
    for name, relative in (("equal", 1.0), ("0.4 % lower", 0.996), ("0.5 % higher", 1.005), ("1 % higher", 1.01)):
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            models[name] = calibrated(common + middle * inherited + 0.1 * candidates, truth, impressions)
            low, high = (middle, high) if expected_loss(truth, impressions, models[name]) < relative * base else (low, middle)
        assert expected_loss(truth, impressions, models[name]) / base == pytest.approx(relative, abs=2e-6)
    names = ("device", "format", "placement")
    segments = {name: population.ads[name][rows] for name in names}
    return World(population.ads["creative"][rows], impressions, truth, segments, models)


def judged(seed: int, models: dict[str, np.ndarray]) -> Evaluation:
    """The models on one draw: creatives with all their rows drawn anew, and then their clicks from the truth."""
    of, rng = world(), np.random.default_rng([seed, 1])
    known, inverse = np.unique(of.creative, return_inverse=True)
    by_creative = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    drawn = [by_creative[creative] for creative in rng.integers(0, len(known), len(known))]
    rows = np.concatenate(drawn)
    clusters = np.repeat(rng.integers(0, 1 << 63, len(drawn)).astype(np.uint64), [len(part) for part in drawn])
    clicks = rng.binomial(of.impressions[rows].astype(int), of.truth[rows])
    slices = {(name, str(value)): np.flatnonzero(codes[rows] == value) for name, codes in of.segments.items() for value in np.unique(codes)}
    # As the gate has it: values with enough clicks, and no others.
    slices = {segment: where for segment, where in slices.items() if clicks[where].sum() >= 400}
    predictions = {name: p[rows] for name, p in models.items()}
    return evaluate(clicks, of.impressions[rows], predictions, clusters, slices)


def ruling(evaluation: Evaluation, candidate: str, **options: Any) -> dict[str, Any]:
    """The verdict with that model for the candidate."""
    names = tuple(CANDIDATE if name == candidate else name for name in evaluation.models)
    return verdict(Evaluation(names, evaluation.slices), MONTHS, **{"max_ne_loss": 0.005, "min_clicks": 1000, **options})


def test_operating_characteristic() -> None:
    promoted, reasons, clicks, tested = Counter[str](), Counter[str](), [], []
    for trial in range(TRIALS):
        evaluation = judged(trial, world().models)
        clicks.append(evaluation.overall.clicks)
        tested.append(len(evaluation.segments))
        for name in RATES:
            found = ruling(evaluation, name)
            promoted[name] += found["promoted"]
            reasons.update(f"{name}: {reason}" for reason in found["refused"])
    assert np.mean(clicks) >= 1800 and np.mean(tested) > 4
    for name, (least, most) in RATES.items():
        # In a tenth of the trials, a rate is that of so many by chance.
        slack = 0.0 if LONG else 3 * math.sqrt(0.05 * 0.95 / TRIALS)
        assert least - slack <= promoted[name] / TRIALS <= most + slack, (promoted, reasons)


# Least and greatest share of trials in which it is promoted.
RATES = {"equal": (0.97, 1), "0.4 % lower": (0.97, 1), "0.5 % higher": (0, 0.07), "1 % higher": (0, 0.03)}


def scaled(p: np.ndarray, factor: float, where: Any = slice(None)) -> np.ndarray:
    out = p.copy()
    out[where] = np.minimum(out[where] * factor, 0.99)
    return out


def test_bad_candidates_are_refused_with_the_reason() -> None:
    of = world()
    mobile = of.segments["device"] == 0
    assert of.impressions[mobile] @ of.truth[mobile] >= 1000
    good, champion = of.models["0.4 % lower"], of.models[CHAMPION]
    bad = {"over": scaled(good, 1.2), "under": scaled(good, 1 / 1.2)}
    wrong = {"wrong in one": scaled(champion, 1.5, mobile), "and right in all": scaled(scaled(champion, 1.5, mobile), 0.5, ~mobile)}
    told = Counter[str]()
    for trial in range(TRIALS // 10):
        evaluation = judged(trial, {CHAMPION: champion, **bad, **wrong})
        for name in bad:
            found = ruling(evaluation, name)
            assert not found["promoted"] and "calibration" in found["refused"] and "limits 0.97 and 1.03" in found["why"]
        for name in wrong:
            found = ruling(evaluation, name)
            told[name] += "device=0" in found["refused"] and "device '0' has normalized entropy" in found["why"]
            biased = {(part["segment"], part["value"]): part for part in found["bias"]}["device", "0"]
            assert 1.2 < biased["calibration_low"] < biased["calibration"] < biased["calibration_high"] < 1.9
            assert not found["promoted"] and "device '0' is predicted 1." in found["why"]
    assert min(told[name] for name in wrong) >= 0.9 * (TRIALS // 10) - (0 if LONG else 1), told


def test_half_a_year_of_small_losses_is_refused() -> None:
    """A candidate that is not much worse than the champion, and is much worse than what was published half a year ago."""
    of = world()
    models = {CHAMPION: of.models["0.5 % higher"], "candidate": of.models["0.5 % higher"], EARLIER_CHAMPION: of.models["0.4 % lower"]}
    found = ruling(judged(0, models), "candidate")
    assert found["status"] == KEPT and found["refused"] == [EARLIER_CHAMPION]
    assert "against the earlier champion (1.00% is allowed)" in found["why"]
    del models[EARLIER_CHAMPION]
    assert ruling(judged(0, models), "candidate")["status"] == PROMOTED


def test_too_few_clicks_are_no_evidence() -> None:
    evaluation = judged(0, {CHAMPION: world().models[CHAMPION], "equal": world().models["equal"]})
    clicks = evaluation.overall.clicks
    found = ruling(evaluation, "equal", min_clicks=clicks + 1)
    assert (found["status"], found["promoted"], found["flagged"]) == (INSUFFICIENT, False, False)
    assert f"{clicks + 1:,} clicks on gate rows are needed, {clicks:,.0f} are there" in found["why"]
    assert ruling(evaluation, "equal", min_clicks=clicks)["status"] == PROMOTED


def test_a_first_model_is_published_and_flagged_unless_it_is_good() -> None:
    of = world()
    base_rate = np.full(len(of.truth), of.impressions @ of.truth / of.impressions.sum())
    noise = calibrated(np.log(base_rate) + np.random.default_rng(0).standard_normal(len(of.truth)), of.truth, of.impressions)
    candidates = {"good": of.models["equal"], "over": scaled(of.models["equal"], 1.2), "no better": noise}
    evaluation = judged(0, {BASE_RATE: base_rate, **candidates})
    refused = {name: ruling(evaluation, name) for name in candidates}
    assert {(found["status"], found["promoted"]) for found in refused.values()} == {(FIRST, True)}
    assert {name: found["refused"] for name, found in refused.items()} == {"good": [], "over": ["calibration"], "no better": [BASE_RATE]}
    assert [found["flagged"] for found in refused.values()] == [False, True, True]
    few = ruling(evaluation, "good", min_clicks=10**6)
    assert (few["status"], few["promoted"], few["flagged"]) == (INSUFFICIENT, True, True)


@pytest.mark.parametrize(("models", "promoted"), [((CANDIDATE, CHAMPION), False), ((CANDIDATE, BASE_RATE), True)])
def test_without_a_row_there_is_no_evidence(models: tuple[str, ...], promoted: bool) -> None:
    found = verdict(Evaluation(models, {}), [], 0.005, 1000)
    assert (found["status"], found["promoted"], found["flagged"]) == (INSUFFICIENT, promoted, promoted)
    assert "no labelled gate row" in found["why"]


def test_a_broken_model_is_not_judged() -> None:
    found = verdict(
        Evaluation((BASE_RATE, CHAMPION), judged(0, {CHAMPION: world().models[CHAMPION]}).slices), MONTHS, 0.005, 1000, "a file is gone"
    )
    assert (found["status"], found["promoted"], found["refused"]) == (KEPT, False, ["damaged"]) and "a file is gone" in found["why"]


def differing(z: float) -> Slice:
    """A slice with 500 clicks in which the candidate is worse than the champion by 1 % and `z` standard errors more."""
    noise = np.random.default_rng(0).standard_normal(REPLICATES)
    noise = 0.003 * (noise - noise.mean()) / noise.std(ddof=1)
    sums = np.ones((1 + REPLICATES, 8))
    sums[:, :2] = 30_000, 500
    sums[:, 2] = 1.01 * np.exp(np.concatenate([[0], noise]) + 0.003 * z)
    return Slice(5000, sums, np.zeros((2, 3, 8)), np.zeros((2, 3, 0, 1)), 0)


@pytest.mark.parametrize(
    ("z", "worse"),
    [
        ((1.7,), {0}),
        ((1.6,), set()),
        ((1.7, 0), set()),
        ((2.0, 0), {0}),
        ((2.0, 1.7), {0, 1}),
        ((2.4, 2.0, 1.6), {0, 1}),
        ((2.1, 2.1, 2.1), set()),
    ],
)
def test_segments_are_tested_by_holms_method(z: tuple[float, ...], worse: set[int]) -> None:
    """One-sided normal quantiles: 1.645 at 5 %, 1.960 at 5 % / 2, 2.128 at 5 % / 3."""
    slices = {("segment", str(i)): differing(value) for i, value in enumerate(z)}
    few = dataclasses.replace(differing(9), sums=np.where(np.arange(8) == 1, 399, differing(9).sums))
    tested, found = worse_segments(Evaluation((CANDIDATE, CHAMPION), {**slices, ("segment", "few"): few, OVERALL: differing(9)}))
    assert tested == len(z) and {int(value or "") for _, value in found} == worse


@pytest.mark.parametrize(("creatives", "tested"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_a_segment_of_few_creatives_does_not_hide_the_others(creatives: int, tested: int) -> None:
    """Of so few, many replicates draw none, and have no loss."""
    clusters = np.arange(creatives, dtype=np.uint64)
    p = {CHAMPION: np.full(creatives, 0.02), CANDIDATE: np.full(creatives, 0.04)}
    found = evaluate(np.full(creatives, 600 / creatives), np.full(creatives, 30_000 / creatives), p, clusters, {})
    few = dataclasses.replace(found.overall, sums=found.overall.sums[:, [0, 1, 5, 6, 7, 2, 3, 4]])
    assert not (few.loss(0) > 0).all()
    slices = {("few", "a"): few, ("segment", "0"): differing(9)}
    count, worse = worse_segments(Evaluation((CANDIDATE, CHAMPION), slices))
    assert count == tested and set(worse) == set(list(slices)[2 - tested :])


def test_slices_are_told_against_the_champion_with_their_intervals() -> None:
    few = dataclasses.replace(differing(1), sums=np.zeros((1 + REPLICATES, 8)))
    models = (CANDIDATE, CHAMPION)
    (found,) = compared(Evaluation(models, {OVERALL: differing(2.0), ("segment", "none"): few}))
    assert (found["segment"], found["value"]) == OVERALL
    middle = math.log(1.01) + 0.003 * 2
    for end, z in (("", 0), ("_low", -1.96), ("_high", 1.96)):
        assert math.log1p(found[f"difference{end}"]) == pytest.approx(middle + 0.003 * z, abs=1e-6)
    assert compared(Evaluation((CANDIDATE, BASE_RATE), {OVERALL: differing(0)})) == []
