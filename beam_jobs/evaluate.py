"""Evaluate: candidate, champion and base rate on the gate rows of the newest labelled month, and which model scores the month.

    adstocrat evaluate 2026-10 --lake gs://bucket

Writes `evaluation/<month>/<run>/`.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from beam_jobs.join import month_rows
from beam_jobs.pairs import CANDIDATE, CHAMPION, peers
from beam_jobs.run import MonthRun, StageError
from beam_jobs.workers import Listed
from model import registry, splits
from model.evaluation import Sums, verdict
from model.features import outcomes
from schemas import lake
from schemas.lake import Manifest, Receipt

FOLDER = "evaluation"
BASE_RATE = "base_rate"


def define_pipeline(root: beam.Pipeline, run: MonthRun, candidate: Manifest) -> None:
    """The gate rows of the window's months → sums by month and model → the verdict on the newest month that has labelled ones."""
    encoder = candidate.info["encoder"]
    _ = (
        root
        | "Units" >> Listed(run, functools.partial(units, run, encoder), tuple[str, str, Receipt])
        | "SpreadUnits" >> beam.Reshuffle()
        | "JudgeUnit" >> beam.FlatMap(judge, run, encoder).with_output_types(tuple[str, str, Mapping[str, Sums]])
        | "Gather" >> beam.combiners.ToList()
        | "Decide" >> beam.Map(decide, run, encoder)
    )


def units(run: MonthRun, encoder: str) -> list[tuple[str, str, Receipt]]:
    """The units of rows of all months of the window."""
    return [(month, id, unit) for month, id in run.window for unit in month_rows(run, month, id, encoder).units]


def judge(unit: tuple[str, str, Receipt], run: MonthRun, encoder: str) -> Iterable[tuple[str, str, dict[str, Sums]]]:
    """Sums of a unit's labelled gate rows under each model, at each row's own position."""
    month, id, receipt = unit
    models = {CANDIDATE: _ranker(run, run.version)}
    models |= {name: _ranker(run, pair.ranker) for name, pair in peers(run).items()}
    sums: dict[str, Sums] = {}
    for batch in month_rows(run, month, id, encoder).batches(receipt):
        clicks, impressions = outcomes(batch, run.contract)
        gate = (splits.split_of_rows(batch["key"], batch["creative"]) == splits.GATE) & (impressions > 0)
        rows, clicks, impressions = batch.filter(pa.array(gate)), clicks[gate], impressions[gate]
        predictions = {name: ranker.predict(rows, at_reference=False) for name, ranker in models.items()}
        predictions[BASE_RATE] = np.full(len(clicks), models[CANDIDATE].base_rate)
        for name, probability in predictions.items():
            sums[name] = sums.get(name, Sums()) + Sums.of(clicks, impressions, probability)
    yield month, receipt.unit, sums


def decide(judged: list[tuple[str, str, Mapping[str, Sums]]], run: MonthRun, encoder: str) -> Manifest:
    """The verdict, on the newest month with labelled gate rows, as the stage's manifest."""
    labelled = [month for month, _, sums in judged if sums and sums[CANDIDATE].impressions]
    month = max(labelled, default=run.month)
    # In the order of units: sums of floats depend on their order, and the order in which units come on the runner.
    of_month = [sums for judged_month, _, sums in sorted(judged, key=lambda unit: unit[:2]) if judged_month == month]
    total = {name: sum((sums.get(name, Sums()) for sums in of_month), Sums()) for name in (CANDIDATE, CHAMPION, BASE_RATE)}
    peer = peers(run).get(CHAMPION)
    ruling = verdict(total[CANDIDATE], total[CHAMPION] if peer else None, total[BASE_RATE])
    if run.champion and not peer:
        ruling["why"] += "; the champion is of another contract or encoder, and cannot score these rows"
    scored_with = peer.ranker if peer and not ruling["promoted"] else run.version
    metrics = {name: sums.metrics() for name, sums in total.items() if name != CHAMPION or peer}
    info: dict[str, Any] = {**ruling, "month": month, "encoder": encoder, "ranker": scored_with, "metrics": metrics}
    return lake.commit(run.storage, run.stage(FOLDER), Manifest("evaluate", (), info))


def keep_champion(run: MonthRun, why: str) -> Manifest:
    """The verdict where there is no candidate: the champion scores the month."""
    assert run.champion is not None
    info = {"promoted": False, "flagged": False, "why": why, "month": run.month, "metrics": {CANDIDATE: Sums().metrics()}}
    pair = {"encoder": run.champion.encoder, "ranker": run.champion.ranker}
    return lake.commit(run.storage, run.stage(FOLDER), Manifest("evaluate", (), {**info, **pair}))


@functools.lru_cache(2)
def _ranker(run: MonthRun, version: str) -> Any:
    ranker = registry.load(run.storage, "ranker", version)
    if ranker.fingerprint != run.contract.fingerprint:
        raise StageError(f"ranker {version!r} was trained under contract {ranker.fingerprint}, the month has {run.contract.fingerprint}")
    return ranker
