"""The pass over the window before training: what there is to learn from, the features' spec, and whether a column tells the outcome."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from model import splits
from model.features import Features, Fitter, learnable, month_of, outcomes
from model.leakage import Guard
from model.seen import ALWAYS, History, Tallies
from schemas.contract import Contract


class NothingToLearnError(ValueError):
    """The window has no click, or nothing but clicks."""


@dataclasses.dataclass
class Survey:
    """What one pass over the window finds.

    Attributes:
        features: their spec, with the window's history where it was asked for.
        new_ids: in a refresh, the ids of values that the parent had not seen, by vocabulary.
        months: rows, clicks and impressions of the labelled TRAIN rows of each month.
    """

    features: Features
    new_ids: list[np.ndarray]
    months: dict[int, tuple[int, float, float]]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _, _ in self.months.values())

    @property
    def clicks(self) -> float:
        return sum(clicks for _, clicks, _ in self.months.values())

    @property
    def impressions(self) -> float:
        return sum(impressions for _, _, impressions in self.months.values())

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
    tallies, months = Tallies(names), dict[int, tuple[int, float, float]]()
    for batch in batches:
        kept, split = learnable(batch)
        train = kept.filter(pa.array(split == splits.TRAIN))
        clicks, impressions = outcomes(train, contract)
        known, month = impressions > 0, month_of(train)
        labelled = train.filter(pa.array(known))
        fitter.add(train, labelled)
        guard.add(train, clicks, impressions)
        if known.any():
            rows, some_clicks, some_impressions = months.get(month, (0, 0.0, 0.0))
            more = int(known.sum()), float(clicks.sum(dtype=np.float64)), float(impressions.sum(dtype=np.float64))
            months[month] = (rows + more[0], some_clicks + more[1], some_impressions + more[2])
            if with_history:
                tallies.add(labelled, month, clicks[known], impressions[known])
    found = Survey(Features(contract, (), (), (), 0), [], months)
    if not 0 < found.clicks < found.impressions:
        raise NothingToLearnError(
            f"{found.clicks:,.0f} clicks in {found.impressions:,.0f} impressions of {found.rows:,} labelled rows to learn from; "
            "expected at least one click and one impression without: are these the right months, and are their outcomes filled in?"
        )
    guard.check()
    found.features, found.new_ids = fitter.grown(parent) if parent else (fitter.fit(), [])
    if with_history:
        # Months before the window are known by the parent alone.
        seen = History(names, {**kept_months, **tallies.months()}, found.base_rate)
        found.features = dataclasses.replace(found.features, history=seen.folded(min(months)))
    return found
