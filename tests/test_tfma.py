"""Our metrics are those of TensorFlow Model Analysis, and its own loader reads what we write in its format.

50,000 rows where ADSTOCRAT_LONG is set, a fiftieth of that otherwise.
"""

import os
import pathlib

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest

from beam_jobs import tfma
from beam_jobs.runner import run_pipeline
from model.evaluation import OVERALL, evaluate

ROWS = 50_000 if os.environ.get("ADSTOCRAT_LONG") else 1_000
# As it names them in its results.
NAMES = {
    "log_loss": "binary_crossentropy",
    "calibration": "calibration",
    "roc_auc": "auc",
    "pr_auc": "auc_precision_recall",
    "brier": "mean_squared_error",
    "impressions": "weighted_example_count",
}
DEVICES = ("mobile", "desktop", "tv")


def test_metrics_agree(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    impressions = rng.integers(0, 30, ROWS)
    good = rng.beta(1, 12, ROWS) * 0.98 + 0.001
    clicks, device = rng.binomial(impressions, good), rng.choice(len(DEVICES), ROWS)
    other = np.clip(good * np.exp(0.4 * rng.standard_normal(ROWS)), 1e-4, 0.99)
    # What it computes with is float32.
    predictions = {name: p.astype(np.float32).astype(np.float64) for name, p in (("candidate", good), ("champion", other))}
    examples = tfma.weighted(clicks, impressions, predictions, {"device": pa.array(DEVICES).take(pa.array(device))})
    parts = [examples.slice(start, 4096) for start in range(0, len(examples), 4096)]
    folder = str(tmp_path / "results")
    run_pipeline(
        lambda root: tfma.write(root | beam.Create(parts).with_output_types(pa.RecordBatch), list(predictions), ["device"], folder),
        [],
    )
    slices = {("device", name): np.flatnonzero(device == code) for code, name in enumerate(DEVICES)}
    ours = evaluate(clicks, impressions, predictions, np.arange(ROWS).astype(np.uint64), slices, replicates=0)

    import tensorflow_model_analysis

    assert set(NAMES) == set(tfma.METRICS)
    for model, name in enumerate(ours.models):
        theirs = tensorflow_model_analysis.load_eval_result(folder, model_name=name).slicing_metrics
        by_slice = {key[0] if key else (OVERALL, None): metrics[""][""] for key, metrics in theirs}
        assert set(by_slice) == set(ours.slices)
        for segment, metrics in by_slice.items():
            found = ours.slices[segment].metrics(model)
            for mine, its in NAMES.items():
                tolerance = {"abs": 1e-3} if mine.endswith("auc") else {"rel": 1e-6}
                assert found[mine] == pytest.approx(metrics[its]["doubleValue"], **tolerance), (name, segment, mine)
