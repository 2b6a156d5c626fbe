"""Ingest: the stage (parse, check, reject, shard, write) beside bare `pyarrow.csv` and Parquet, and Beam's own `ReadFromCsv`.

    scripts/bench ingest [-- --ads 2000000 --slice 200000 --rounds 3 --work FOLDER]

`ReadFromCsv` gets `--slice` rows and does the same checks, on data frames, as its documentation has it. The bare loop checks nothing: it
reads the kept columns with their types and writes them, with all of Arrow's threads and with one. What a side takes for 2,000 rows is its
start-up, and shown apart.
"""

import argparse
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from bench import harness
from bench.harness import Bar, Clock, Told
from bench.score import FEW, fresh


def ours(flags: argparse.Namespace) -> Told:
    clock = Clock()
    from beam_jobs import ingest
    from beam_jobs.runner import run_pipeline
    from bench import lakes

    clock.lap("imports")

    def prepare(lake: pathlib.Path) -> Callable[[], int]:
        run = lakes.month_of(lake)
        for folder in (run.stage("rows"), run.stage("rejects"), run.spill):
            shutil.rmtree(lake / folder, ignore_errors=True)

        def ingested() -> int:
            run_pipeline(lambda root: ingest.define_pipeline(root, run), [])
            return run.manifest(run.stage("rows")).count("read")

        return ingested

    return harness.beyond_start(clock, prepare, lakes.month_lake(flags.work, *FEW), flags.lake)


def bare(flags: argparse.Namespace) -> Told:
    """With all of Arrow's threads, a file being written while the next is read."""
    from schemas.ahead import ahead

    def tables(paths: list[pathlib.Path], convert: Any) -> Iterator[pa.Table]:
        read = (pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(use_threads=True, block_size=8 << 20), None, convert) for path in paths)
        return ahead(read, 1)

    return _bare(flags, tables)


def bare_one_thread(flags: argparse.Namespace) -> Told:
    def batches(paths: list[pathlib.Path], convert: Any) -> Iterator[pa.Table]:
        options = pyarrow.csv.ReadOptions(block_size=8 << 20)
        return (pa.Table.from_batches([batch]) for path in paths for batch in pyarrow.csv.open_csv(path, options, None, convert))

    return _bare(flags, batches)


def _bare(flags: argparse.Namespace, tables: Callable[[list[pathlib.Path], Any], Iterator[pa.Table]]) -> Told:
    clock = Clock()
    from bench import lakes
    from schemas.parquet import ParquetFile

    clock.lap("imports")

    def prepare(lake: pathlib.Path) -> Callable[[], int]:
        run, out = lakes.month_of(lake), fresh(flags.work / "bare-rows")
        types = {column.name: column.arrow_type for column in run.contract.kept}
        convert = pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types))

        def copied() -> int:
            rows = 0
            for number, table in enumerate(tables([lake / entry.name for entry in run.ads], convert)):
                # As the product writes it: other settings take longer.
                with ParquetFile(out / f"{number:05d}.parquet", table.to_batches()[0]) as writer:
                    writer.write_table(table, row_group_size=1 << 16)
                rows += len(table)
            return rows

        return copied

    return harness.beyond_start(clock, prepare, lakes.month_lake(flags.work, *FEW), flags.lake)


def stock(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import apache_beam as beam
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    from bench import lakes

    contract = lakes.month_of(flags.lake).contract
    clock.lap("imports")
    shards = 4
    names = [column.name for column in contract.kept]
    schema = pa.schema([("key", pa.string()), *((column.name, column.arrow_type) for column in contract.kept)])

    def prepare(rows: int) -> Callable[[], int]:
        out = fresh(flags.work / "stock-rows")

        def ingested() -> int:
            with beam.Pipeline(FnApiRunner()) as root:
                checked = (
                    root
                    | beam.io.ReadFromCsv(str(flags.work / f"csv-{rows}" / "*.csv"), usecols=names, dtype=str, keep_default_na=False)
                    | "Check" >> beam.Map(_check, contract).with_outputs("rejects", main="rows")
                )
                _ = checked.rejects | "WriteRejects" >> beam.io.WriteToText(str(out / "rejects"))
                _ = (
                    checked.rows
                    | "KeyByAd" >> beam.Map(lambda row: (row["key"], row))
                    | "GroupByAd" >> beam.GroupByKey()
                    | "FirstOfAd" >> beam.MapTuple(lambda key, rows: next(iter(rows)))
                    | "WriteRows" >> beam.io.WriteToParquet(str(out / "rows"), schema, num_shards=shards)
                )
            return rows

        return ingested

    return harness.beyond_start(clock, prepare, FEW[0], flags.slice)


def _check(row: Any, contract: Any) -> Any:
    """One row's checks: types, presence, domains, clicks over impressions, the name of the image."""
    from apache_beam import pvalue

    typed: dict[str, Any] = {"key": "|".join(getattr(row, column.name) for column in contract.key)}
    for column in contract.kept:
        text = getattr(row, column.name)
        if text == "":
            if column.required:
                return pvalue.TaggedOutput("rejects", f"{column.name} missing_required {row}")
            typed[column.name] = None
            continue
        try:
            integer, real = pa.types.is_integer(column.arrow_type), pa.types.is_floating(column.arrow_type)
            typed[column.name] = value = int(text) if integer else float(text) if real else text
        except ValueError:
            return pvalue.TaggedOutput("rejects", f"{column.name} unparsable {row}")
        low, high = column.minimum, column.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            return pvalue.TaggedOutput("rejects", f"{column.name} out_of_domain {row}")
    if contract.clicks and (typed[contract.clicks.name] or 0) > (typed[contract.impressions.name] or 0):
        return pvalue.TaggedOutput("rejects", f"clicks_over_impressions {row}")
    if contract.image and (name := typed[contract.image.name]) and (".." in name or name.startswith("/") or ":" in name):
        return pvalue.TaggedOutput("rejects", f"image_outside_month {row}")
    return typed


def lay_out(lake: pathlib.Path, folder: pathlib.Path, rows: int) -> None:
    """The first rows of the month's CSV files, in one."""
    if folder.exists():
        return
    making = fresh(folder.with_suffix(".part"))
    with (making / "ads.csv").open("wb") as out:
        left = rows
        for number, path in enumerate(sorted((lake / "raw").glob("*/ads/*.csv"))):
            header, *lines = path.read_bytes().splitlines(keepends=True)
            out.writelines([header] * (number == 0) + lines[:left])
            left -= min(left, len(lines))
    making.rename(folder)


def rows_in(folder: pathlib.Path, columns: list[str]) -> pa.Table:
    """All rows of a folder by key, as far as their columns go."""
    files = [path for path in folder.iterdir() if path.name.startswith("rows-") or path.suffix == ".parquet"]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in files])
    return table.sort_by(columns[0]).combine_chunks()


def bench(flags: argparse.Namespace) -> None:
    from bench import lakes

    flags.lake = flags.lake or lakes.month_lake(flags.work, flags.ads, 5000)
    lakes.month_lake(flags.work, *FEW)
    run = lakes.month_of(flags.lake)
    for rows in (FEW[0], flags.slice):
        lay_out(flags.lake, flags.work / f"csv-{rows}", rows)
    turns = harness.take_turns(flags, list(SIDES))
    names = ["ad_id", *(column.name for column in run.contract.kept if column.name != "ad_id")]
    folders = (flags.lake / run.stage("rows"), flags.work / "bare-rows", flags.work / "stock-rows")
    mine, theirs, few = (rows_in(folder, names) for folder in folders)
    assert mine.equals(theirs.cast(mine.schema)), "the bare loop's rows are not ours"
    there = mine.filter(pc.is_in(mine["ad_id"], few["ad_id"].combine_chunks())).combine_chunks()
    assert len(few) == flags.slice and there.equals(few.cast(there.schema)), "the rows of ReadFromCsv are not ours"
    rates = {side: harness.rate(some) for side, some in turns.items()}
    one = harness.turn(flags, "ours", cores=1)
    bars = [
        Bar("rows/s, of bare `pyarrow.csv` with all threads and Parquet", rates["ours"] / rates["bare"], 0.5),
        Bar("rows/s, of Beam's `ReadFromCsv` with the same checks", rates["ours"] / rates["stock"], 5),
        Bar("bar 10: gain by the second core", rates["ours"] / harness.rate([one]), 1.5),
    ]
    parts = [
        f"{turns['ours'][0].told['units']:,} rows; `ReadFromCsv` on {flags.slice:,} of them. All wrote the same. Of bare `pyarrow.csv` "
        f"with one thread ours is {rates['ours'] / rates['bare_one_thread']:.2f}.",
        harness.table({**turns, "ours, 1 core": [one]}, "rows"),
    ]
    harness.report("2", "ingest", parts, bars, [])


SIDES = {"ours": ours, "bare": bare, "bare_one_thread": bare_one_thread, "stock": stock}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ads", type=int, default=2_000_000, help="rows (default: %(default)s)")
    parser.add_argument("--lake", type=pathlib.Path, help="a lake with a month that was run; default: one is made")
    parser.add_argument("--slice", type=int, default=200_000, help="rows for ReadFromCsv (default: %(default)s)")


if __name__ == "__main__":
    harness.run_bench(__doc__, SIDES, bench, add_flags)
