"""Outcomes: what was delivered of the ads' impressions and clicks, as files that BigQuery loads; `outcomes/<month>/<run>/`."""

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.run import MonthRun
from schemas import lake, tables
from schemas.lake import Manifest
from schemas.parquet import read_columns, write_parquet

FOLDER = "outcomes"


def write(run: MonthRun) -> Manifest:
    """A file for each unit of the run's rows that has outcomes; those that are there already are taken."""
    there = run.left(FOLDER)
    if there:
        return there
    rows = run.manifest(run.stage("rows")).receipts
    units = [receipt for receipt in rows if receipt.unit.startswith("shard/") and receipt.file and run.contract.outcomes]
    with ThreadPoolExecutor(run.config.fetch_threads) as pool:
        receipts = tuple(pool.map(lambda unit: write_parquet(run.storage, run.stage(FOLDER), unit.unit, _batches(run, unit.file)), units))
    return lake.commit(run.storage, run.stage(FOLDER), Manifest(FOLDER, receipts))


def _batches(run: MonthRun, file: str) -> Iterator[pa.RecordBatch]:
    """The rows that have outcomes, as the table `outcomes`."""
    contract, schema = run.contract, tables.schema("outcomes", run.contract)
    month = pa.scalar(datetime.date.fromisoformat(f"{run.month}-01"))
    for batch in read_columns(run.storage, file, ["key", *(column.name for column in contract.outcomes)]):
        clicks = batch[(contract.clicked or contract.clicks).name]  # type: ignore[union-attr]
        impressions = batch[contract.impressions.name] if contract.impressions else pa.repeat(pa.scalar(1), len(batch))
        rows = pa.RecordBatch.from_arrays([pa.repeat(month, len(batch)), batch["key"], impressions, clicks], schema=schema)
        shown = rows.filter(pc.and_(pc.is_valid(clicks), pc.greater(impressions, 0)))
        if shown.num_rows:
            yield shown
