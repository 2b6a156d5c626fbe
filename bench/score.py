"""Scoring: the stage beside a bare loop, stock Beam RunInference with a dict a row, and Ray Data.

    scripts/bench score [-- --ads 2000000 --slice 60000 --ray-slice 2000000 --rounds 3 --work FOLDER]

The bare loop reads Parquet, joins, calls the same SavedModel and writes Parquet, without Beam. The peers get rows that are joined already,
in files of Parquet, and call the same model; stock Beam gets `--slice` of them, since its rate does not depend on how many there are.
What a side takes for a few rows is its start-up, and shown apart, as is the loading of its model.
"""

import argparse
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench import harness
from bench.harness import Bar, Clock, Told

COLUMNS = ("key", "p_click")


# Ads and creatives of the month that tells what it takes to start.
FEW = (2_000, 50)


def ours(flags: argparse.Namespace) -> Told:
    clock = Clock()
    from beam_jobs import score
    from beam_jobs.runner import run_pipeline
    from bench import lakes
    from model import registry, tensorflow

    tensorflow.load()
    clock.lap("imports")

    def prepare(lake: pathlib.Path) -> Callable[[], int]:
        run = lakes.month_of(lake)
        evaluation = run.manifest(run.stage("evaluation"))
        registry.load(run.storage, "ranker", evaluation.info["ranker"])
        shutil.rmtree(lake / run.stage("scores"), ignore_errors=True)

        def scored() -> int:
            run_pipeline(lambda root: score.define_pipeline(root, run, evaluation), [])
            return run.manifest(run.stage("scores")).rows

        return scored

    with lakes.models_kept():
        return harness.beyond_start(clock, prepare, lakes.month_lake(flags.work, *FEW), flags.lake)


def bare(flags: argparse.Namespace) -> Told:
    clock = Clock()
    from bench import lakes
    from model import registry, tensorflow

    tensorflow.load()
    clock.lap("imports")

    def prepare(lake: pathlib.Path) -> Callable[[], int]:
        run = lakes.month_of(lake)
        info = run.manifest(run.stage("evaluation")).info
        ranker = registry.load(run.storage, "ranker", info["ranker"])
        return lambda: _scored_bare(run, info, ranker, fresh(flags.work / "bare"))

    return harness.beyond_start(clock, prepare, lakes.month_lake(flags.work, *FEW), flags.lake)


def _scored_bare(run: Any, info: Any, ranker: Any, out: pathlib.Path) -> int:
    """Rows are read and joined in one thread, scored in another, and written in a third, as the stage does it."""
    from beam_jobs.inference import scored
    from beam_jobs.score import label
    from schemas.ahead import ahead
    from schemas.parquet import ParquetFile

    carried, rows, writers = [column.name for column in run.contract.carried], 0, dict[str, ParquetFile]()
    with ThreadPoolExecutor(1) as pool:
        written = None
        for unit, joined in ahead(_joined_bare(run, info)):
            _, scores = label(run, info["encoder"], info["ranker"], "", scored(joined, ranker, carried))
            if unit not in writers:
                writers[unit] = ParquetFile(out / f"{unit}.parquet", scores)
            if written:
                written.result()
            written = pool.submit(writers[unit].write, scores)
            rows += len(scores)
    for writer in writers.values():
        writer.close()
    return rows


def _joined_bare(run: Any, info: Any) -> Iterator[tuple[str, pa.RecordBatch]]:
    from schemas.lake import month_number
    from schemas.parquet import read_parquet

    root, month = pathlib.Path(run.storage.uri), pa.scalar(month_number(run.month), pa.int32())
    index, embeddings, rows = (
        {receipt.unit.split("/")[1]: receipt.file for receipt in run.manifest(folder).receipts if not receipt.unit.startswith("file/")}
        for folder in (run.stage("creatives"), f"embeddings/{info['encoder']}/{run.month}/{run.id}", run.stage("rows"))
    )
    for unit, file in rows.items():
        shard = f"{unit.split('.')[0]}.000"
        names, vectors = pq.read_table(root / index[shard]), pq.read_table(root / embeddings[shard])
        image, creative, status = (names[name].combine_chunks() for name in ("image", "creative", "image_status"))
        known, matrix = (vectors[name].combine_chunks() for name in ("creative", "embedding"))
        # For all of a unit at once, since each call builds a table of the names.
        place = pc.index_in(pq.read_table(root / file, columns=["image"])["image"].combine_chunks(), image)
        whose, start = creative.take(place), 0
        at = pc.index_in(whose, known)
        for batch in read_parquet(run.storage, file, coded=True):
            own = slice(start, start + len(batch))
            start += len(batch)
            added = {
                "creative": whose[own],
                "image_status": pc.if_else(pc.is_null(batch["image"]), "no_image", pc.fill_null(status.take(place[own]), "missing")),
                "embedding": matrix.take(at[own]),
                "month_number": pa.repeat(month, len(batch)),
            }
            yield unit, pa.RecordBatch.from_arrays([*batch.columns, *added.values()], [*batch.schema.names, *added])


class RowHandler:
    """Made a ModelHandler where Beam is imported: a list of dicts in, a list of dicts out."""

    @staticmethod
    def make(run: Any, version: str, schema: pa.Schema) -> Any:
        from apache_beam.ml.inference.base import ModelHandler

        class Handler(ModelHandler[dict, dict, Any]):
            def load_model(self) -> Any:
                from model import registry

                return registry.load(run.storage, "ranker", version)

            def batch_elements_kwargs(self) -> dict[str, int]:
                return {"min_batch_size": 8192, "max_batch_size": 8192}

            def run_inference(self, batch: Sequence[dict], model: Any, inference_args: Any = None) -> list[dict]:
                probability = model.predict(pa.RecordBatch.from_pylist(list(batch), schema))
                return [{"key": row["key"], "p_click": p} for row, p in zip(batch, probability.tolist(), strict=True)]

        return Handler()


def stock(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    from bench import lakes
    from model import registry, tensorflow

    tensorflow.load()
    clock.lap("imports")
    run = lakes.month_of(flags.lake)
    version = run.manifest(run.stage("evaluation")).info["ranker"]

    def prepare(source: pathlib.Path) -> Callable[[], int]:
        schema, out = pq.read_schema(next(source.iterdir())), fresh(flags.work / "stock")
        registry.load(run.storage, "ranker", version)

        def scored() -> int:
            with beam.Pipeline(FnApiRunner()) as root:
                _ = (
                    root
                    | beam.io.ReadFromParquet(str(source / "*.parquet"))
                    | RunInference(RowHandler.make(run, version, schema))
                    | beam.io.WriteToParquet(str(out / "scores"), pa.schema([("key", pa.string()), ("p_click", pa.float64())]))
                )
            return flags.slice

        return scored

    with lakes.models_kept():
        return harness.beyond_start(clock, prepare, flags.work / "joined-few", flags.work / f"joined-{flags.slice}")


class RayModel:
    def __init__(self, lake: pathlib.Path) -> None:
        from bench import lakes
        from model import registry, tensorflow

        started = time.monotonic()
        tensorflow.load()
        run = lakes.month_of(lake)
        self._ranker = registry.load(run.storage, "ranker", run.manifest(run.stage("evaluation")).info["ranker"])
        self.seconds = time.monotonic() - started

    def __call__(self, table: pa.Table) -> pa.Table:
        batch = table.combine_chunks().to_batches()[0]
        return pa.table({"key": batch["key"], "p_click": self._ranker.predict(batch)})


def ray_data(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import ray

    ray.init(num_cpus=flags.ray_cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    clock.lap("Ray")
    out = fresh(flags.work / "ray")

    def run(source: pathlib.Path) -> None:
        data = ray.data.read_parquet(str(source)).map_batches(
            RayModel,
            fn_constructor_args=(flags.lake,),
            batch_format="pyarrow",
            batch_size=flags.ray_batch,
            concurrency=flags.ray_actors,
            num_cpus=1,
        )
        data.write_parquet(str(out))

    # Actors, with TensorFlow and the model, start with each run: what a run of few rows takes is start.
    run(flags.work / "joined-few")
    start = clock.lap("actors and model")
    shutil.rmtree(out)
    run(flags.work / f"joined-{flags.ray_slice}")
    seconds = clock.lap("run") - start
    ray.shutdown()
    return {"units": flags.ray_slice, "seconds": seconds, "start": {"Ray": clock.laps["Ray"], "actors and model": start}}


def fresh(folder: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def lay_out(run: Any, folder: pathlib.Path, rows: int) -> None:
    """The first rows of the month, joined, in files of 500,000."""
    from beam_jobs.join import month_rows
    from schemas.parquet import decoded

    if folder.exists():
        return
    encoder = run.manifest(run.stage("evaluation")).info["encoder"]
    joined, left, number = month_rows(run, run.month, run.id, encoder), rows, 0
    making = fresh(folder.with_suffix(".part"))
    for unit in joined.units:
        writer = None
        for batch in joined.batches(unit):
            if some := decoded(batch.slice(0, left)):
                writer = writer or pq.ParquetWriter(making / f"{number:03d}.parquet", some.schema, compression="zstd", compression_level=1)
                writer.write_batch(some)
                left -= len(some)
        if writer:
            writer.close()
            number += 1
    making.rename(folder)


def scores_in(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and probabilities of all files of a folder, by key."""
    files = [path for path in folder.iterdir() if path.name.startswith("scores-") or path.suffix == ".parquet"]
    table = pa.concat_tables([pq.read_table(path, columns=list(COLUMNS)) for path in files]).sort_by("key")
    return table["key"].to_numpy(), table["p_click"].to_numpy()


def differences(mine: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray], rows: int) -> float:
    """The largest difference of a probability of theirs from ours; they must have so many rows, each of a key that we have."""
    at = np.searchsorted(mine[0], theirs[0])
    assert len(np.unique(theirs[0])) == len(theirs[0]) == rows and (mine[0][at] == theirs[0]).all(), "keys differ"
    assert np.isfinite(theirs[1]).all(), "some have no probability"
    return float(np.abs(mine[1][at] - theirs[1]).max())


def bench(flags: argparse.Namespace) -> None:
    from bench import lakes

    flags.lake = flags.lake or lakes.month_lake(flags.work, flags.ads, 5000)
    run = lakes.month_of(flags.lake)
    for name, rows in ((str(flags.slice), flags.slice), (str(flags.ray_slice), flags.ray_slice), ("few", 1000)):
        lay_out(run, flags.work / f"joined-{name}", rows)
    turns = harness.take_turns(flags, list(SIDES))
    mine = scores_in(flags.lake / run.stage("scores"))
    given = {"bare": len(mine[0]), "stock": flags.slice, "ray": min(flags.ray_slice, len(mine[0]))}
    off = {side: differences(mine, scores_in(flags.work / side), rows) for side, rows in given.items()}
    assert max(off.values()) < 1e-6, off
    rates = {side: harness.rate(some) for side, some in turns.items()}
    one = {side: harness.turn(flags, side, cores=1) for side in ("ours", "bare")} if flags.one_core else {}
    bars = [
        Bar("rows/s, of a bare loop's", rates["ours"] / rates["bare"], 0.85),
        Bar("rows/s, of stock RunInference's with a dict a row", rates["ours"] / rates["stock"], 15),
        Bar("rows/s, of Ray Data's", rates["ours"] / rates["ray"], 4),
    ]
    if one:
        gain = {side: rates[side] / harness.rate([some]) for side, some in one.items()}
        bars.append(Bar("bar 10: gain by the second core, of the bare loop's", gain["ours"] / gain["bare"], 0.9))
    rows = turns["ours"][0].told["units"]
    parts = [
        f"{rows:,} rows; stock Beam on {flags.slice:,}, Ray on {flags.ray_slice:,} of them, joined before. The largest difference of a "
        f"probability from ours: {', '.join(f'{side} {value:.1g}' for side, value in off.items())}.",
        harness.table({**turns, **{f"{side}, 1 core": [some] for side, some in one.items()}}, "rows"),
    ]
    harness.report("1", "score", parts, bars, ["tensorflow", "ray"])


SIDES = {"ours": ours, "bare": bare, "stock": stock, "ray": ray_data}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ads", type=int, default=2_000_000, help="rows (default: %(default)s)")
    parser.add_argument("--lake", type=pathlib.Path, help="a lake with a month that was run; default: one is made")
    parser.add_argument("--slice", type=int, default=60_000, help="rows for stock Beam (default: %(default)s)")
    parser.add_argument("--ray-slice", type=int, default=2_000_000, help="rows for Ray Data (default: %(default)s)")
    parser.add_argument("--ray-batch", type=int, default=32_768)
    parser.add_argument("--ray-actors", type=int, default=1)
    parser.add_argument("--ray-cpus", type=int, default=2)
    parser.add_argument("--one-core", type=int, default=1, help="whether to measure one core too")


if __name__ == "__main__":
    harness.run_bench(__doc__, SIDES, bench, add_flags)
