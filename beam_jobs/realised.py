"""Realised quality: last month's published run, judged by the outcomes that came with this month, before anything is trained.

    adstocrat realised 2026-10 --lake gs://bucket

Of the ads that both months have, what the run's pinned model gave each, moved to the position that the outcome was logged at, is held
against what happened. Writes `realised/<month>/<run>/`, rows of the table `quality`, and `runs/<month>/<run>/realised.json`.
"""

import collections
import dataclasses
import datetime
import functools
import math
import statistics as numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs import drift, statistics
from beam_jobs.arrow import ShardPair, pair_shards, read_table, shards_for
from beam_jobs.duplicates import shard_of_key
from beam_jobs.evaluate import ranker_of, segments_of
from beam_jobs.run import AlarmError, MonthRun
from beam_jobs.workers import read_by_shard
from model import gate, registry, splits
from model.evaluation import OVERALL, Evaluation, Segment, Slice, clusters_of, evaluate, log_ratio, merged, quality
from model.features import MONTH, outcomes
from model.ranker import probabilities
from schemas import lake, tables
from schemas.contract import Contract
from schemas.lake import Manifest
from schemas.parquet import read_columns, write_parquet

FOLDER, MODEL = "realised", "published"
OK, WARN, SCRATCH, STOP = "ok", "warn", "scratch", "stop"
_SCORES = ["key", "creative", "p_click"]
_PARTS_MERGED = 16
# All values of segments together; a value may be off by this many times what the whole may.
_SURE, _FAMILY_WISE, _SEGMENT_LIMIT = 1 - 0.05 / 2, 0.01, 2.0
# The rows that are no gate rows: they alone decide what is trained, for nothing that is trained may follow from a gate row's outcome.
_LEARNT: Segment = ("learnt from", None)
# The log-odds of a click at given positions, float64 (n,), NaN where unknown, against those at the reference position.
Effect = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """What some shards of keys tell.

    Attributes:
        number: of the first shard, for their order.
        evaluation: of the matched rows.
        unmatched: rows, impressions and clicks of ads that last month had not, overall and by segment.
    """

    number: int
    evaluation: Evaluation
    unmatched: Mapping[Segment, tuple[float, float, float]]


_NOTHING = Part(0, Evaluation((MODEL,), {}), {})


def define_pipeline(root: beam.Pipeline, run: MonthRun, month: str, id: str, segments: frozenset[Segment]) -> None:
    """This month's outcomes and last month's scores, by key → sums of metrics → the verdict."""
    scores = run.manifest(lake.stage_folder("scores", month, id))
    shards = shards_for(scores.rows)
    judged = functools.partial(judge_pair, run=run, ranker=scores.info["ranker"], segments=segments)
    rows_of, scores_of = functools.partial(_files, run, "rows", run.month, run.id), functools.partial(_files, run, "scores", month, id)
    read_scores = functools.partial(read_columns, run.storage, columns=_SCORES)
    happened = read_by_shard(root, "Outcomes", run, rows_of, functools.partial(read_outcomes, run), shards, shard_of_key)
    scored = read_by_shard(root, "Scores", run, scores_of, read_scores, shards, shard_of_key)
    _ = (
        pair_shards(happened, scored)
        | "Judge" >> beam.Map(judged).with_output_types(tuple[int, Part])
        | "GroupSome" >> beam.GroupByKey()
        | "MergeSome" >> beam.MapTuple(lambda _, parts: merge_parts(parts)).with_output_types(Part)
        | "Gather" >> beam.combiners.ToList()
        | "Decide" >> beam.Map(decide, run, month, id).with_output_types(Manifest)
    )


def _files(run: MonthRun, stage: str, month: str, id: str) -> list[str]:
    receipts = run.manifest(lake.stage_folder(stage, month, id)).receipts
    return [receipt.file for receipt in receipts if receipt.file and receipt.unit.startswith("shard/")]


def read_outcomes(run: MonthRun, file: str) -> Iterator[pa.RecordBatch]:
    """The rows of a file that have an outcome: key, position, outcome and segments."""
    contract = run.contract
    wanted = {*contract.outcomes, *contract.segments, contract.position, contract.mature_before}
    names = ["key", *(column.name for column in contract.kept if column in wanted)]
    for batch in read_columns(run.storage, file, names):
        month = pa.repeat(pa.scalar(lake.month_number(run.month), pa.int32()), len(batch))
        rows = batch.select(names).append_column(MONTH, month)
        yield rows.filter(pa.array(outcomes(rows, contract)[1] > 0))


def judge_pair(pair: ShardPair, run: MonthRun, ranker: str, segments: frozenset[Segment]) -> tuple[int, Part]:
    """A shard's outcomes against its scores."""
    rows = read_table(run.storage, pair.left).combine_chunks()
    schema = pa.schema([tables.schema("scores").field(name) for name in _SCORES])
    scores = read_table(run.storage, pair.right, schema)
    effect = functools.partial(position_effect, ranker_of(run, ranker), run.contract)
    evaluation, unmatched = judge(rows, scores, run.contract, effect, segments)
    return pair.shard // _PARTS_MERGED, Part(pair.shard, evaluation, unmatched)


def judge(
    rows: pa.Table, scores: pa.Table, contract: Contract, effect: Effect, segments: frozenset[Segment]
) -> tuple[Evaluation, dict[Segment, tuple[float, float, float]]]:
    """Hold scores against the outcomes of their keys; what there is of ads without a score is told apart."""
    batch = next(iter(rows.combine_chunks().to_batches()), pa.RecordBatch.from_pylist([], rows.schema))
    clicks, impressions = (array.astype(np.float64) for array in outcomes(batch, contract))
    at = pc.index_in(batch["key"], scores["key"].combine_chunks())
    matched = at.is_valid().to_numpy(zero_copy_only=False)
    known = batch.filter(pa.array(matched))
    found = scores.take(at.drop_null()).combine_chunks()
    p = found["p_click"].to_numpy()
    moved = probabilities(np.log(p) - np.log1p(-p) + effect(_positions(known, contract)))
    creatives = found["creative"].combine_chunks()
    clusters = clusters_of(pa.record_batch({"key": known["key"], "creative": creatives}))
    slices = {segment: at for segment, at in segments_of(known, contract) if segment in segments}
    if len(learnt := np.flatnonzero(splits.split_of_rows(known["key"], creatives) != splits.GATE)):
        slices[_LEARNT] = learnt
    evaluation = evaluate(clicks[matched], impressions[matched], {MODEL: moved}, clusters, slices)
    unmatched: dict[Segment, tuple[float, float, float]] = {}
    left, left_clicks, left_impressions = batch.filter(pa.array(~matched)), clicks[~matched], impressions[~matched]
    for segment, where in (((OVERALL, None), np.arange(len(left))), *segments_of(left, contract)):
        if segment in segments or segment[1] is None:
            unmatched[segment] = float(len(where)), float(left_impressions[where].sum()), float(left_clicks[where].sum())
    return evaluation, unmatched


def position_effect(ranker: Any, contract: Contract, positions: np.ndarray) -> np.ndarray:
    """What a ranker's log-odds are at each position, over those at the reference: position only adds to them, whatever the row is."""
    if not contract.position or not len(positions):
        return np.zeros(len(positions))
    different, inverse = np.unique(positions, return_inverse=True)
    rows, at = len(different), pa.array(different, mask=np.isnan(different))
    columns: dict[str, pa.Array] = {"key": pa.repeat("", rows)}
    columns |= {column.name: pa.nulls(rows, column.arrow_type) for column in contract.kept}
    columns |= {contract.position.name: at.cast(contract.position.arrow_type), "creative": pa.nulls(rows, pa.string())}
    there, reference = (ranker.predict(pa.record_batch(columns), at_reference=which) for which in (False, True))
    return (np.log(there) - np.log1p(-there) - np.log(reference) + np.log1p(-reference))[inverse]


def merge_parts(parts: Iterable[Part]) -> Part:
    """Parts in their order, as one."""
    ordered = sorted(parts, key=lambda part: part.number)
    totals: dict[Segment, np.ndarray] = collections.defaultdict(lambda: np.zeros(3))
    for segment, told in (item for part in ordered for item in part.unmatched.items()):
        totals[segment] = totals[segment] + told
    evaluation = merged(part.evaluation for part in ordered)
    return Part(ordered[0].number, evaluation, {segment: tuple(total.tolist()) for segment, total in totals.items()})


def decide(parts: Sequence[Part], run: MonthRun, month: str, id: str) -> Manifest:
    """Write the verdict, and the rows of the table `quality`."""
    part = merge_parts(parts) if parts else _NOTHING
    document = {"month": month, "run": id, **ruled(part, run.config.monitor_warn, run.config.monitor_scratch, run.config.monitor_abort)}
    of_month, of_judged = (datetime.date.fromisoformat(f"{name}-01") for name in (month, run.month))
    ranker = run.manifest(lake.stage_folder("scores", month, id)).info["ranker"]
    same = {"month": of_month, "run_id": id, "kind": "realised", "judged_month": of_judged}
    rows = quality(_told(part.evaluation), same, {MODEL: ranker})
    written = write_parquet(run.storage, run.stage(FOLDER), "quality", [rows] if len(rows) else [])
    manifest = lake.commit(run.storage, run.stage(FOLDER), Manifest(FOLDER, (written,), {"month": month, "run": id}))
    # Last, since it is what makes the stage complete.
    run.storage.write_json(f"{run.folder}/realised.json", document)
    return manifest


def ruled(part: Part, warn: float, scratch: float, abort: float) -> dict[str, Any]:
    """What is written of a judgement: the numbers, and what follows from them.

    Args:
        part: of all shards.
        warn, scratch, abort: shares by which predicted clicks may differ from those that came. More than the first, and than chance, calls
            for a warning; an interval that lies wholly beyond the others for training from scratch, and for a stop, where it is of rows
            that may be learnt from.
    """
    whole = part.evaluation.overall
    unmatched = {segment: dict(zip(("rows", "impressions", "clicks"), told, strict=True)) for segment, told in part.unmatched.items()}
    outside = unmatched.pop((OVERALL, None), {"rows": 0.0, "impressions": 0.0, "clicks": 0.0})
    shown = whole.impressions + outside["impressions"]
    mix = [{"segment": segment, "value": value, **told} for (segment, value), told in unmatched.items()]
    rows = [_row(*key, found) for key, found in _told(part.evaluation).slices.items()]
    action, verdict = OK, "no outcome is of an ad that last month had"
    if rows:
        first, learnt = rows[0], part.evaluation.slices.get(_LEARNT)
        off, least = _off(whole, _SURE)
        action = WARN if least and off > warn else OK
        if learnt:
            _, least = _off(learnt, _SURE)
            constant = learnt.ratios(0)["normalized_entropy_low"] or 0.0
            action = STOP if least > abort else SCRATCH if least > scratch or constant > 1 else action
        judged = {key: found for key, found in part.evaluation.segments.items() if found.clicks >= gate.MIN_SEGMENT_CLICKS}
        level = 1 - _FAMILY_WISE / (2 * max(len(judged), 1))
        worse = [(*_off(found, level), key) for key, found in judged.items()]
        bad = sorted(((off, key) for off, least, key in worse if least and off > _SEGMENT_LIMIT * warn), reverse=True)
        action = WARN if bad and action == OK else action
        verdict = f"predicted clicks are {_number(first['calibration'])} of those that came ({_number(first['calibration_low'])} to "
        verdict += f"{_number(first['calibration_high'])}), normalized entropy {_number(first['ne'])}, on {whole.clicks:,.0f} clicks"
        if bad:
            column, value = bad[0][1]
            verdict += f"; {column}={drift.printable(value or '')} is off by {bad[0][0]:.0%}" + (
                f", and {len(bad) - 1} more values" if len(bad) > 1 else ""
            )
    share = whole.impressions / shown if shown else 0.0
    return {"matched_share": share, "unmatched": {**outside, "mix": mix}, "rows": rows, "verdict": verdict, "action": action}


def _told(evaluation: Evaluation) -> Evaluation:
    """Without what only decides."""
    return Evaluation(evaluation.models, {segment: found for segment, found in evaluation.slices.items() if segment != _LEARNT})


def execute(run: MonthRun, launch: Callable[..., None]) -> None:
    """Judge last month's run, if there is one that can be judged and this month has outcomes.

    Args:
        launch: runs `define_pipeline` with what stands behind the run.

    Raises:
        AlarmError: last month's run was too far off for the month to go on.
    """
    month, id = drift.previous(run)
    sketches = statistics.merge(run)
    clicks = {key[1:]: sketch.clicks for key, sketch in sketches.items() if key[2] is not None}
    labelled = statistics.in_slice(sketches, statistics.LABELLED)
    scores = lake.read_manifest(run.storage, lake.stage_folder("scores", month, id)) if month else None
    made = scores and lake.read_manifest(run.storage, lake.model_folder("ranker", scores.info["ranker"]))
    if made and made.info.get("format") == registry.FORMAT and any(sketch.rows for sketch in labelled.values()):
        columns = {column.name for column in run.contract.segments}
        wanted = {key for key, sum_ in clicks.items() if key[0] in columns and sum_ >= gate.MIN_SEGMENT_CLICKS}
        launch(month, id, frozenset(wanted))
    else:
        document = {"month": month or None, "run": id or None, **ruled(_NOTHING, 1, 1, 1)}
        why = "the month has no outcomes" if made else "no run of last month can be judged"
        run.storage.write_json(f"{run.folder}/realised.json", {**document, "verdict": why})
    check(run)


def check(run: MonthRun) -> None:
    """Stop where last month's run was too far off.

    Raises:
        AlarmError: by how much.
    """
    if (told := run.document("realised")) and told["action"] == STOP:
        raise AlarmError(
            f"{run.month} is stopped before anything is trained: of {told['month']}, run {told['run']}, {told['verdict']}; "
            f"monitor_abort is {run.config.monitor_abort}"
        )


def trained_as(run: MonthRun) -> MonthRun:
    """The run as it is to be trained: from scratch, where last month's outcomes say so."""
    if (told := run.document("realised")) and told["action"] == SCRATCH:
        return dataclasses.replace(run, config=dataclasses.replace(run.config, train_mode="scratch"))
    return run


def _positions(batch: pa.RecordBatch, contract: Contract) -> np.ndarray:
    if not contract.position:
        return np.zeros(len(batch))
    return batch[contract.position.name].cast(pa.float64()).to_numpy(zero_copy_only=False)


def _row(segment: str, value: str | None, found: Slice) -> dict[str, Any]:
    metrics = found.ratios(0)
    short = {"normalized_entropy": "ne", "calibration": "calibration"}
    named = {new + end: metrics[old + end] for old, new in short.items() for end in ("", "_low", "_high")}
    counts = {"impressions": int(found.impressions), "clicks": int(found.clicks)}
    return {"segment": None if value is None else segment, "value": value, **counts, **named}


def _off(found: Slice, level: float) -> tuple[float, float]:
    """By what share predicted clicks differ from those that came, and by what share at least: 0 where it may be chance."""
    ratio, error = log_ratio(found.predicted(0), found.sums[:, 1])
    if not math.isfinite(ratio) or not math.isfinite(error):
        # Next to no clicks, so that some or all of the replicates have none: counts as Poisson's.
        predicted, clicks = float(found.predicted(0)[0]), found.clicks
        ratio, error = math.log((predicted + 0.5) / (clicks + 0.5)), 1 / math.sqrt(max(predicted, clicks) + 0.5)
    least = max(abs(ratio) - numbers.NormalDist().inv_cdf(level) * error, 0.0)
    return abs(math.expm1(ratio)), abs(math.expm1(math.copysign(least, ratio)))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
