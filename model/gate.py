"""The gate: whether a candidate may take the place of what is published, by a paired comparison on the same gate rows.

A candidate is refused only for what the rows show: log loss that may be worse by more than the margin, calibration that is off beyond
doubt, a segment that is worse beyond doubt, or a model that does not load or does not say what it said when it was trained.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from model.evaluation import Z_TWO_SIDED, Evaluation, Slice, interval, log_ratio

CANDIDATE, CHAMPION, EARLIER_CHAMPION, BASE_RATE = "candidate", "champion", "earlier_champion", "base_rate"
PROMOTED, KEPT, FIRST, INSUFFICIENT = "promoted", "kept", "first", "insufficient_evidence"
# Clicks from which a segment's value is judged by itself, and how much worse it may be.
MIN_SEGMENT_CLICKS, MAX_SEGMENT_LOSS = 400, 0.01
CALIBRATION = (0.97, 1.03)
_BIASED_TOLD = 3
_LEVEL, _Z_ONE_SIDED = 0.05, 1.644854
# Share of the replicates that must have rows of a segment for the segment to be tested: those of three creatives have.
_DRAWN = 0.9


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The normalized entropy of one model relative to another's on the same rows.

    Attributes:
        difference: relative; 0.01 is worse by 1 %.
        upper: its upper limit at one-sided 95 %; NaN where there is too little to tell.
        z: of the hypothesis that it is worse by no more than a margin, in standard errors; high where it is, NaN as `upper`.
    """

    difference: float
    upper: float
    z: float

    @classmethod
    def of(cls, found: Slice, model: int, peer: int, margin: float) -> "Comparison":
        """Compare; the entropy of the rows themselves is the same for both and cancels."""
        loss, peers = found.loss(model), found.loss(peer)
        # A replicate may draw none of a segment's few creatives. Where that is seldom, the others tell.
        drawn = peers > 0
        if drawn[0] and drawn.mean() >= _DRAWN:
            loss, peers = loss[drawn], peers[drawn]
        difference, error = log_ratio(loss, peers)
        over = difference - math.log1p(margin)
        z = over / error if error else math.copysign(math.inf, over)
        return cls(math.expm1(difference), math.expm1(difference + _Z_ONE_SIDED * error), z)

    def __str__(self) -> str:
        return f"{self.difference:+.2%}, at most {self.upper:+.2%} at one-sided 95 %"


def verdict(evaluation: Evaluation, months: Sequence[str], max_ne_loss: float, min_clicks: int, broken: str = "") -> dict[str, Any]:
    """Whether the candidate is promoted.

    A first model is published all the same, since every ad must get a score: flagged, where it would have been refused, is no better than
    the base rate, or there is too little to judge it by.

    Args:
        evaluation: of `CANDIDATE`, `BASE_RATE` and, where there are such, `CHAMPION` and `EARLIER_CHAMPION`.
        months: whose gate rows were judged, the newest first.
        max_ne_loss: relative loss of normalized entropy that is allowed against the champion; twice that against the earlier one.
        min_clicks: below so many clicks nothing is judged.
        broken: what is wrong with the candidate's files; it has not been judged then.

    Returns:
        `status`, `promoted`, `flagged`, `why` in one paragraph with the numbers, `refused` (the names of what it was refused for), and
        `bias`: the segments that are over- or under-predicted beyond doubt, with intervals.
    """
    overall, first = evaluation.overall, CHAMPION not in evaluation.models
    rows = f"{overall.rows:,} gate rows of {', '.join(months)} with {overall.clicks:,.0f} clicks" if months else "no labelled gate row"
    status, told, refused = FIRST, rows, {"damaged": broken} if broken else {}
    if not broken and overall.clicks < min_clicks:
        refused[INSUFFICIENT] = f"{min_clicks:,} clicks on gate rows are needed, {overall.clicks:,.0f} are there"
    elif not broken:
        told, refused = _judged(evaluation, first, max_ne_loss)
        told = f"{told}, on {rows}"
    if INSUFFICIENT in refused:
        status = INSUFFICIENT
    elif not first:
        status = KEPT if refused else PROMOTED
    biased = bias(evaluation)
    off = "".join(f"; {_biased(part)}" for part in biased[:_BIASED_TOLD])
    off += f"; {len(biased) - _BIASED_TOLD} more segments are off" if len(biased) > _BIASED_TOLD else ""
    consequence = "published all the same, as it is the first, and flagged" if first else "the champion stays"
    return {
        "status": status,
        "promoted": first or not refused,
        "flagged": first and bool(refused),
        "why": (f"{'; '.join(refused.values())} ({rows}); {consequence}" if refused else told) + off,
        "refused": list(refused),
        "bias": biased,
    }


def _judged(evaluation: Evaluation, first: bool, max_ne_loss: float) -> tuple[str, dict[str, str]]:
    """What was found in words, and what the candidate is refused for, each by a name and in words with the numbers."""
    overall, models, refused = evaluation.overall, evaluation.models, {}
    candidate = models.index(CANDIDATE)
    told = [f"normalized entropy {overall.ratios(candidate)['normalized_entropy'] or math.nan:.5f}"]
    margins = {BASE_RATE: 0.0} if first else {CHAMPION: max_ne_loss, EARLIER_CHAMPION: 2 * max_ne_loss}
    for peer, margin in margins.items():
        if peer in models:
            compared = Comparison.of(overall, candidate, models.index(peer), margin)
            told.append(f"{compared} against the {peer.replace('_', ' ')} ({margin:.2%} is allowed)")
            if not compared.upper <= margin:
                refused[peer] = f"normalized entropy {told[-1]}"
    text, fits = _calibration(overall, candidate)
    told.append(text)
    if not fits:
        refused["calibration"] = text
    if not first:
        tested, worse = worse_segments(evaluation)
        told.append(f"none of {tested} segments is worse by more than {MAX_SEGMENT_LOSS:.0%}")
        refused |= {f"{name}={value}": f"{name} {value!r} has normalized entropy {compared}" for (name, value), compared in worse.items()}
    return ", ".join(told), refused


def worse_segments(evaluation: Evaluation) -> tuple[int, dict[tuple[str, str | None], Comparison]]:
    """How many segments were tested, and those that are worse than the champion's by more than the margin: Holm's method, 5 % in all."""
    candidate, champion = evaluation.models.index(CANDIDATE), evaluation.models.index(CHAMPION)
    tested = [
        (Comparison.of(found, candidate, champion, MAX_SEGMENT_LOSS), segment)
        for segment, found in evaluation.segments.items()
        if found.clicks >= MIN_SEGMENT_CLICKS
    ]
    # Those of one or two creatives cannot be told from chance.
    tested = [item for item in tested if not math.isnan(item[0].z)]
    worse = {}
    for rank, (compared, segment) in enumerate(sorted(tested, key=lambda item: -item[0].z)):
        if not math.erfc(compared.z / math.sqrt(2)) / 2 <= _LEVEL / (len(tested) - rank):
            break
        worse[segment] = compared
    return len(tested), worse


def bias(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Segments whose predicted over actual clicks, by the candidate, have an interval without 1; what is off most comes first."""
    if CANDIDATE not in evaluation.models:
        return []
    names = ("calibration", "calibration_low", "calibration_high")
    found = []
    for (segment, value), part in evaluation.segments.items():
        if part.clicks >= MIN_SEGMENT_CLICKS:
            metrics = part.ratios(evaluation.models.index(CANDIDATE))
            low, high = metrics["calibration_low"], metrics["calibration_high"]
            if low is not None and high is not None and not low <= 1 <= high:
                found.append({"segment": segment, "value": value, **{name: metrics[name] for name in names}})
    return sorted(found, key=lambda off: -abs(math.log(off["calibration"])))


def compared(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The candidate's normalized entropy relative to the champion's by slice: `difference`, 0.01 is 1 % worse, with its 95 % interval."""
    if not {CANDIDATE, CHAMPION} <= set(evaluation.models):
        return []
    candidate, champion = evaluation.models.index(CANDIDATE), evaluation.models.index(CHAMPION)
    found = []
    for (segment, value), part in evaluation.slices.items():
        difference, error = log_ratio(part.loss(candidate), part.loss(champion))
        if math.isfinite(error):
            low, high = difference - Z_TWO_SIDED * error, difference + Z_TWO_SIDED * error
            relative = interval("difference", math.expm1(difference), math.expm1(low), math.expm1(high))
            found.append({"segment": segment, "value": value, **relative})
    return found


def _biased(part: dict[str, Any]) -> str:
    interval = f"{part['calibration']:.2f} ({part['calibration_low']:.2f} to {part['calibration_high']:.2f})"
    return f"{part['segment']} {part['value']!r} is predicted {interval} of its clicks"


def _calibration(found: Slice, model: int) -> tuple[str, bool]:
    """Predicted over actual clicks in words, and whether they may be within the limits."""
    metrics = found.ratios(model)
    low, high = (metrics[name] or math.nan for name in ("calibration_low", "calibration_high"))
    text = f"calibration {metrics['calibration']:.3f} ({low:.3f} to {high:.3f}, limits {CALIBRATION[0]} and {CALIBRATION[1]})"
    return text, low <= CALIBRATION[1] and high >= CALIBRATION[0]
