"""Calibration of a ranker: a line through its log-odds, smooth and rising.

Its slope is fitted on rows that the ranker has not learnt from, since that is what learning bends. Those are few creatives, and what no
row tells of them moves their clicks by some per cent together; so the line's height is fitted on the newest month's TRAIN and TUNE rows.

The position's effect stays out of the line: it is known by itself, and added to it. Better ads get better positions, also by what a model
does not know of them, so no line is right in sum both at the rows' own positions and at the reference: rows far down, of which too
much is expected, count for more at the reference. What is fitted is half-way between the two.
"""

from collections.abc import Iterable

import numpy as np

# Prior precision of the slope around 1, and of the height around what the slope's rows say of it: a few clicks move them little.
_SLOPE_PRECISION, _HEIGHT_PRECISION = 400.0, 30.0
_LEAST_SLOPE = 0.2
# Log-odds from one end to the other, so finely that a bin's mean stands for its rows.
_END, _BINS = 16.0, 4096
# Of the change of trust around none; and how much more it may become.
_TRUST_PRECISION, _MOST_TRUST = 100.0, 0.5


def fit(logits: np.ndarray, effects: np.ndarray, clicks: np.ndarray, impressions: np.ndarray) -> tuple[float, float]:
    """Slope and shift of the line with the least binomial log loss, by Newton's method; (1, 0) where there is nothing to fit to.

    Args: arrays of shape (rows,).
        logits: without the position's effect.
        effects: what the position adds to them.
    """
    if not 0 < clicks.sum() < impressions.sum():
        return 1.0, 0.0
    x, weight = logits.astype(np.float64), _weight(effects)
    # As many impressions in all as there are.
    weight /= np.average(weight, weights=impressions)
    n, c = impressions * weight, clicks * weight
    line = _newton(np.stack([x, np.ones(len(x))], axis=1), effects, n, c, np.array([1.0, 0.0]), np.array([_SLOPE_PRECISION, 1e-6]))
    return max(float(line[0]), _LEAST_SLOPE), float(line[1])


def height(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """What is to be added to log-odds for them to expect the clicks there were, near 0 where clicks are few.

    Args:
        parts: of the rows, each four arrays as for `fit`. Rows of about the same log-odds are summed up, so there may be any number.
    """
    sums = np.zeros((4, _BINS))
    for logits, effects, clicks, impressions in parts:
        at, weight = np.clip(logits.astype(np.float64) + effects, -40, 40), _weight(effects)
        place = ((at + _END) * (_BINS / (2 * _END))).astype(np.int64).clip(0, _BINS - 1)
        for i, values in enumerate((impressions, impressions * weight, clicks * weight, impressions * weight * at)):
            sums[i] += np.bincount(place, values, _BINS)
    shown, n, c, total = sums[:, sums[1] > 0]
    scale = shown.sum() / max(n.sum(), 1e-9)
    line = _newton(np.ones((len(n), 1)), total / n, n * scale, c * scale, np.zeros(1), np.array([_HEIGHT_PRECISION]))
    return float(line[0])


def trust(logits: np.ndarray, slopes: np.ndarray, clicks: np.ndarray, impressions: np.ndarray) -> tuple[float, float]:
    """By how much more or less than 1 to multiply the embeddings of creatives that neither encoder nor ranker has learnt from.

    Of what it has learnt from, an encoder says more than it would of anything else, and so a ranker that learns from the same creatives
    trusts it too far. It is what it says of one creative against another that is too much, and not of all together.

    Args: arrays of shape (rows,), of rows of such creatives.
        logits: as they are with the whole embedding.
        slopes: how they change with the factor.

    Returns:
        The change of the factor, and what is to be added to these rows' log-odds for their mean to stay.
    """
    inputs = np.stack([slopes, np.ones(len(slopes))], axis=1).astype(np.float64)
    found = _newton(inputs, logits.astype(np.float64), impressions, clicks, np.zeros(2), np.array([_TRUST_PRECISION, 1e-6]))
    change = float(np.clip(found[0], -1.0, _MOST_TRUST))
    return change, -change * float(np.average(slopes, weights=impressions))


def _weight(effects: np.ndarray) -> np.ndarray:
    """What rows count for half-way from their own positions to the reference."""
    return np.exp(-effects.astype(np.float64) / 2)


def _newton(
    inputs: np.ndarray, offset: np.ndarray, impressions: np.ndarray, clicks: np.ndarray, prior: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """Coefficients, shape (k,), of inputs (rows, k) with the highest posterior density; `precision` is that of `prior`, (k,) each."""
    found = prior
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(inputs @ found + offset, -40, 40)))
        gradient = inputs.T @ (impressions * p - clicks) + precision * (found - prior)
        hessian = (inputs * (impressions * p * (1 - p))[:, None]).T @ inputs + np.diag(precision)
        move = np.linalg.solve(hessian, gradient)
        found = found - move / max(1.0, float(np.abs(move).max()))
        if np.abs(move).max() < 1e-9:
            break
    return found
