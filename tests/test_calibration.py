import numpy as np
import pytest

from model import calibration


def test_a_line_that_was_planted_is_found() -> None:
    rng = np.random.default_rng(0)
    logits, shown = rng.normal(-3, 1, 200_000), rng.integers(1, 20, 200_000)
    clicks = rng.binomial(shown, 1 / (1 + np.exp(-(0.8 * logits - 0.3))))
    slope, shift = calibration.fit(logits, clicks, shown)
    assert (slope, shift) == pytest.approx((0.8, -0.3), abs=0.03)


def test_few_rows_move_the_level_and_not_the_slope() -> None:
    logits, shown = np.linspace(-4, -2, 100), np.full(100, 100)
    slope, shift = calibration.fit(logits, np.repeat([4, 6], 50)[::-1], shown)
    p = 1 / (1 + np.exp(-(slope * logits + shift)))
    assert 0.2 <= slope < 1 and (p * shown).sum() == pytest.approx(500, rel=1e-3)
    assert calibration.fit(logits, np.zeros(100), shown) == (1.0, 0.0)
    assert calibration.fit(np.zeros(0), np.zeros(0), np.zeros(0)) == (1.0, 0.0)
