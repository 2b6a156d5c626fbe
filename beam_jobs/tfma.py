"""The evaluation in the format of TensorFlow Model Analysis, for those who have its tools; off the scoring path, and slow.

pip install .[pipeline,tfma]
adstocrat evaluate 2026-10 --lake gs://bucket --write-tfma DIR
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import beam_jobs.arrow  # noqa: F401  the coder of batches
from beam_jobs.evaluate import Plan, Unit, define_plan, judged_pairs, predicted
from beam_jobs.run import MonthRun
from model.gate import BASE_RATE

LABEL, WEIGHT = "adstocrat_label", "adstocrat_weight"
# Its metrics that we have as well, by our name.
METRICS = {
    "log_loss": "BinaryCrossEntropy",
    "calibration": "Calibration",
    "roc_auc": "AUC",
    "pr_auc": "AUCPrecisionRecall",
    "brier": "MeanSquaredError",
    "impressions": "WeightedExampleCount",
}


def check_installed() -> None:
    """Look for the extra.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("tensorflow_model_analysis") is None:
        raise ValueError("TensorFlow Model Analysis is not installed; run `pip install .[pipeline,tfma]` in this package's source")


def weighted(
    clicks: np.ndarray, impressions: np.ndarray, predictions: Mapping[str, np.ndarray], segments: Mapping[str, pa.Array]
) -> pa.RecordBatch:
    """Rows as its examples: for each row its clicks as one positive of that weight, and the rest as one negative."""
    shares = ((1.0, clicks), (0.0, impressions - clicks))
    parts = []
    for label, weight in shares:
        columns: dict[str, Any] = {LABEL: np.full(len(weight), label, np.float32), WEIGHT: weight.astype(np.float32), **predictions}
        lists = {name: _lists(pa.array(column)) for name, column in {**columns, **segments}.items()}
        parts.append(pa.RecordBatch.from_pydict(lists).filter(pa.array(weight > 0)))
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def _lists(column: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(len(column) + 1, dtype=np.int32)), column)


def define_pipeline(root: beam.Pipeline, run: MonthRun, folder: str) -> None:
    """The run's gate rows → its metrics of every model, overall and by segment, in a folder."""
    units, plan = define_plan(root, run)
    examples = units | "Predict" >> beam.FlatMap(read_examples, run, beam.pvalue.AsSingleton(plan)).with_output_types(pa.RecordBatch)
    judged = run.manifest(run.stage("evaluation")).info["metrics"]
    write(examples, list(judged) or [BASE_RATE, *run.peers()], [column.name for column in run.contract.segments], folder)


def read_examples(unit: Unit, run: MonthRun, plan: Plan) -> Iterator[pa.RecordBatch]:
    """A unit's gate rows as examples."""
    for rows, clicks, impressions, predictions in predicted(unit, run, plan, judged_pairs(run, plan)):
        if rows.num_rows:
            segments = {column.name: pc.fill_null(rows[column.name].cast(pa.string()), "") for column in run.contract.segments}
            yield weighted(clicks, impressions, predictions, segments)


def write(examples: "beam.PCollection[pa.RecordBatch]", models: Sequence[str], segments: Sequence[str], folder: str) -> None:
    """Write what it computes of examples, as `weighted` makes them, with a column of predictions for each of two models or more."""
    import tensorflow_model_analysis as tfma
    from google.protobuf import text_format
    from tensorflow_model_analysis.proto import config_pb2

    specs = [
        f'model_specs {{ name: "{name}" prediction_key: "{name}" label_key: "{LABEL}" example_weight_key: "{WEIGHT}" }}' for name in models
    ]
    slices = ["slicing_specs {}", *(f'slicing_specs {{ feature_keys: "{name}" }}' for name in segments)]
    metrics = " ".join(f'metrics {{ class_name: "{name}" }}' for name in METRICS.values())
    named = " ".join(f'model_names: "{name}"' for name in models)
    text = " ".join([*specs, *slices, f"metrics_specs {{ {metrics} {named} example_weights {{ weighted: true }} }}"])
    config = text_format.Parse(text, config_pb2.EvalConfig())
    _ = (
        examples
        | "ToExtracts" >> tfma.BatchedInputsToExtracts()
        | "Evaluate" >> tfma.ExtractAndEvaluate(tfma.default_extractors(eval_config=config), tfma.default_evaluators(eval_config=config))
        | "Write" >> tfma.WriteResults(tfma.default_writers(folder, eval_config=config))
    )
