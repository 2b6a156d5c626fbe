import numpy as np
import pytest

from model import calibration


def test_a_line_that_was_planted_is_found() -> None:
    rng = np.random.default_rng(0)
    logits, shown = rng.normal(-3, 1, 200_000), rng.integers(1, 20, 200_000)
    effects = rng.choice([0.0, -0.5, -1.0], len(logits))
    clicks = rng.binomial(shown, 1 / (1 + np.exp(-(0.8 * logits - 0.3 + effects))))
    slope, shift = calibration.fit(logits, effects, clicks, shown)
    assert (slope, shift) == pytest.approx((0.8, -0.3), abs=0.03)


def test_few_rows_move_the_level_and_not_the_slope() -> None:
    logits, shown = np.linspace(-4, -2, 100), np.full(100, 100)
    slope, shift = calibration.fit(logits, np.zeros(100), np.repeat([4, 6], 50)[::-1], shown)
    p = 1 / (1 + np.exp(-(slope * logits + shift)))
    assert 0.2 <= slope < 1 and (p * shown).sum() == pytest.approx(500, rel=1e-3)
    assert calibration.fit(logits, np.zeros(100), np.zeros(100), shown) == (1.0, 0.0)
    assert calibration.fit(*[np.zeros(0)] * 4) == (1.0, 0.0)


def test_the_height_is_what_the_clicks_say_and_few_clicks_say_little() -> None:
    rng = np.random.default_rng(2)
    logits, effects, shown = rng.normal(-4, 1, 100_000), rng.choice([0.0, -0.5], 100_000), rng.integers(1, 20, 100_000)
    clicks = rng.binomial(shown, 1 / (1 + np.exp(-(logits + effects + 0.2))))
    found = calibration.height(zip(*(np.array_split(column, 7) for column in (logits, effects, clicks, shown)), strict=True))
    assert found == pytest.approx(0.2, abs=0.015)
    # Rows are summed up by their log-odds, of which that tells nothing: as many clicks are expected as there were, by each row's weight.
    weight = np.exp(-effects / 2)
    expected = np.sum(weight * shown / (1 + np.exp(-logits - effects - found)))
    assert np.sum(weight * clicks) == pytest.approx(expected, rel=3e-3)
    # One impression, and it was clicked.
    assert 0 < calibration.height([(np.full(1, -4.0), np.zeros(1), np.ones(1), np.ones(1))]) < 0.05
    assert calibration.height([(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0))]) == 0


def test_the_level_is_between_what_rows_at_their_positions_and_at_the_reference_want() -> None:
    """Rows far down are worse than is known of them."""
    rng = np.random.default_rng(1)
    effects, shown = rng.choice([0.0, -1.0], 200_000), np.full(200_000, 20)
    truth = -3 + effects + np.where(effects < 0, -0.2, 0.2)
    slope, shift = calibration.fit(np.full(len(effects), -3.0), effects, rng.binomial(shown, 1 / (1 + np.exp(-truth))), shown)

    def ratio(moved: np.ndarray) -> float:
        return float((1 / (1 + np.exp(-(-3 * slope + shift + effects - moved)))).sum() / (1 / (1 + np.exp(-(truth - moved)))).sum())

    own, reference = ratio(np.zeros(len(effects))), ratio(effects)
    assert 0.9 < own < 1 < reference < 1.1 and abs(np.log(own * reference)) < 0.01


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_the_trust_in_images_that_rows_bear_out_is_found_and_their_mean_stays(mean: float) -> None:
    rng = np.random.default_rng(4)
    rest, image = rng.normal(-2, 0.5, 30_000), rng.normal(0, 0.5, 30_000)
    impressions = rng.integers(1, 50, 30_000).astype(float)
    clicks = rng.binomial(impressions.astype(int), 1 / (1 + np.exp(-(rest + mean + 0.7 * image)))).astype(float)
    change, height = calibration.trust(rest + mean + image, mean + image, clicks, impressions)
    assert change == pytest.approx(-0.3, abs=0.03)
    assert height == pytest.approx(0.3 * mean, abs=0.03)
    told = [column[:20] for column in (rest + image, image, clicks, impressions)]
    assert abs(calibration.trust(*told)[0]) < 0.1
    # However little an encoder says, it is not believed many times over.
    assert calibration.trust(rest + image / 9, image / 9, clicks, impressions)[0] == 0.5
