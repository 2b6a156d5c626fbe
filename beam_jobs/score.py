"""Score: RunInference over the whole inventory, labelled or not, with the pair that the gate chose.

    adstocrat score 2026-10 --lake gs://bucket

Writes `scores/<month>/<run>/`: one row for each ingested row, always.
"""

import datetime
import functools
from collections.abc import Iterator

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.ml.inference.base import RunInference

from beam_jobs.arrow import CommitStage, WriteUnits
from beam_jobs.inference import Named, RankerHandler
from beam_jobs.join import month_rows
from beam_jobs.run import MonthRun
from beam_jobs.workers import Listed
from schemas import tables
from schemas.lake import Manifest, Receipt


def define_pipeline(root: beam.Pipeline, run: MonthRun, evaluation: Manifest) -> None:
    """Units of rows → joined batches → scores, a file a unit."""
    encoder, ranker = evaluation.info["encoder"], evaluation.info["ranker"]
    info, carried = {"encoder": encoder, "ranker": ranker}, [column.name for column in run.contract.carried]
    _ = (
        root
        | "Units" >> Listed(lambda: month_rows(run, run.month, run.id, encoder).units, Receipt)
        | "Join" >> beam.FlatMap(functools.partial(read_unit, run, encoder)).with_output_types(Named)
        | "Score" >> RunInference(RankerHandler(run.storage, ranker, carried, encoder)).with_output_types(Named)
        | "Label" >> beam.MapTuple(functools.partial(label, run, encoder, ranker)).with_output_types(Named)
        | "WriteScores" >> beam.ParDo(WriteUnits(run.storage, run.stage("scores"), count)).with_output_types(Receipt)
        | "CommitScores" >> CommitStage(run.storage, run.stage("scores"), "score", info)
    )


def read_unit(run: MonthRun, encoder: str, unit: Receipt) -> Iterator[Named]:
    """A unit's joined batches, named by where they start."""
    start = 0
    for batch in month_rows(run, run.month, run.id, encoder).batches(unit):
        yield f"{unit.unit}@{start}", batch
        start += batch.num_rows


def label(run: MonthRun, encoder: str, ranker: str, name: str, scores: pa.RecordBatch) -> Named:
    """The scores as rows of the score table: with the month, the versions and the run."""
    same = {"month": datetime.date.fromisoformat(f"{run.month}-01"), "encoder_version": encoder, "model_version": ranker, "run_id": run.id}
    columns, fields = [], []
    for field in tables.schema("scores", run.contract):
        column = pa.repeat(pa.scalar(same[field.name], field.type), len(scores)) if field.name in same else scores[field.name]
        # Texts that are codes are written as these.
        columns.append(column if pa.types.is_dictionary(column.type) else column.cast(field.type))
        fields.append(field.with_type(columns[-1].type))
    return name, pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def count(scores: pa.RecordBatch) -> dict[str, int]:
    """Scores by what they rest on, for the ledger."""
    counts = {"scored": len(scores)}
    for column in ("score_status", "image_status"):
        for found in pc.value_counts(scores[column]).to_pylist():
            counts[f"{column}:{found['values']}"] = found["counts"]
    return counts
