"""What statistics add to ingest: CPU seconds of ingest, and of the sketches in it.

    scripts/bench sketches -- --rows 500000 --repeat 3

One month of sample rows is ingested again and again on the local runner; what sketching a unit and writing its file takes is counted apart.
"""

import argparse
import tempfile
import time
from statistics import median
from typing import Any
from unittest import mock

from beam_jobs import ingest, statistics
from beam_jobs.config import Config
from beam_jobs.run import prepare
from beam_jobs.runner import run_pipeline
from schemas.sample import write_months
from schemas.storage import open_storage

MONTH = "2026-08"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--creatives", type=int, default=2_000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_months(open_storage(folder), [MONTH], arguments.rows, arguments.creatives, 0, lambda line: None)
        shares = []
        for number in range(arguments.repeat + 1):
            spent = 0.0

            def counted(function: Any, *values: Any) -> Any:
                nonlocal spent
                started = time.process_time()
                result = function(*values)
                spent += time.process_time() - started
                return result

            run = prepare(Config(lake=folder, seed=number), MONTH)
            of_rows, write = statistics.of_rows, statistics.write
            with (
                mock.patch.object(statistics, "of_rows", lambda *values, of_rows=of_rows: counted(of_rows, *values)),
                mock.patch.object(statistics, "write", lambda *values, write=write: counted(write, *values)),
            ):
                started = time.process_time()
                run_pipeline(lambda root, run=run: ingest.define_pipeline(root, run), [])
                total = time.process_time() - started
            print(f"{arguments.rows:,} rows: {total:.2f} CPU s, {spent:.2f} of it statistics, {spent / (total - spent):.1%} of the rest")
            # The first has imports in it.
            shares += [spent / (total - spent)] if number else []
        print(f"median: {median(shares):.1%} of ingest without them")


if __name__ == "__main__":
    main()
