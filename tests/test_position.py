import numpy as np
import pytest

from model import position

TRUE = np.array([0.0, -0.4, -0.8])


def rows(seed: int, months: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ads of which the better ones get the better positions, by something that the log-odds here do not know."""
    rng = np.random.default_rng(seed)
    key = np.tile(np.arange(20_000), months)
    quality = np.tile(rng.normal(size=20_000), months)
    place = np.clip(np.round(1 - 0.7 * quality + rng.normal(size=len(key))), 0, 2).astype(int)
    clicks = rng.binomial(100, 1 / (1 + np.exp(-(-4.5 + quality + TRUE[place]))))
    return key.astype(np.uint64), clicks, np.full(len(key), 100.0), np.full(len(key), -4.5), np.eye(3)[place]


def test_effects_are_told_by_the_same_ads_elsewhere() -> None:
    batch = rows(0, 3)
    # By position alone better ads are at the top.
    rate = [batch[1][batch[4][:, place] > 0].mean() for place in range(3)]
    assert np.log(rate[2] / rate[0]) < -1.5
    halves = ([column[start::2] for column in batch] for start in (0, 1))
    effects = position.within_keys(halves, np.array([0.0, -1.0, -2.0]))
    assert effects - effects[0] == pytest.approx(TRUE, abs=0.05)


def test_log_odds_that_spread_too_far_do_not_carry_the_effects_away() -> None:
    keys, clicks, shown, logits, hats = rows(2, 3)
    overfit = logits + np.random.default_rng(5).normal(0, 0.5, len(logits))
    effects = position.within_keys([(keys, clicks, shown, overfit, hats)], np.array([0.0, -1.0, -2.0]))
    assert effects.mean() == pytest.approx(-1.0, abs=1e-6)
    assert effects - effects[0] == pytest.approx(TRUE, abs=0.08)


def test_keys_that_do_not_come_again_leave_the_effects_as_they_were() -> None:
    before = np.array([0.0, -1.0, -2.0])
    assert position.within_keys([rows(1, 1)], before).tolist() == before.tolist()
    assert position.within_keys([], before).tolist() == before.tolist()
