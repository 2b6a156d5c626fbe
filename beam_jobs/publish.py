"""Publish: audited scores into BigQuery, then the champion pointer if the gate promoted, then the lookup pointer.

    adstocrat publish 2026-10 --lake gs://bucket --dataset project.ads

Writes `publish/<month>/<run>/`, and moves `models/CHAMPION` and `lookup/CURRENT`, never to an earlier month.
"""

import datetime
import logging

from beam_jobs import ledger
from beam_jobs.evaluate import FOLDER as EVALUATION
from beam_jobs.run import MonthRun
from schemas import lake
from schemas.lake import Champion, Current, Manifest

log = logging.getLogger("adstocrat")


def folder(run: MonthRun) -> str:
    """Where it is noted that the run is published; each dataset has a note of its own."""
    return run.stage(f"bigquery/{run.config.dataset}" if run.config.dataset else "publish")


def is_published(run: MonthRun) -> bool:
    """Whether there is nothing left to do: the dataset has the month, and the pointers do not lag behind."""
    if any(lake.read_manifest(run.storage, place) is None for place in (folder(run), run.stage("publish"))):
        return False
    current, _ = lake.read_pointer(run.storage, lake.CURRENT, Current)
    return current is not None and (current == Current(run.month, run.id) or current.month > run.month)


def publish(run: MonthRun) -> Manifest:
    """Publish the run, each step only where it is not done yet.

    Raises:
        StageError: the ledger does not balance, or an audit refuses the scores.
    """
    counts = ledger.take(run)["counts"]
    scores, evaluation = run.manifest(run.stage("scores"), "score"), run.manifest(run.stage(EVALUATION), "evaluate")
    if run.config.dataset and lake.read_manifest(run.storage, folder(run)) is None:
        from beam_jobs.warehouse import Warehouse

        warehouse = Warehouse(run, run.config.dataset)
        rows = warehouse.replace_month(scores)
        lake.commit(run.storage, folder(run), Manifest("bigquery", (), {"table": warehouse.table, "rows": rows}))
        log.info("  publish: %s has %s rows of %s", warehouse.table, f"{rows:,}", run.month)
    elif not run.config.dataset:
        log.info("  publish: no --dataset, so the lookup alone is published")
    if evaluation.info["promoted"]:
        champion = Champion(evaluation.info["encoder"], evaluation.info["ranker"], run.month, run.id)
        if not lake.move_pointer(run.storage, lake.CHAMPION, champion):
            log.info("  publish: the champion is of a later month and stays")
    if not lake.move_pointer(run.storage, lake.CURRENT, Current(run.month, run.id)):
        log.info("  publish: the lookup is of a later month and stays")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    info = {"month": run.month, "run": run.id, "contract": run.contract.fingerprint, "published": now, "rows": counts["ingested"]}
    return lake.commit(run.storage, run.stage("publish"), Manifest("publish", (), info))
