"""Evaluate: candidate, champion and base rate on the gate rows of the newest labelled month, and which model scores the month.

    adstocrat evaluate 2026-10 --lake gs://bucket

Writes `evaluation/<month>/<run>/`, and the same beside the candidate.
"""

import collections
import dataclasses
import datetime
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.inference import probabilities_of
from beam_jobs.join import month_rows
from beam_jobs.run import MonthRun, StageError
from beam_jobs.workers import Listed
from model import gate, registry, splits
from model.evaluation import COLD, OVERALL, WARM, Evaluation, Segment, clusters_of, evaluate, merged, quality
from model.features import outcomes
from model.gate import CANDIDATE, CHAMPION
from model.registry import ModelError
from model.seen import among
from schemas import lake
from schemas.contract import Contract
from schemas.hashing import hash64_column
from schemas.lake import Champion, Manifest, Receipt
from schemas.parquet import write_parquet

FOLDER = "evaluation"
# So many units are judged one after another, and merged as they are: few evaluations are in memory, and in the same order in every run.
_UNITS_TOGETHER = 16
Unit = tuple[str, str, Receipt, int]  # month and run of rows, their unit, and its number


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a unit's rows tell before any model has seen them.

    Attributes:
        rows: labelled gate rows.
        clicks: their clicks, overall and by segment.
        trained: uint64 hashes of the creatives that models are trained on.
    """

    month: str
    rows: int
    clicks: Mapping[Segment, float]
    trained: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is judged.

    Attributes:
        months: whose gate rows, the newest first.
        segments: the values that have enough clicks to be judged by themselves.
        trained: sorted uint64 hashes of the creatives that models are trained on: warm, all others are cold.
        broken: what is wrong with the candidate's files, if anything.
    """

    months: tuple[str, ...]
    segments: frozenset[Segment]
    trained: np.ndarray
    broken: str


def define_pipeline(root: beam.Pipeline, run: MonthRun) -> None:
    """The window's units → clicks by month and segment → what is judged → evaluations of units → the verdict."""
    units, plan = define_plan(root, run)
    _ = (
        units
        | "KeySome" >> beam.Map(lambda unit: (unit[3] // _UNITS_TOGETHER, unit)).with_output_types(tuple[int, Unit])
        | "GroupSome" >> beam.GroupByKey()
        | "JudgeSome" >> beam.Map(judge_some, run, beam.pvalue.AsSingleton(plan)).with_output_types(tuple[int, Evaluation])
        | "Gather" >> beam.combiners.ToList()
        | "Decide" >> beam.Map(decide, run, beam.pvalue.AsSingleton(plan)).with_output_types(Manifest)
    )


def define_plan(root: beam.Pipeline, run: MonthRun) -> "tuple[beam.PCollection[Unit], beam.PCollection[Plan]]":
    """The window's units, and what of them is judged."""
    units = root | "Units" >> Listed(functools.partial(units_of, run), Unit)
    plan = (
        units
        | "CountUnit" >> beam.Map(count, run).with_output_types(Counted)
        | "GatherCounts" >> beam.combiners.ToList()
        | "Plan" >> beam.Map(lambda counted: make_plan(counted, run.config.min_gate_clicks, broken(run))).with_output_types(Plan)
    )
    return units, plan


def units_of(run: MonthRun) -> list[Unit]:
    """The units of rows of all months of the window."""
    found = [(month, id, unit) for month, id in run.window for unit in month_rows(run, month, id, None).units]
    return [(*unit, number) for number, unit in enumerate(found)]


def count(unit: Unit, run: MonthRun) -> Counted:
    """Clicks on a unit's gate rows, and the creatives of its training rows."""
    month, id, receipt, _ = unit
    clicks: dict[Segment, float] = collections.defaultdict(float)
    rows, trained = 0, [np.empty(0, np.uint64)]
    for batch in month_rows(run, month, id, None).batches(receipt):
        clicked, impressions = outcomes(batch, run.contract)
        split = splits.split_of_rows(batch["key"], batch["creative"])
        learnt = batch["creative"].filter(pa.array((split == splits.TRAIN) & (impressions > 0)))
        trained.append(hash64_column(pc.unique(learnt.drop_null())))
        judged = (split == splits.GATE) & (impressions > 0)
        rows += int(judged.sum())
        clicks[OVERALL, None] += float(clicked[judged].sum(dtype=np.float64))
        for segment, found in segments_of(batch.filter(pa.array(judged)), run.contract):
            clicks[segment] += float(clicked[judged][found].sum(dtype=np.float64))
    return Counted(month, rows, dict(clicks), np.unique(np.concatenate(trained)))


def make_plan(counted: Sequence[Counted], min_clicks: int, broken: str = "") -> Plan:
    """The newest month with labelled gate rows, and earlier ones while these have too few clicks."""
    total: dict[Segment, float] = collections.defaultdict(float)
    months: list[str] = []
    for month in sorted({unit.month for unit in counted}, reverse=True):
        units = [unit for unit in counted if unit.month == month]
        if total[OVERALL, None] < min_clicks and any(unit.rows for unit in units):
            months.append(month)
            for segment, clicks in (told for unit in units for told in unit.clicks.items()):
                total[segment] += clicks
    segments = frozenset(segment for segment, clicks in total.items() if segment[1] is not None and clicks >= gate.MIN_SEGMENT_CLICKS)
    trained = np.unique(np.concatenate([np.empty(0, np.uint64), *(unit.trained for unit in counted)]))
    return Plan(tuple(months), segments, trained, broken)


def broken(run: MonthRun) -> str:
    """What is wrong with the candidate's files, told by loading them in a fresh process; empty where nothing is."""
    try:
        registry.prove(run.storage, run.encoder, run.version)
    except ModelError as error:
        return str(error)
    return ""


def judged_pairs(run: MonthRun, plan: Plan) -> dict[str, Champion]:
    """The pairs that the run's gate compares, the candidate first."""
    return run.peers() if plan.broken else {CANDIDATE: run.candidate, **run.peers()}


def judge_some(some: tuple[int, Iterable[Unit]], run: MonthRun, plan: Plan) -> tuple[int, Evaluation]:
    """The evaluation of some units of the pairs that the gate compares, beside the number of these units."""
    number, units = some
    return number, judge(sorted(units, key=lambda unit: unit[3]), run, plan, judged_pairs(run, plan))


def judge(units: Iterable[Unit], run: MonthRun, plan: Plan, pairs: Mapping[str, Champion]) -> Evaluation:
    """Evaluate pairs on the gate rows of units, a unit in memory at a time."""
    return merged(_judged(unit, run, plan, pairs) for unit in units)


def _judged(unit: Unit, run: MonthRun, plan: Plan, pairs: Mapping[str, Champion]) -> Evaluation:
    parts = [part for part in predicted(unit, run, plan, pairs) if len(part[1])]
    if not parts:
        return Evaluation((), {})
    batches, clicks, impressions, predictions = zip(*parts, strict=True)
    # At once, since the rows of a creative share its weight in a replicate, which is what takes the time.
    rows = pa.concat_batches([batch.drop_columns("embedding") for batch in batches])
    of_models = {name: np.concatenate([some[name] for some in predictions]) for name in predictions[0]}
    slices = slices_of(rows, run.contract, plan)
    return evaluate(np.concatenate(clicks), np.concatenate(impressions), of_models, clusters_of(rows), slices)


def predicted(
    unit: Unit, run: MonthRun, plan: Plan, pairs: Mapping[str, Champion]
) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """A unit's labelled gate rows, their clicks and impressions, and what each pair says of them.

    Predictions are at each row's own position, each with the embeddings of the pair's own encoder; and beside them the base rate.
    """
    month, id, receipt, _ = unit
    if month not in plan.months or not pairs:
        return
    encoders = {pair.encoder: month_rows(run, month, id, pair.encoder).batches(receipt) for pair in pairs.values()}
    for batches in zip(*encoders.values(), strict=True):
        clicks, impressions = outcomes(batches[0], run.contract)
        judged = (splits.split_of_rows(batches[0]["key"], batches[0]["creative"]) == splits.GATE) & (impressions > 0)
        by_encoder = {encoder: batch.filter(pa.array(judged)) for encoder, batch in zip(encoders, batches, strict=True)}
        predictions: dict[str, np.ndarray] = {}
        for name, pair in pairs.items():
            ranker = ranker_of(run, pair.ranker)
            predictions[name] = probabilities_of(by_encoder[pair.encoder], ranker)
            predictions.setdefault(gate.BASE_RATE, np.full(len(predictions[name]), ranker.base_rate))
        yield next(iter(by_encoder.values())), clicks[judged], impressions[judged], predictions


def slices_of(rows: pa.RecordBatch, contract: Contract, plan: Plan) -> dict[Segment, np.ndarray]:
    """Row numbers of the slices that are judged: warm, cold and the segments with enough clicks."""
    segments = {segment: found for segment, found in segments_of(rows, contract) if segment in plan.segments}
    return {**dict(warm_and_cold(rows["creative"], plan.trained)), **segments}


def warm_and_cold(creatives: pa.Array, trained: np.ndarray) -> Iterator[tuple[Segment, np.ndarray]]:
    """Numbers of the rows whose creative was trained on, and of those whose was not; a row without a creative is neither."""
    known = creatives.is_valid().to_numpy(zero_copy_only=False)
    warm, _ = among(trained, hash64_column(creatives))
    for name, rows in ((WARM, known & warm), (COLD, known & ~warm)):
        if rows.any():
            yield (name, None), np.flatnonzero(rows)


def segments_of(batch: pa.RecordBatch, contract: Contract) -> Iterator[tuple[Segment, np.ndarray]]:
    """Numbers of the rows of each value of each segment column; a missing value is the empty one."""
    for column in contract.segments:
        coded = pc.fill_null(batch[column.name].cast(pa.string()), "").dictionary_encode()
        codes = coded.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(coded.dictionary)))
        for value, rows in zip(coded.dictionary.to_pylist(), np.split(order, ends[:-1]), strict=True) if len(codes) else ():
            yield (column.name, value), rows


def decide(judged: Sequence[tuple[int, Evaluation]], run: MonthRun, plan: Plan) -> Manifest:
    """The verdict and the numbers behind it, as the stage's manifest, and beside the candidate.

    Raises:
        StageError: the first model is broken, so there is none to publish.
    """
    evaluation = merged(evaluation for _, evaluation in sorted(judged, key=lambda some: some[0]))
    known = run.peers()
    if not evaluation.models:
        evaluation = Evaluation((CANDIDATE, gate.BASE_RATE, *known), {})
    ruling = gate.verdict(evaluation, plan.months, run.config.max_ne_loss, run.config.min_gate_clicks, plan.broken)
    if plan.broken and CHAMPION not in known:
        raise StageError(f"{plan.broken}; there is no champion to score {run.month} with, so remove its folder and train again")
    if run.champion and CHAMPION not in known:
        ruling["why"] += "; the champion is of another contract or model format, and cannot score these rows"
    pairs = {CANDIDATE: run.candidate, **known}
    pair = pairs[CANDIDATE if ruling["promoted"] else CHAMPION]
    metrics = {name: evaluation.overall.metrics(model) for model, name in enumerate(evaluation.models)}
    month = plan.months[0] if plan.months else run.month
    info: dict[str, Any] = {**ruling, "month": month, "encoder": pair.encoder, "ranker": pair.ranker, "metrics": metrics}
    info["reliability"] = {name: evaluation.overall.reliability(i) for i, name in enumerate(evaluation.models) if name != gate.BASE_RATE}
    info["compared"] = gate.compared(evaluation)
    versions = {gate.BASE_RATE: None, **{name: pair.ranker for name, pair in pairs.items()}}
    of_month, of_judged = (datetime.date.fromisoformat(f"{name}-01") for name in (run.month, month))
    same = {"month": of_month, "run_id": run.id, "kind": "evaluation", "judged_month": of_judged}
    rows = quality(evaluation, same, versions)
    written = write_parquet(run.storage, run.stage(FOLDER), "quality", [rows])
    manifest = lake.commit(run.storage, run.stage(FOLDER), Manifest("evaluate", (written,), info))
    return lake.commit(run.storage, f"{lake.model_folder('ranker', run.version)}/evaluation", manifest)


def keep_champion(run: MonthRun, why: str) -> Manifest:
    """The verdict where there is no candidate: the champion scores the month."""
    assert run.champion is not None
    ruling = {"status": gate.KEPT, "promoted": False, "flagged": False, "why": why, "refused": ["not trained"], "bias": []}
    info = {"month": run.month, "metrics": {}, "encoder": run.champion.encoder, "ranker": run.champion.ranker}
    return lake.commit(run.storage, run.stage(FOLDER), Manifest("evaluate", (), {**ruling, **info}))


def check_promoted(run: MonthRun) -> None:
    """Stop where a promotion is required and the gate refused.

    Raises:
        StageError: says why it refused.
    """
    info = run.manifest(run.stage(FOLDER)).info
    if run.config.require_promotion and not info["promoted"]:
        raise StageError(f"{run.month} is not scored, as a promotion is required and the candidate was refused: {info['why']}")


@functools.lru_cache(4)
def ranker_of(run: MonthRun, version: str) -> Any:
    """A ranker that was trained under the run's contract, loaded once a process."""
    ranker = registry.load(run.storage, "ranker", version)
    if ranker.fingerprint != run.contract.fingerprint:
        raise StageError(f"ranker {version!r} was trained under contract {ranker.fingerprint}, the month has {run.contract.fingerprint}")
    return ranker
