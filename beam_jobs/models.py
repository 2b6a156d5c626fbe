"""The models of a lake for a person: list them, move the champion to one, and compare two on the same rows.

adstocrat models --lake gs://bucket
adstocrat promote 2026-09-0123456789abcdef --lake gs://bucket
adstocrat compare 2026-09-0123456789abcdef 2026-10-0123456789abcdef --lake gs://bucket
"""

import dataclasses
import json
import math
from typing import Any

from beam_jobs.config import Config
from beam_jobs.evaluate import count, judge, make_plan, units_of
from beam_jobs.run import MonthRun, StageError
from model import registry
from model.evaluation import Evaluation
from model.gate import Comparison
from model.registry import ModelError
from schemas import contract as contracts
from schemas import lake
from schemas.lake import Champion
from schemas.storage import Storage


def listed(storage: Storage) -> list[dict[str, Any]]:
    """All complete models: what they were trained on and from, and what the gate said of the rankers."""
    champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
    models = []
    for kind in ("encoder", "ranker"):
        for version in sorted({name.split("/")[2] for name in storage.names(f"models/{kind}/")}):
            found = lake.read_manifest(storage, lake.model_folder(kind, version))
            if found is None:
                continue
            training, parent = found.info["training"], found.info.get("parent")
            told = {"kind": kind, "version": version, **{name: training[name] for name in ("mode", "rows", "clicks")}}
            judged = lake.read_manifest(storage, f"{lake.model_folder(kind, version)}/evaluation")
            entropy = judged.info["metrics"].get("candidate", {}).get("normalized_entropy") if judged else None
            told |= {"parent": parent and parent["ranker"], "gate": judged and judged.info["status"], "normalized_entropy": entropy}
            models.append({**told, "champion": bool(champion) and version == getattr(champion, kind)})
    return models


def table(models: list[dict[str, Any]]) -> str:
    """What was listed, as lines to read."""
    lines = []
    for model in models:
        told = f"{model['kind']:<8} {model['version']}  {model['mode']}, {model['rows']:,} rows, {model['clicks']:,.0f} clicks"
        told += f", from {model['parent']}" if model["parent"] else ""
        told += f"  {model['gate']}" if model["gate"] else ""
        told += f", normalized entropy {model['normalized_entropy']:.5f}" if model["normalized_entropy"] else ""
        lines.append(told + ("  champion" if model["champion"] else ""))
    return "\n".join(lines) or "no model is there"


def promote(storage: Storage, version: str) -> Champion:
    """Make a kept ranker, with the encoder that it takes, the champion, so that the next run builds on it.

    Raises:
        ModelError: there is no such ranker, it is damaged, or of another contract than the champion.
        StageError: the champion was moved meanwhile.
    """
    there, at = lake.read_pointer(storage, lake.CHAMPION, Champion)
    made = registry.manifest(storage, "ranker", version)
    if there:
        contract = registry.manifest(storage, "ranker", there.ranker).info["contract"]
        if made.info["contract"] != contract:
            raise ModelError(f"ranker {version!r} is of contract {made.info['contract']}, the champion {there.ranker!r} of {contract}")
    if made.info.get("format") != registry.FORMAT:
        raise ModelError(f"ranker {version!r} has model format {made.info.get('format')}; expected {registry.FORMAT}, so train it again")
    registry.prove(storage, made.info["encoder"], version)
    # The month stays that of the newest publication, which alone moves it on.
    month, run = (there.month, there.run) if there else (made.info["month"], made.info["run"])
    champion = Champion(made.info["encoder"], version, month, run)
    if not storage.swap(lake.CHAMPION, at, json.dumps(dataclasses.asdict(champion), indent=1).encode()):
        raise StageError(f"the champion was moved while {version!r} was looked at; see `adstocrat models` and promote again")
    return champion


def compare(storage: Storage, one: str, other: str) -> dict[str, Any]:
    """Two kept rankers on the gate rows of the newest labelled month that has the embeddings of both: their metrics by slice.

    Raises:
        ModelError: one of them is not there, is damaged, or they are of two contracts.
        StageError: there is no such month.
    """
    made = {version: registry.manifest(storage, "ranker", version) for version in (one, other)}
    found = {version: manifest.info["contract"] for version, manifest in made.items()}
    if found[one] != found[other]:
        raise ModelError(f"ranker {one!r} is of contract {found[one]}, {other!r} of {found[other]}; they cannot be compared")
    pairs = {version: Champion(manifest.info["encoder"], version, "", "") for version, manifest in made.items()}
    with registry.local_folder() as folder:
        registry.fetch(storage, "ranker", one, folder)
        contract = contracts.load(folder / "contract.pbtxt")
    for month in reversed(lake.published_months(storage)):
        last = lake.last_publication(storage, month, contract.fingerprint)
        if last and all(lake.read_manifest(storage, lake.embeddings_folder(pair.encoder, month, last.run)) for pair in pairs.values()):
            run = MonthRun(storage, contract, Config(lake=storage.uri), month, last.run, (), None, None)
            run = dataclasses.replace(run, earlier=tuple((earlier, id) for earlier, id in run.inputs["window"]))
            units = units_of(run)
            plan = dataclasses.replace(make_plan([count(unit, run) for unit in units], 1), months=(month,))
            evaluation = judge(units, run, plan, pairs)
            if evaluation.overall.rows:
                return {"month": month, "versions": [one, other], "slices": _compared(evaluation, one, other)}
    raise StageError(f"no published month has labelled gate rows and the embeddings of both {one!r} and {other!r}")


def _compared(evaluation: Evaluation, one: str, other: str) -> list[dict[str, Any]]:
    models, slices = [evaluation.models.index(one), evaluation.models.index(other)], []
    for (segment, value), found in evaluation.slices.items():
        metrics, compared = [found.metrics(model) for model in models], Comparison.of(found, models[1], models[0], 0.0)
        told = {"segment": segment, "value": value, "clicks": found.clicks, "metrics": metrics}
        slices.append({**told, "difference": compared.difference, "at_most": None if math.isnan(compared.upper) else compared.upper})
    return slices


def side_by_side(told: dict[str, Any]) -> str:
    """What was compared, as a table to read."""
    lines = [
        f"gate rows of {told['month']}: A is {told['versions'][0]}, B is {told['versions'][1]}",
        f"{'':<28} {'clicks':>9} {'NE of A':>9} {'NE of B':>9} {'B to A':>8} {'at most':>8} {'calibration of A, B':>20}",
    ]
    for found in told["slices"]:
        a, b = found["metrics"]
        name = found["segment"] if found["value"] is None else f"{found['segment']}={found['value']}"
        entropies = f"{_text(a['normalized_entropy'])} {_text(b['normalized_entropy'])}"
        calibrations = f"{_text(a['calibration'], 10, 3)} {_text(b['calibration'], 9, 3)}"
        at_most = f"{'-':>8}" if found["at_most"] is None else f"{found['at_most']:>+8.2%}"
        lines.append(f"{name:<28} {found['clicks']:>9,.0f} {entropies} {found['difference']:>+8.2%} {at_most} {calibrations}")
    return "\n".join(lines)


def _text(number: Any, width: int = 9, digits: int = 5) -> str:
    return f"{'-':>{width}}" if number is None else f"{number:>{width}.{digits}f}"
