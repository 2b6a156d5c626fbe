"""Publish: audited scores into BigQuery, then the champion pointer, then the lookup pointer.

    adstocrat publish 2026-10 --lake gs://bucket --dataset project.ads

Notes it under `publish/<month>/`, and moves `models/CHAMPION` and `lookup/CURRENT`, never to an earlier month.
"""

import datetime
import logging

from beam_jobs import ledger
from beam_jobs.evaluate import FOLDER as EVALUATION
from beam_jobs.run import MonthRun
from schemas import lake
from schemas.lake import Champion, Current

log = logging.getLogger("adstocrat")


def is_published(run: MonthRun) -> bool:
    """Whether there is nothing left to do: the run is the last that was published of its month, and the pointers do not lag behind."""
    noted = lake.publications(run.storage, run.month)
    in_dataset = [note for note in noted if note.dataset == run.config.dataset] if run.config.dataset else noted
    if not noted or noted[-1].run != run.id or not in_dataset or in_dataset[-1].run != run.id:
        return False
    current, _ = lake.read_pointer(run.storage, lake.CURRENT, Current)
    return current is not None and (current == Current(run.month, run.id) or current.month > run.month)


def publish(run: MonthRun) -> None:
    """Publish the run; done again, it comes to the same.

    Raises:
        StageError: the ledger does not balance, or an audit refuses the scores.
    """
    rows = ledger.take(run)["counts"]["ingested"]
    scores, evaluation = run.manifest(run.stage("scores"), "score"), run.manifest(run.stage(EVALUATION), "evaluate")
    if run.config.dataset:
        from beam_jobs.warehouse import Warehouse

        warehouse = Warehouse(run, run.config.dataset)
        log.info("  publish: %s has %s rows of %s", warehouse.table, f"{warehouse.replace_month(scores):,}", run.month)
    else:
        log.info("  publish: no --dataset, so the lookup alone is published")
    # Whether the gate promoted or not: the champion is the pair that the newest published month was scored with.
    pair = Champion(evaluation.info["encoder"], evaluation.info["ranker"], run.month, run.id)
    if not lake.move_pointer(run.storage, lake.CHAMPION, pair):
        log.info("  publish: the champion is of a later month and stays")
    if not lake.move_pointer(run.storage, lake.CURRENT, Current(run.month, run.id)):
        log.info("  publish: the lookup is of a later month and stays")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    note = lake.Publication(now, run.month, run.id, run.contract.fingerprint, rows, run.config.dataset or "")
    lake.note_publication(run.storage, note)
