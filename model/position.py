"""What a position does to clicks, told by the same ads at different positions.

Where better ads get better positions, a model takes for the position's what it does not know of the ad. So, once it is trained, the
effects are estimated anew within each key over the months: whatever belongs to the ad cancels out. Where keys do not come again, they stay
as they were.
"""

from collections.abc import Iterable

import numpy as np

# Rows that are looked at, at most, and the prior precision of an effect around what the model has learnt.
MOST_ROWS = 1 << 20
_PRECISION = 10.0


def within_keys(rows: Iterable[tuple[np.ndarray, ...]], effects: np.ndarray) -> np.ndarray:
    """The effects, float64 (hats,), by Newton's method on the likelihood of each key's clicks given their sum.

    Args:
        rows: batches of key hash (rows,), clicks, impressions, log-odds without the position's effect, and position hats (rows, hats).
        effects: what the model has learnt, (hats,).
    """
    held, count = [], 0
    for batch in rows:
        held.append(batch)
        count += len(batch[0])
        if count >= MOST_ROWS:
            break
    if not held:
        return effects.astype(np.float64)
    keys, clicks, shown, logits, hats = (np.concatenate(column) for column in zip(*held, strict=True))
    # One key's clicks say next to nothing of all effects together, so their mean stays; only what they differ by is looked for.
    hats, logits = hats - 1 / len(effects), logits + effects.mean()
    _, key, often = np.unique(keys, return_inverse=True, return_counts=True)
    total = np.bincount(key, clicks)
    use = (often[key] > 1) & (total[key] > 0)
    _, key = np.unique(key[use], return_inverse=True)
    clicks, shown, logits, hats = clicks[use].astype(float), shown[use].astype(float), logits[use].astype(float), hats[use].astype(float)
    beta = effects.astype(np.float64)
    for _ in range(20):
        p = 1 / (1 + np.exp(-np.clip(logits + hats @ beta, -40, 40)))
        expected = shown * p
        # Each row's share of its key's clicks, and how that share moves with the effects.
        share = expected * (np.bincount(key, clicks) / np.maximum(np.bincount(key, expected), 1e-12))[key]
        slopes = hats * (1 - p)[:, None]
        mean = np.stack([np.bincount(key, share * column) for column in slopes.T], axis=1)
        sums = np.maximum(np.bincount(key, share), 1e-12)
        centred = slopes - (mean / sums[:, None])[key]
        gradient = centred.T @ (clicks - share) - _PRECISION * (beta - effects)
        hessian = (centred * share[:, None]).T @ centred + _PRECISION * np.eye(len(beta))
        move = np.linalg.solve(hessian, gradient)
        beta += np.clip(move, -0.5, 0.5)
        if np.abs(move).max(initial=0.0) < 1e-8:
            break
    return beta
