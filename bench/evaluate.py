"""Evaluation: our metrics, with bootstrap intervals and without, beside TensorFlow Model Analysis.

    scripts/bench evaluate [-- --rows 200000 --slice 20000 --rounds 3]

Two models with their predictions, overall and in three slices, on Beam's local runner. A row is one impression, so that it is one example
to both. TFMA gets `--slice` rows, and what it takes for 100 rows is start.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from bench import harness
from bench.harness import Bar, Clock, Told

DEVICES = ("mobile", "desktop", "tv")
BATCH, FEW = 1 << 16, 100
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


def evaluated(batch: pa.RecordBatch, replicates: int) -> Any:
    from model.evaluation import evaluate

    columns = {name: batch[name].to_numpy() for name in batch.schema.names}
    slices = {("device", name): np.flatnonzero(columns["device"] == code) for code, name in enumerate(DEVICES)}
    predictions = {name: columns[name] for name in ("candidate", "champion")}
    return evaluate(columns["clicks"], np.ones(len(batch)), predictions, columns["creative"], slices, replicates)


def ours(flags: argparse.Namespace) -> Told:
    return _ours(flags, 400)


def ours_without_intervals(flags: argparse.Namespace) -> Told:
    return _ours(flags, 0)


def _ours(flags: argparse.Namespace, replicates: int) -> Told:
    clock = Clock()
    import apache_beam as beam

    from beam_jobs.runner import run_pipeline
    from bench import lakes
    from model.evaluation import merged

    whole = pa.RecordBatch.from_pydict(rows_of(flags.rows))
    batches = [whole.slice(start, BATCH) for start in range(0, flags.rows, BATCH)]
    clock.lap("imports")
    lakes.start_runner()
    lakes.start_runner()
    runner = clock.lap("runner, twice") / 2

    def write(judged: list[Any]) -> None:
        metrics = {"/".join(map(str, segment)): one.metrics(0) for segment, one in merged(judged).slices.items()}
        (flags.work / f"ours-{replicates}.json").write_text(json.dumps(metrics))

    run_pipeline(
        lambda root: (
            root
            | beam.Create(batches).with_output_types(pa.RecordBatch)
            | "Evaluate" >> beam.Map(evaluated, replicates)
            | beam.combiners.ToList()
            | "Write" >> beam.Map(write)
        ),
        [],
    )
    seconds, start = clock.lap("run") - runner, {"imports": clock.laps["imports"], "runner": runner}
    return {"units": flags.rows, "seconds": seconds, "cpu": clock.cpu["run"], "start": start}


def tfma(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import apache_beam as beam
    import tensorflow_model_analysis

    from beam_jobs import tfma as written
    from beam_jobs.runner import run_pipeline

    clock.lap("imports")

    def run(rows: int) -> float:
        started = time.monotonic()
        columns = rows_of(rows)
        predictions = {name: columns[name] for name in ("candidate", "champion")}
        devices = pa.array(DEVICES).take(pa.array(columns["device"]))
        examples = written.weighted(columns["clicks"], np.ones(rows, np.int64), predictions, {"device": devices})
        parts = [examples.slice(start, 4096) for start in range(0, len(examples), 4096)]
        source = beam.Create(parts).with_output_types(pa.RecordBatch)
        run_pipeline(lambda root: written.write(root | source, list(predictions), ["device"], str(flags.work / f"tfma-{rows}")), [])
        return time.monotonic() - started

    run(FEW)
    start = run(FEW)
    seconds = run(flags.slice) - start
    told = {}
    for name in ("candidate", "champion"):
        for key, metrics in tensorflow_model_analysis.load_eval_result(str(flags.work / f"tfma-{flags.slice}"), name).slicing_metrics:
            told[f"{name}/{key[0][1] if key else 'overall'}"] = {its: metrics[""][""][its]["doubleValue"] for its in NAMES.values()}
    (flags.work / "tfma.json").write_text(json.dumps(told))
    return {"units": flags.slice, "seconds": seconds, "start": {"imports": clock.laps["imports"], f"{FEW} rows": start}}


def bench(flags: argparse.Namespace) -> None:
    turns = harness.take_turns(flags, ["ours", "ours_without_intervals"])
    turns |= harness.take_turns(flags, ["tfma"], rounds=max(1, flags.rounds - 1))
    theirs = json.loads((flags.work / "tfma.json").read_text())
    mine = evaluated(pa.RecordBatch.from_pydict(rows_of(flags.slice)), 0)
    off = dict.fromkeys(NAMES, 0.0)
    for segment, one in mine.slices.items():
        for model, name in enumerate(mine.models):
            found, told = one.metrics(model), theirs[f"{name}/{segment[1] or segment[0]}"]
            off = {metric: max(off[metric], abs(found[metric] - told[its]) / told[its]) for metric, its in NAMES.items()}
    assert max(off[name] for name in ("log_loss", "calibration", "brier")) < 1e-6 and max(off.values()) < 3e-3, off
    rates = {side: harness.rate(some) for side, some in turns.items()}
    bars = [
        Bar("rows/s, of TFMA's", rates["ours_without_intervals"] / rates["tfma"], 500),
        Bar("rows/s with bootstrap intervals, of TFMA's without", rates["ours"] / rates["tfma"], 50),
    ]
    told = ", ".join(f"{name} {value:.0e}" for name, value in off.items())
    parts = [
        f"{flags.rows:,} rows; TFMA on {flags.slice:,} of them. Largest relative difference of a metric on those: {told}.",
        harness.table(turns, "rows"),
    ]
    harness.report("6", "evaluate", parts, bars, ["tensorflow-model-analysis"])


SIDES = {"ours": ours, "ours_without_intervals": ours_without_intervals, "tfma": tfma}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument("--slice", type=int, default=20_000, help="rows for TFMA (default: %(default)s)")


if __name__ == "__main__":
    harness.run_bench(__doc__, SIDES, bench, add_flags)
