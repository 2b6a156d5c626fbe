"""Evaluation: our metrics, with bootstrap intervals and without, beside TensorFlow Model Analysis.

    scripts/bench evaluate [-- --rows 200000 --slice 20000 --rounds 3]

Two models with their predictions, overall and in three slices, on Beam's local runner. A row is one impression, so that it is one example
to both. TFMA gets `--slice` rows, and what each takes for 100 rows is start.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench import harness
from bench.harness import Bar, Clock, Told

DEVICES = ("mobile", "desktop", "tv")
# The stage evaluates the gate rows of a unit at once, which are about as many.
BATCH, FEW = 200_000, 100
# Once over them takes us less than the runner's start varies.
PASSES = 10
REPLICATES = 400
# As it names them in its results.
NAMES = {
    "log_loss": "binary_crossentropy",
    "calibration": "calibration",
    "roc_auc": "auc",
    "pr_auc": "auc_precision_recall",
    "brier": "mean_squared_error",
}


def rows_of(rows: int) -> dict[str, np.ndarray]:
    """Columns of the rows; the first n are the same whatever their number is."""
    rng = np.random.default_rng(0)
    good = rng.beta(1, 12, 1 << 20) * 0.98 + 0.001
    other = np.clip(good * np.exp(0.4 * rng.standard_normal(1 << 20)), 1e-4, 0.99)
    columns = {
        "clicks": rng.binomial(1, good),
        # What TFMA computes with is float32.
        "candidate": good.astype(np.float32).astype(np.float64),
        "champion": other.astype(np.float32).astype(np.float64),
        "device": rng.integers(0, len(DEVICES), 1 << 20),
        "creative": rng.integers(0, 20_000, 1 << 20).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
    }
    return {name: column[:rows] for name, column in columns.items()}


def lay_out(flags: argparse.Namespace) -> None:
    """The rows for us, and as examples in its own format for TFMA."""
    from beam_jobs.tfma import weighted

    for rows in (FEW, flags.slice, flags.rows):
        pq.write_table(pa.table(rows_of(rows)), flags.work / f"rows-{rows}.parquet")
    for rows in (FEW, flags.slice):
        columns = rows_of(rows)
        predictions = {name: columns[name] for name in ("candidate", "champion")}
        devices = pa.array(DEVICES).take(pa.array(columns["device"]))
        examples = weighted(columns["clicks"], np.ones(rows, np.int64), predictions, {"device": devices})
        pq.write_table(pa.Table.from_batches([examples]), flags.work / f"examples-{rows}.parquet")


def read(path: str, rows: int) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(path).iter_batches(rows)


def evaluated(batch: pa.RecordBatch, replicates: int) -> Any:
    from model.evaluation import evaluate

    columns = {name: batch[name].to_numpy() for name in batch.schema.names}
    slices = {("device", name): np.flatnonzero(columns["device"] == code) for code, name in enumerate(DEVICES)}
    predictions = {name: columns[name] for name in ("candidate", "champion")}
    return evaluate(columns["clicks"], np.ones(len(batch)), predictions, columns["creative"], slices, replicates)


def ours(flags: argparse.Namespace) -> Told:
    return _ours(flags, REPLICATES)


def ours_without_intervals(flags: argparse.Namespace) -> Told:
    return _ours(flags, 0)


def _ours(flags: argparse.Namespace, replicates: int) -> Told:
    clock = Clock()
    import apache_beam as beam

    import beam_jobs.arrow  # noqa: F401  the coder of batches
    from beam_jobs.runner import run_pipeline
    from model.evaluation import merged

    clock.lap("imports")

    def write(judged: list[Any], rows: int) -> None:
        whole = merged(judged)
        told = {
            f"{name}/{segment[1] or segment[0]}": one.metrics(model)
            for model, name in enumerate(whole.models)
            for segment, one in whole.slices.items()
        }
        (flags.work / f"ours-{replicates}-{rows}.json").write_text(json.dumps(told))

    def run(rows: int) -> None:
        run_pipeline(
            lambda root: (
                root
                | beam.Create([str(flags.work / f"rows-{rows}.parquet")] * PASSES)
                | "Read" >> beam.FlatMap(read, BATCH).with_output_types(pa.RecordBatch)
                | "Evaluate" >> beam.Map(evaluated, replicates)
                | beam.combiners.ToList()
                | "Write" >> beam.Map(write, rows)
            ),
            [],
        )

    run(FEW)
    clock.lap("first time")
    run(FEW)
    few = clock.lap(f"{FEW} rows")
    run(flags.rows)
    seconds, start = clock.lap("run") - few, {"imports": clock.laps["imports"], f"{FEW} rows": few}
    # What is compared with TFMA's.
    run(flags.slice)
    return {"units": flags.rows * PASSES, "seconds": seconds, "cpu": clock.cpu["run"] - clock.cpu[f"{FEW} rows"], "start": start}


def tfma(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import apache_beam as beam
    import tensorflow_model_analysis

    from beam_jobs import tfma as written
    from beam_jobs.runner import run_pipeline

    clock.lap("imports")

    def run(rows: int) -> float:
        started = time.monotonic()
        source, folder = beam.Create([str(flags.work / f"examples-{rows}.parquet")]), str(flags.work / f"tfma-{rows}")
        examples = beam.FlatMap(read, 4096).with_output_types(pa.RecordBatch)
        run_pipeline(lambda root: written.write(root | source | "Read" >> examples, ["candidate", "champion"], ["device"], folder), [])
        return time.monotonic() - started

    run(FEW)
    start = run(FEW)
    seconds = run(flags.slice) - start
    told = {}
    for name in ("candidate", "champion"):
        for key, metrics in tensorflow_model_analysis.load_eval_result(
            str(flags.work / f"tfma-{flags.slice}"), model_name=name
        ).slicing_metrics:
            told[f"{name}/{key[0][1] if key else 'overall'}"] = {its: metrics[""][""][its]["doubleValue"] for its in NAMES.values()}
    (flags.work / "tfma.json").write_text(json.dumps(told))
    return {"units": flags.slice, "seconds": seconds, "start": {"imports": clock.laps["imports"], f"{FEW} rows": start}}


def bench(flags: argparse.Namespace) -> None:
    lay_out(flags)
    turns = harness.take_turns(flags, list(SIDES))
    theirs = json.loads((flags.work / "tfma.json").read_text())
    off = dict.fromkeys(NAMES, 0.0)
    for replicates in (REPLICATES, 0):
        whole, mine = (json.loads((flags.work / f"ours-{replicates}-{rows}.json").read_text()) for rows in (flags.rows, flags.slice))
        assert mine.keys() == theirs.keys() == whole.keys() and whole["candidate/overall"]["rows"] == flags.rows * PASSES, whole
        for slice_, told in theirs.items():
            off = {metric: max(off[metric], abs(mine[slice_][metric] - told[its])) for metric, its in NAMES.items()}
    assert max(off[name] for name in ("log_loss", "calibration", "brier")) < 1e-6 and max(off.values()) < 3e-3, off
    rates = {side: harness.rate(some) for side, some in turns.items()}
    bars = [
        Bar("rows/s, of TFMA's", rates["ours_without_intervals"] / rates["tfma"], 500),
        Bar("rows/s with bootstrap intervals, of TFMA's without", rates["ours"] / rates["tfma"], 50),
    ]
    told = ", ".join(f"{name} {value:.0e}" for name, value in off.items())
    parts = [
        f"{flags.rows:,} rows, by us {PASSES} times; TFMA on {flags.slice:,} of them. Largest difference of a metric on those: {told}.",
        harness.table(turns, "rows"),
    ]
    harness.report("6", "evaluate", parts, bars, ["tensorflow-model-analysis"])


SIDES = {"ours": ours, "ours_without_intervals": ours_without_intervals, "tfma": tfma}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument("--slice", type=int, default=20_000, help="rows for TFMA (default: %(default)s)")


if __name__ == "__main__":
    harness.run_bench(__doc__, SIDES, bench, add_flags)
