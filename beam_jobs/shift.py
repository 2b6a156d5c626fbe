"""Why the mean probability is not what it was last month: how much is the mix of ads, and how much the model."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from beam_jobs import drift
from beam_jobs.inference import scored
from beam_jobs.join import month_rows
from beam_jobs.run import MonthRun
from model import registry
from schemas import lake
from schemas.lake import Manifest, Receipt
from schemas.parquet import read_columns, read_parquet

log = logging.getLogger("adstocrat")

# A sample is the first rows, which are in no order, of so many files.
_FILES, _ROWS = 32, 4_096


def explain(run: MonthRun) -> None:
    """Write `shift.json`: the means of both months, and of last month's model on this month's rows; empty where that cannot be told."""
    run.storage.write_json(f"{run.folder}/shift.json", _told(run))


def _told(run: MonthRun) -> dict[str, Any]:
    month, id = drift.previous(run)
    old = lake.read_manifest(run.storage, lake.stage_folder("scores", month, id)) if month else None
    new = run.manifest(run.stage("scores"))
    if old is None:
        return {}
    before, now = _mean(run, old), _mean(run, new)
    crossed = now if old.info == new.info else _crossed(run, old, now, new)
    if crossed is None or not before:
        return {}
    parts = {"mix": crossed / before - 1, "model": (now - crossed) / before}
    sentence = (
        f"mean p_click {now:.5f}, {before:.5f} in {month} ({now / before - 1:+.1%}): {parts['mix']:+.1%} from the mix of ads, as "
        f"ranker {old.info['ranker']} has this month's, and {parts['model']:+.1%} from the model"
    )
    return {"previous": month, "last": before, "this": now, **parts, "sentence": sentence}


def _some(receipts: Sequence[Receipt]) -> list[Receipt]:
    """Some of the receipts of a stage, evenly spread."""
    whole = [receipt for receipt in receipts if receipt.rows]
    return whole[:: -(-len(whole) // _FILES)]


def _mean(run: MonthRun, scores: Manifest) -> float:
    some = _some(scores.receipts)
    firsts = (next(iter(read_columns(run.storage, receipt.file, ["p_click"]))) for receipt in some)
    means = [float(np.mean(batch["p_click"].to_numpy())) for batch in firsts]
    return float(np.average(means, weights=[receipt.rows for receipt in some])) if some else 0.0


def _crossed(run: MonthRun, old: Manifest, now: float, new: Manifest) -> float | None:
    """The mean that last month's model gives this month's rows: this month's own, moved by how far the two are apart on a sample."""
    encoder, ranker = old.info["encoder"], old.info["ranker"]
    made = lake.read_manifest(run.storage, lake.model_folder("ranker", ranker))
    embedded = lake.read_manifest(run.storage, lake.embeddings_folder(encoder, run.month, run.id))
    if not made or not embedded or made.info.get("format") != registry.FORMAT:
        return None
    try:
        model = registry.load(run.storage, "ranker", ranker)
    except registry.ModelError as error:
        # What cannot be told keeps no month from being published.
        log.warning("what last month's model says of this month's rows cannot be told: %s", error)
        return None
    units = month_rows(run, run.month, run.id, encoder)
    # Scores are written in the order of their unit's rows.
    files = {receipt.unit: receipt.file for receipt in new.receipts}
    differences, rows = [], []
    for unit in _some(units.units):
        batch = next(iter(units.batches(unit))).slice(0, _ROWS)
        own = next(iter(read_parquet(run.storage, files[f"{unit.unit}@{0:09d}"], ["p_click"])))["p_click"].to_numpy()[: len(batch)]
        differences.append(float(np.mean(scored(batch, model, [])["p_click"].to_numpy() - own)))
        rows.append(unit.rows)
    return now + float(np.average(differences, weights=rows)) if rows else None
