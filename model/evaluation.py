"""How good a model is on gate rows, and whether it may be published.

Every number is per impression: a row is `clicks` positives and `impressions - clicks` negatives.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sums:
    """Mergeable sums over evaluated rows, from which every metric follows.

    Attributes:
        rows: labelled rows.
        clicks, impressions: their outcomes.
        log_loss: sum over impressions of the log loss, in nats.
        predicted: sum over impressions of the predicted probability.
    """

    rows: int = 0
    clicks: float = 0.0
    impressions: float = 0.0
    log_loss: float = 0.0
    predicted: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + theirs for mine, theirs in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @classmethod
    def of(cls, clicks: np.ndarray, impressions: np.ndarray, probability: np.ndarray) -> "Sums":
        """Sums of labelled rows; arrays of shape (rows,), probabilities inside (0, 1)."""
        clicks, impressions = clicks.astype(np.float64), impressions.astype(np.float64)
        loss = -(clicks * np.log(probability) + (impressions - clicks) * np.log1p(-probability))
        return cls(len(clicks), float(clicks.sum()), float(impressions.sum()), float(loss.sum()), float((impressions * probability).sum()))

    def metrics(self) -> dict[str, float | int | None]:
        """Log loss, normalized entropy (He et al. 2014) and calibration (predicted over actual clicks); None where undefined."""
        rate = self.clicks / self.impressions if self.impressions else 0.0
        loss = self.log_loss / self.impressions if self.impressions else None
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else None
        return {
            "rows": self.rows,
            "clicks": self.clicks,
            "impressions": self.impressions,
            "log_loss": loss,
            "normalized_entropy": loss / entropy if entropy and loss is not None else None,
            "calibration": self.predicted / self.clicks if self.clicks else None,
        }


def verdict(candidate: Sums, champion: Sums | None, base_rate: Sums) -> dict[str, Any]:
    """Whether the candidate is promoted, judged by log loss against the champion's on the same rows, or the base rate's for a first model.

    A first model that is no better than the base rate is published all the same, flagged, since every ad must get a score.

    Returns:
        `promoted`, `flagged`, and `why` in one sentence with the numbers.
    """
    peer, name = (champion, "the champion's") if champion else (base_rate, "the base rate's")
    if not candidate.impressions:
        promoted, why = champion is None, "there is no labelled gate row to judge by"
    else:
        loss, reference = candidate.log_loss / candidate.impressions, peer.log_loss / peer.impressions
        promoted = loss <= reference
        why = f"log loss {loss:.5f} against {name} {reference:.5f} on {candidate.rows:,} gate rows with {candidate.clicks:,.0f} clicks"
    flagged = champion is None and not (promoted and candidate.impressions > 0)
    return {"promoted": promoted or champion is None, "flagged": flagged, "why": why}
