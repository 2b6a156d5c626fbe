"""The pass over the window before training: what there is to learn from, the features' spec, and whether a column tells the outcome."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from model import splits
from model.features import Features, Fitter, learnable, month_of, outcomes
from model.leakage import Guard
from model.seen import ALWAYS, History, Tallies
from schemas.contract import Contract


class NothingToLearnError(ValueError):
    """The window has no click, or nothing but clicks."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one pass over the window finds.

    Attributes:
        features: their spec, with the window's history where it was asked for.
        new_ids: in a refresh, the ids of values that the parent had not seen, by vocabulary.
        months: how many labelled TRAIN rows each month has.
        clicks, impressions: of all of them.
    """

    features: Features
    new_ids: list[np.ndarray]
    months: Mapping[int, int]
    clicks: float
    impressions: float

    @property
    def rows(self) -> int:
        return sum(self.months.values())

    @property
    def base_rate(self) -> float:
        return min(max(self.clicks / self.impressions, 1e-6), 1 - 1e-6)


def survey(
    batches: Iterable[pa.RecordBatch], contract: Contract, embedding_width: int, parent: Features | None, with_history: bool = False
) -> Survey:
    """Count the labelled TRAIN rows, fit the features to the TRAIN rows, or let the parent's grow by what is new.

    Raises:
        ValueError: no click or only clicks among them.
        LeakageError: a column gives the outcome away.
    """
    fitter, guard = Fitter(contract, embedding_width), Guard(contract)
    names = (*ALWAYS, *(column.name for column in contract.features if "history" in column.tags))
    kept_months = parent.history.months if parent and parent.history else {}
    tallies, months, all_clicks, all_impressions = Tallies(names), Counter[int](), 0.0, 0.0
    for batch in batches:
        kept, split = learnable(batch)
        train = kept.filter(pa.array(split == splits.TRAIN))
        clicks, impressions = outcomes(train, contract)
        known, month = impressions > 0, month_of(train)
        labelled = train.filter(pa.array(known))
        fitter.add(train, labelled)
        guard.add(train, clicks, impressions)
        if known.any():
            months[month] += int(known.sum())
            all_clicks += float(clicks.sum(dtype=np.float64))
            all_impressions += float(impressions.sum(dtype=np.float64))
            if with_history:
                tallies.add(labelled, month, clicks[known], impressions[known])
    if not 0 < all_clicks < all_impressions:
        raise NothingToLearnError(
            f"{all_clicks:,.0f} clicks in {all_impressions:,.0f} impressions of {months.total():,} labelled rows to learn from; "
            "expected at least one click and one impression without: are these the right months, and are their outcomes filled in?"
        )
    guard.check()
    features, new_ids = fitter.grown(parent) if parent else (fitter.fit(), [])
    found = Survey(features, new_ids, months, all_clicks, all_impressions)
    if not with_history:
        return found
    # Months before the window are known by the parent alone.
    seen = History(names, {**kept_months, **tallies.months()}, found.base_rate)
    return dataclasses.replace(found, features=dataclasses.replace(features, history=seen.folded(min(months))))
