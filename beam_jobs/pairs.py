"""Pairs of an encoder and a ranker that a run has to do with: its candidate, and those that it may be compared with."""

from beam_jobs.run import MonthRun
from model import registry
from schemas.lake import Champion

CANDIDATE, CHAMPION = "candidate", "champion"


def candidate(run: MonthRun) -> Champion:
    """The pair that the run makes."""
    return Champion(run.encoder, run.version, run.month, run.id)


def peers(run: MonthRun) -> dict[str, Champion]:
    """Published pairs that can score the month's rows, by what they are to the candidate; a pair of another contract cannot."""
    champion = run.champion
    if champion is None or champion.encoder != run.known_encoder:
        return {}
    made = registry.manifest(run.storage, "ranker", champion.ranker)
    return {CHAMPION: champion} if made.info["contract"] == run.contract.fingerprint else {}
