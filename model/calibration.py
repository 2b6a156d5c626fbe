"""Calibration of a ranker: a line through its log-odds, smooth and rising, fitted on rows that it has not learnt from.

The position's effect stays out of the line: it is known by itself, and added to it. Better ads get better positions, also by what a model
does not know of them, so no line is right in sum both at the rows' own positions and at the reference: rows far down, of which too
much is expected, count for more at the reference. What is fitted is half-way between the two.
"""

import numpy as np

# Prior precision of the slope around 1: a few hundred clicks move it little.
_SLOPE_PRECISION = 400.0
_LEAST_SLOPE = 0.2


def fit(logits: np.ndarray, effects: np.ndarray, clicks: np.ndarray, impressions: np.ndarray) -> tuple[float, float]:
    """Slope and shift of the line with the least binomial log loss, by Newton's method; (1, 0) where there is nothing to fit to.

    Args: arrays of shape (rows,).
        logits: without the position's effect.
        effects: what the position adds to them.
    """
    if not 0 < clicks.sum() < impressions.sum():
        return 1.0, 0.0
    weight = np.exp(-effects.astype(np.float64) / 2)
    weight /= np.average(weight, weights=impressions)
    x, n, c = logits.astype(np.float64), impressions * weight, clicks * weight
    slope = np.array([1.0, 0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(slope[0] * x + slope[1] + effects, -40, 40)))
        miss, weight = n * p - c, n * p * (1 - p)
        gradient = np.array([(miss * x).sum() + _SLOPE_PRECISION * (slope[0] - 1), miss.sum()])
        hessian = np.array([[(weight * x * x).sum() + _SLOPE_PRECISION, (weight * x).sum()], [(weight * x).sum(), weight.sum() + 1e-6]])
        move = np.linalg.solve(hessian, gradient)
        slope = slope - move / max(1.0, float(np.abs(move).max()))
        if np.abs(move).max() < 1e-9:
            break
    return max(float(slope[0]), _LEAST_SLOPE), float(slope[1])
