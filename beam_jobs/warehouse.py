"""BigQuery: a run's scores go into a staging table, are audited there, and replace the month in one transaction."""

import datetime
import os
import pathlib
import uuid
from typing import Any

from beam_jobs.run import MonthRun, StageError
from schemas import tables
from schemas.lake import Manifest

_AUDITS = pathlib.Path(tables.__file__).with_name("audits")
_STAGING_HOURS = 24
_SHOWN = 3
# BigQuery's API calls these by their old names.
_ALIASES = {"INTEGER": "INT64", "FLOAT": "FLOAT64"}


def connect(project: str, location: str) -> Any:
    """A BigQuery client; it needs no credentials where an emulator is named in the environment."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import bigquery

    credentials = AnonymousCredentials() if os.environ.get("BIGQUERY_EMULATOR_HOST") else None
    return bigquery.Client(project, credentials, location=location)


class Warehouse:
    """One dataset, as a run publishes to it.

    Args:
        run: what is published.
        dataset: PROJECT.DATASET.
    """

    def __init__(self, run: MonthRun, dataset: str):
        from google.cloud import bigquery

        self._run, self._dataset, self._bigquery = run, dataset, bigquery
        self._client = connect(dataset.partition(".")[0], run.config.bigquery_location)
        self.table = f"{dataset}.scores"
        self.staging = f"{dataset}.scores_staging_{run.id}"

    def replace_month(self, scores: Manifest) -> int:
        """Stage, audit and publish the scores; returns the rows that the table then has of the month.

        Raises:
            StageError: an audit found offending rows, or the table ends with another count.
        """
        self._create_tables()
        self._load([self._run.storage.url(file) for file in scores.files])
        self._audit(scores.rows)
        self._publish()
        found = self._query(f"SELECT COUNT(*) AS n FROM `{self.table}` WHERE month = DATE '{self._run.month}-01'")
        if found[0]["n"] != scores.rows:
            raise StageError(
                f"{self.table} holds {found[0]['n']:,} rows of {self._run.month}, expected {scores.rows:,}; run `adstocrat publish` again"
            )
        self._client.delete_table(self.staging, not_found_ok=True)
        return found[0]["n"]

    def _create_tables(self) -> None:
        dataset = self._bigquery.Dataset(self._dataset)
        dataset.location = self._run.config.bigquery_location
        self._client.create_dataset(dataset, exists_ok=True)
        fields = self._fields()
        table = self._bigquery.Table(self.table, schema=fields)
        table.description = "One row for each ad of each month's inventory, with the probability that an impression of it is clicked."
        table.time_partitioning = self._bigquery.TimePartitioning(type_=self._bigquery.TimePartitioningType.MONTH, field="month")
        table.clustering_fields = ["key"]
        there = self._client.create_table(table, exists_ok=True)
        missing = [field for field in fields if field.name not in {known.name for known in there.schema}]
        if missing:
            there.schema = [*there.schema, *missing]
            self._client.update_table(there, ["schema"])
            # BigQuery has the columns now; the emulator takes them by DDL alone.
            added = ", ".join(f"ADD COLUMN IF NOT EXISTS `{field.name}` {field.field_type}" for field in missing)
            self._query(f"ALTER TABLE `{self.table}` {added}", "schema")
        known = {field.name: _ALIASES.get(field.field_type, field.field_type) for field in there.schema}
        for field in fields:
            if known[field.name] != field.field_type:
                raise StageError(
                    f"{self.table} has the column {field.name!r} as {known[field.name]}, the contract as {field.field_type}; "
                    "rename it in the export, or publish to another dataset"
                )
        staging = self._bigquery.Table(self.staging, schema=fields)
        staging.expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=_STAGING_HOURS)
        self._client.create_table(staging, exists_ok=True)

    def _fields(self) -> list[Any]:
        return [self._bigquery.SchemaField.from_api_repr(field) for field in tables.score_fields(self._run.contract)]

    def _load(self, uris: list[str]) -> None:
        config = self._bigquery.LoadJobConfig(
            source_format="PARQUET", write_disposition="WRITE_TRUNCATE", schema=self._fields(), labels=self._labels("load")
        )
        self._client.load_table_from_uri(uris, self.staging, job_id=self._job_id("load"), job_config=config).result()

    def _audit(self, rows: int) -> None:
        for path in sorted(_AUDITS.glob("*.sql")):
            text = path.read_text().format(staging=self.staging, rows=rows, month=self._run.month, run=self._run.id)
            offending = self._query(f"{text.rstrip()} LIMIT {_SHOWN}")
            if offending:
                raise StageError(f"audit {path.stem} refused the scores of {self._run.month}, nothing is published; found {offending}")

    def _publish(self) -> None:
        names = ", ".join(f"`{field['name']}`" for field in tables.score_fields(self._run.contract))
        # One job whose text is one transaction: a reader sees the old month or the new one.
        self._query(
            "BEGIN TRANSACTION;\n"
            f"DELETE FROM `{self.table}` WHERE month = DATE '{self._run.month}-01';\n"
            f"INSERT INTO `{self.table}` ({names}) SELECT {names} FROM `{self.staging}`;\n"
            "COMMIT TRANSACTION;",
            "publish",
        )

    def _query(self, text: str, stage: str = "audit") -> list[dict[str, Any]]:
        config = self._bigquery.QueryJobConfig(labels=self._labels(stage), maximum_bytes_billed=self._run.config.max_bytes_billed)
        job = self._client.query(text, job_id=self._job_id(stage), job_retry=None, job_config=config)
        return [dict(row) for row in job.result()]

    def _job_id(self, stage: str) -> str:
        # A used job id is refused even when its job failed, so each attempt has its own.
        return f"adstocrat-{self._run.id}-{stage}-{uuid.uuid4().hex[:8]}"

    def _labels(self, stage: str) -> dict[str, str]:
        return {"adstocrat_stage": stage, "adstocrat_run": self._run.id}
