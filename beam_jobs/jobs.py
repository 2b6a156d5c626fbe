"""BigQuery jobs that are done once, whatever becomes of their answers: lost ones, taken ids and transactions that were aborted."""

import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from beam_jobs.config import Config
from schemas.retries import RETRY_SECONDS, pauses


def connect(project: str, location: str) -> Any:
    """A BigQuery client; it needs no credentials where an emulator is named in the environment."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import bigquery

    credentials = AnonymousCredentials() if os.environ.get("BIGQUERY_EMULATOR_HOST") else None
    return bigquery.Client(project, credentials, location=location)


class Jobs:
    """Jobs on one dataset, labelled with their stage and the run that they are for.

    Args:
        config: with the dataset.
        run: its id.
    """

    def __init__(self, config: Config, run: str):
        from google.cloud import bigquery

        assert config.dataset
        self.bigquery = bigquery
        self.client = connect(config.dataset.partition(".")[0], config.bigquery_location)
        self._run, self._max_bytes = run, config.max_bytes_billed

    def load(self, uris: list[str], table: Any) -> None:
        """Load Parquet files into a table instead of what it holds; into each table that was made under this name, once."""
        config = self.bigquery.LoadJobConfig(source_format="PARQUET", write_disposition="WRITE_TRUNCATE", schema=table.schema)
        config.labels = self._labels("load")
        self.once(
            f"load-{table.table_id}-{table.created.timestamp() * 1000:.0f}",
            lambda id: self.client.load_table_from_uri(uris, table, job_id=id, job_config=config),
        )

    def query(self, text: str, stage: str, holds: Callable[[], bool] | None = None) -> list[dict[str, Any]]:
        """The rows that a query answers. One that changes something says by `holds` whether that is so now, and is done once."""
        config = self.bigquery.QueryJobConfig(labels=self._labels(stage), maximum_bytes_billed=self._max_bytes)
        name = stage if holds else f"{stage}-{uuid.uuid4().hex[:12]}"
        rows = self.once(name, lambda id: self.client.query(text, job_id=id, job_retry=None, job_config=config), holds)
        return [dict(row) for row in rows]

    def once(self, name: str, send: Callable[[str], Any], holds: Callable[[], bool] | None = None) -> Any:
        """The result of a job that `send` sends under the id that it is given; `name` is the same whenever it is to be done only once.

        BigQuery refuses an id that was used, even by a job that failed, so each attempt has its own, counted from 1. One that is taken is
        of an attempt whose answer was lost, of a command that was killed, or of long ago: that job is waited for, and is the one if it ends
        without an error and what it did `holds`.

        Raises:
            GoogleAPICallError: it failed in a way that the next attempt would, too.
        """
        from google.api_core.exceptions import Conflict, GoogleAPICallError

        attempt, waits, deadline = 1, pauses(), time.monotonic() + RETRY_SECONDS
        while True:
            id, job, taken = f"adstocrat-{self._run}-{name}-{attempt}", None, False
            try:
                try:
                    job = send(id)
                except Conflict:
                    taken = True
                    job = self.client.get_job(id)
                result = job.result()
                if not taken or holds is None or holds():
                    return result
            except GoogleAPICallError as error:
                if not (taken and job and job.error_result):
                    # Aborted by another transaction; or taken, and yet not there.
                    passes = "concurrent update" in str(error) or (taken and job is None and error.code == 404)
                    if not passes or time.monotonic() > deadline:
                        raise
                    time.sleep(next(waits))
            attempt += 1

    def _labels(self, stage: str) -> dict[str, str]:
        return {"adstocrat_stage": stage, "adstocrat_run": self._run}
