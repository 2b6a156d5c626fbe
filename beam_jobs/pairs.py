"""Pairs of an encoder and a ranker that a run has to do with: its candidate, and those that it may be compared with."""

from beam_jobs.run import MonthRun
from model import registry
from model.gate import CHAMPION, EARLIER_CHAMPION
from schemas.lake import Champion


def candidate(run: MonthRun) -> Champion:
    """The pair that the run makes."""
    return Champion(run.encoder, run.version, run.month, run.id)


def peers(run: MonthRun) -> dict[str, Champion]:
    """Published pairs that can score the month's rows, by what they are to the candidate; one of another contract or format cannot."""
    named = {CHAMPION: run.champion, EARLIER_CHAMPION: run.earlier_champion}
    made = {name: registry.manifest(run.storage, "ranker", pair.ranker).info for name, pair in named.items() if pair}
    wanted = (run.contract.fingerprint, registry.FORMAT)
    return {name: pair for name, pair in named.items() if pair and (made[name]["contract"], made[name].get("format")) == wanted}
