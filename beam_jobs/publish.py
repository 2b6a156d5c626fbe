"""Publish: audited scores into BigQuery, then the champion pointer, then the lookup pointer; and the way back.

    adstocrat publish 2026-10 --lake gs://bucket --dataset project.ads
    adstocrat rollback 2026-10 --lake gs://bucket

Notes it under `publish/<month>/`, and moves `models/CHAMPION` and `lookup/CURRENT`, never to an earlier month.
"""

import dataclasses
import datetime
import logging

from beam_jobs import ledger, outcomes
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, StageError, kept
from beam_jobs.warehouse import Warehouse
from schemas import lake
from schemas.lake import Champion, Current, Pointer, Publication
from schemas.storage import open_storage

log = logging.getLogger("adstocrat")

# Audits of what changes from month to month; a run that was published before, or is gone back to, was let through then.
_CHANGES = ("change_mean", "change_segments")
_STAGES = ("rows", "creatives", "evaluation", "scores", "lookup")


def is_published(run: MonthRun) -> bool:
    """Whether there is nothing left to do: the run is the last that was published of its month, and the pointers do not lag behind."""
    noted = lake.publications(run.storage, run.month)
    in_dataset = [note for note in noted if note.dataset == run.config.dataset] if run.config.dataset else noted
    if not noted or noted[-1].run != run.id or not in_dataset or in_dataset[-1].run != run.id:
        return False
    current, _ = lake.read_pointer(run.storage, lake.CURRENT, Current)
    champion, _ = lake.read_pointer(run.storage, lake.CHAMPION, Champion)
    pointers = [current] if noted[-1].kept_model else [current, champion]
    return not run.storage.names(lake.differs(run.month)) and all(
        there is not None and ((there.month, there.run) == (run.month, run.id) or there.month > run.month) for there in pointers
    )


def publish(run: MonthRun) -> None:
    """Publish the run; done again, it comes to the same.

    Raises:
        StageError: the ledger does not balance, or an audit refuses the scores.
    """
    _make_current(_with_dataset(run, run.config))


def _with_dataset(run: MonthRun, config: Config) -> MonthRun:
    """The run with the dataset that its month was last published to, unless the config names one: no table is left behind."""
    last = lake.last_publication(run.storage, run.month)
    dataset = config.dataset or (last.dataset if last else "") or None
    return dataclasses.replace(run, config=dataclasses.replace(config, dataset=dataset))


def rollback(config: Config, month: str, to: str | None, keep_model: bool) -> MonthRun:
    """Make an earlier run the month's again, first for who asks the service; returns the run.

    Args:
        config: its dataset, unless it names one, is that of the last publication.
        to: the run; None for the last one published that is not the month's now.
        keep_model: leave the champion, which the next month builds on.

    Raises:
        StageError: there is no such run, or it is not kept whole.
    """
    storage = open_storage(config.lake)
    noted = lake.publications(storage, lake.check_month(month))
    earlier = [note.run for note in noted if note.run != noted[-1].run]
    if to is None and not earlier:
        there = f"its only one is {noted[-1].run}, published {noted[-1].published[:16]}" if noted else "none of it was published"
        raise StageError(f"month {month} has no earlier run to go back to: {there}; `adstocrat runs --lake {storage.uri}` lists all runs")
    run = _with_dataset(kept(config, month, to or earlier[-1]), config)
    if missing := [stage for stage in _STAGES if run.left(stage) is None]:
        raise StageError(f"run {run.id!r} of {month} is not whole: it has no {', '.join(missing)}; expected one that was published")
    _make_current(run, back=True, keep_model=keep_model)
    return run


def _make_current(run: MonthRun, back: bool = False, keep_model: bool = False) -> None:
    """Have the run published, all of its rows counted before; `back` to it, the service comes first."""
    counts = ledger.take(run)["counts"]
    evaluation, scores = run.manifest(run.stage("evaluation")), run.manifest(run.stage("scores"))
    current = Current(run.month, run.id)
    if moved := run.document("shift"):
        log.info("  publish: %s", moved["sentence"])
    if back:
        _move(run, lake.CURRENT, current)
    warehouse = Warehouse(run, counts["ingested"]) if run.config.dataset else None
    if warehouse:
        row = {
            "read_rows": counts["read"],
            "rejected_rows": counts["rejected"],
            "scored_rows": counts["scored"],
            "contract": run.contract.fingerprint,
            "encoder_version": scores.info["encoder"],
            "model_version": scores.info["ranker"],
            "promoted": evaluation.info["promoted"],
            "why": evaluation.info["why"],
        }
        realised = run.left("realised")
        judged = [*evaluation.files, *(realised.files if realised else [])]
        let_through = back or any(note.run == run.id for note in lake.publications(run.storage, run.month))
        unaudited = _CHANGES if let_through else _CHANGES[:1] if run.config.accept_shift else ()
        files = {"scores": scores.files, "outcomes": outcomes.write(run).files, "quality": judged}
        warehouse.replace_month(files, row, unaudited)
        warehouse.check()
        log.info("  publish: %s.scores has %s rows of %s", run.config.dataset, f"{counts['ingested']:,}", run.month)
    else:
        log.info("  publish: no --dataset, so the lookup alone is published")
    there, _ = lake.read_pointer(run.storage, lake.CHAMPION, Champion)
    # One that was promoted by hand since has the publication's month and run, and stays.
    if not keep_model and (back or there is None or (there.month, there.run) != (run.month, run.id)):
        # Whether the gate promoted or not: the champion is the pair that the newest published month was scored with.
        _move(run, lake.CHAMPION, Champion(scores.info["encoder"], scores.info["ranker"], run.month, run.id))
    if not back:
        _move(run, lake.CURRENT, current)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    if warehouse:
        # Another may have published the month meanwhile, and notes must be in the order of what they tell.
        warehouse.check()
    fingerprint, dataset = run.contract.fingerprint, run.config.dataset or ""
    lake.note_publication(run.storage, Publication(now, run.month, run.id, fingerprint, counts["ingested"], dataset, keep_model))


def _move(run: MonthRun, pointer: str, value: Pointer) -> None:
    if not lake.move_pointer(run.storage, pointer, value):
        log.info("  publish: %s is of a later month and stays", pointer)
