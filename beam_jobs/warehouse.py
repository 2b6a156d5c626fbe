"""BigQuery: what a run publishes goes into staging tables, is audited there, and replaces the month in one transaction."""

import datetime
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from beam_jobs.jobs import Jobs
from beam_jobs.run import MonthRun, StageError
from schemas import lake, tables

log = logging.getLogger("adstocrat")

_STAGING_HOURS = 24
_SHOWN = 3
# BigQuery's API calls these by their old names.
_ALIASES = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL"}


class Warehouse:
    """One dataset, as a run publishes to it.

    Args:
        run: what is published; its config names the dataset.
        rows: how many it scored.
    """

    def __init__(self, run: MonthRun, rows: int):
        self._run, self._rows, self._dataset = run, rows, str(run.config.dataset)
        self._jobs = Jobs(run.config, run.id)
        self._bigquery, self._client = self._jobs.bigquery, self._jobs.client
        self._month = f"month = DATE '{run.month}-01'"

    def replace_month(self, files: Mapping[str, Sequence[str]], row: Mapping[str, str | int | bool], unaudited: Sequence[str]) -> None:
        """Make the run the month's, unless it is: stage, audit and publish.

        Args:
            files: Parquet files in the lake, by table.
            row: what `runs` is to say of it.
            unaudited: audits to leave out.

        Raises:
            StageError: an audit found offending rows, or the tables cannot hold them.
        """
        for name in tables.TABLES:
            self._ensure_table(name)
        for name, view in tables.statements("views", self._values()).items():
            self._ensure_view(name, view)
        if self._holds():
            return
        staging = {name: self._stage(name, listed) for name, listed in files.items() if listed}
        self._audit(staging["scores"], unaudited)
        self._jobs.query(self._transaction(staging, row), "publish", self._holds)
        for table in staging.values():
            self._client.delete_table(table, not_found_ok=True)

    def check(self) -> None:
        """Count what is published.

        Raises:
            StageError: the month is not this run's rows, all of them and no others.
        """
        if not self._holds():
            raise StageError(
                f"{self._dataset}.scores does not hold {self._rows:,} rows of {self._run.month}, all of run {self._run.id}; "
                "something else has changed it, run `adstocrat publish` again"
            )

    def _holds(self) -> bool:
        """Whether the month is the run's: its rows, all of them and no others, and a row of `runs`."""
        month, ours = f"WHERE {self._month}", f"run_id = '{self._run.id}'"
        found = self._jobs.query(
            f"SELECT COUNT(*) AS n, COUNTIF({ours}) AS ours, (SELECT COUNT(*) FROM `{self._dataset}.runs` {month} AND {ours}) AS runs "
            f"FROM `{self._dataset}.scores` {month}",
            "count",
        )[0]
        return found["n"] == found["ours"] == self._rows and found["runs"] > 0

    def _values(self) -> dict[str, Any]:
        contract = self._run.contract
        return {"dataset": self._dataset, "segments": tables.segments(contract), "columns": tables.names("scores", contract)}

    def _ensure_table(self, name: str) -> None:
        about, fields = tables.TABLES[name], self._fields(name)
        table = self._bigquery.Table(f"{self._dataset}.{name}", schema=fields)
        table.description, table.clustering_fields = about.description, about.clustering
        table.time_partitioning = self._bigquery.TimePartitioning(type_=self._bigquery.TimePartitioningType.MONTH, field="month")
        there = self._ensured(table)
        # No REQUIRED column can be added to a table that has rows.
        own, known_names = self._bigquery.SchemaField, {known.name for known in there.schema}
        missing = [own(field.name, field.field_type, description=field.description) for field in fields if field.name not in known_names]
        if missing:
            table.schema = [*there.schema, *missing]
            self._client.update_table(table, ["schema"])
            # BigQuery has the columns now; the emulator takes them by DDL alone.
            added = ", ".join(f"ADD COLUMN IF NOT EXISTS `{field.name}` {field.field_type}" for field in missing)
            self._jobs.query(f"ALTER TABLE `{self._dataset}.{name}` {added}", "schema")
        known = {field.name: _ALIASES.get(field.field_type, field.field_type) for field in there.schema}
        for field in fields:
            if known.get(field.name, field.field_type) != field.field_type:
                raise StageError(
                    f"{self._dataset}.{name} has the column {field.name!r} as {known[field.name]}, the contract as {field.field_type}; "
                    "rename it in the export, or publish to another dataset"
                )

    def _ensured(self, table: Any) -> Any:
        """The table as it is in BigQuery, made where there is none, and the dataset where that is missing."""
        from google.api_core.exceptions import NotFound

        try:
            return self._client.get_table(table)
        except NotFound:
            dataset = self._bigquery.Dataset(self._dataset)
            dataset.location = self._run.config.bigquery_location
            self._client.create_dataset(dataset, exists_ok=True)
            return self._client.create_table(table, exists_ok=True)

    def _ensure_view(self, name: str, view: tables.Statement) -> None:
        from google.api_core.exceptions import NotFound

        table = self._bigquery.Table(f"{self._dataset}.{name}")
        table.view_query, table.description = view.text, view.description
        try:
            self._client.update_table(table, ["view_query", "description"])
        except NotFound:
            self._client.create_table(table, exists_ok=True)

    def _fields(self, table: str) -> list[Any]:
        return [self._bigquery.SchemaField.from_api_repr(field) for field in tables.fields(table, self._run.contract)]

    def _stage(self, name: str, files: Sequence[str]) -> Any:
        """A table of that name's columns, which ends by itself, with the rows of the files."""
        # Nothing is required of what is staged but by the audits.
        fields = [self._bigquery.SchemaField(field.name, field.field_type) for field in self._fields(name)]
        table = self._bigquery.Table(f"{self._dataset}.{name}_staging_{self._run.id}", schema=fields)
        table.expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=_STAGING_HOURS)
        staging = self._ensured(table)
        self._jobs.load([self._run.storage.url(file) for file in files], staging)
        return staging

    def _audit(self, staging: Any, unaudited: Sequence[str]) -> None:
        config, month = self._run.config, self._run.month
        gone = [(column, value) for column, _, value in (pair.partition("=") for pair in config.publish_gone)]
        values = {
            **self._values(),
            **{"staging": staging, "scores": f"{self._dataset}.scores", "rows": self._rows, "month": month, "run": self._run.id},
            **{"last": lake.month_after(month, -1), "max_mean_shift": config.publish_max_mean_shift, "gone": tables.listed(gone)},
        }
        for name, audit in tables.statements("audits", values).items():
            if name not in unaudited and (offending := self._jobs.query(f"{audit.text} LIMIT {_SHOWN}", "audit")):
                found = "; ".join(", ".join(f"{column} {value}" for column, value in row.items()) for row in offending)
                raise StageError(
                    f"audit {name} refused the scores of {month}, nothing is published; expected: {audit.description}; found {found}"
                )

    def _transaction(self, staging: Mapping[str, Any], row: Mapping[str, str | int | bool]) -> str:
        """One text: a reader sees the month as it was before, or as it is after."""
        statements, month = [], f"DATE '{self._run.month}-01'"
        for name, about in tables.TABLES.items():
            table, columns = f"`{self._dataset}.{name}`", tables.names(name, self._run.contract)
            if about.replaced is not None:
                statements.append(f"DELETE FROM {table} WHERE {about.replaced.format(month=month)}")
            if name in staging:
                statements.append(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM `{staging[name]}`")
        told = {name: tables.literal(value) for name, value in row.items()}
        told |= {"month": f"DATE '{self._run.month}-01'", "run_id": tables.literal(self._run.id), "published": "CURRENT_TIMESTAMP()"}
        statements.append(f"INSERT INTO `{self._dataset}.runs` ({', '.join(told)}) VALUES ({', '.join(told.values())})")
        return "\n".join(f"{statement};" for statement in ("BEGIN TRANSACTION", *statements, "COMMIT TRANSACTION"))
