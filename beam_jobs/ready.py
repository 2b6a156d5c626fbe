"""Whether a month may begin, and whether it may go on: what was delivered is looked at before anything is built on it."""

import os
import time

from beam_jobs.run import MonthRun, StageError
from schemas import lake
from schemas.parquet import read_parquet
from schemas.rows import REJECTS
from schemas.storage import Storage

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHOWN = 5


class NotReadyError(StageError):
    """The month's delivery is not complete yet; the message says what is waited for."""

    status = os.EX_TEMPFAIL


def check_delivery(storage: Storage, month: str, ready: str) -> None:
    """Let a month begin: `always`, once a marker file is there, or once nothing has changed for a while.

    Raises:
        NotReadyError: not yet.
    """
    how, _, what = ready.partition(" ")
    raw = f"raw/{month}/"
    if how == "marker" and f"{raw}{what}" not in storage.names(f"{raw}{what}"):
        raise NotReadyError(f"month {month} is not ready: waiting for {storage.url(raw + what)}")
    if how == "quiet":
        wanted = int(what[:-1]) * _SECONDS[what[-1]]
        changed = storage.last_change(raw)
        quiet = time.time() - changed if changed else 0.0
        if quiet < wanted:
            raise NotReadyError(
                f"month {month} is not ready: {storage.url(raw)} changed {quiet:,.0f} s ago, waiting until it is quiet for {what}"
            )


def check_rejects(run: MonthRun) -> None:
    """Let a month go on after ingest.

    Raises:
        StageError: more rows were rejected than `max_reject_share`; with the commonest reasons and an example of each.
    """
    rows = run.manifest(run.stage("rows"))
    rejected, read = rows.counts("rejected:"), rows.count("read")
    if not rows.count("ingested"):
        raise StageError(f"no row of {run.month} was ingested, {read:,} were read; {_examples(run, rejected)}")
    if sum(rejected.values()) > run.config.max_reject_share * read:
        share = sum(rejected.values()) / read
        raise StageError(
            f"{sum(rejected.values()):,} of {read:,} rows of {run.month} were rejected, {share:.2%}, and max_reject_share is "
            f"{run.config.max_reject_share:.2%}, so nothing is trained or published; mend the export; {_examples(run, rejected)}"
        )


def _examples(run: MonthRun, rejected: dict[str, int]) -> str:
    """The commonest reasons, each with a rejected row."""
    commonest = sorted(rejected, key=lambda reason: (-rejected[reason], reason))[:_SHOWN]
    found: dict[str, str] = {}
    for receipt in run.manifest(run.stage("rows")).receipts:
        if receipt.unit.startswith("shard/") or not receipt.file or set(found) >= set(commonest):
            continue
        for batch in read_parquet(run.storage, receipt.file, REJECTS.names):
            for row in batch.to_pylist():
                where = f"{row['file'].removeprefix(lake.raw_ads(run.month))} row {row['row']}"
                found.setdefault(row["reason"], f"{where}, column {row['column']!r}, value {row['value']!r}")
    return (
        "; ".join(f"{reason} {rejected[reason]:,} times, such as {found.get(reason, 'none kept')}" for reason in commonest)
        or "no row was read"
    )
