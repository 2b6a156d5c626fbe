"""Status: what the lake, BigQuery, the pointers and servers each say is published, and whether a new run of the month is due.

adstocrat status --lake gs://bucket --dataset project.ads --url http://scores:8080
"""

import contextlib
import dataclasses
import http.client
import json
import os
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from beam_jobs.config import Config
from beam_jobs.jobs import Jobs
from beam_jobs.run import StageError, derive, published_contract
from schemas import lake
from schemas.lake import Champion, Current, Publication
from schemas.storage import Storage, open_storage

_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Said:
    """What one place says.

    Attributes:
        place: its name.
        run: (month, run id), None where nothing is published.
        more: what else there is to tell.
    """

    place: str
    run: tuple[str, str] | None
    more: str = ""


def status(config: Config, urls: Sequence[str]) -> dict[str, Any]:
    """What all `places` say, whether they `agree`, and what is `due`; BigQuery as the config or the last publication names it."""
    storage = open_storage(config.lake)
    months = lake.published_months(storage)
    noted = lake.last_publication(storage, months[-1]) if months else None
    dataset = config.dataset or (noted.dataset if noted else None)
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
    said = [Said("published", _run_of(noted), f"{noted.published[:16]}, {noted.rows:,} rows" if noted else "")]
    if dataset:
        said.append(_bigquery(dataclasses.replace(config, dataset=dataset), noted))
    said.append(Said(lake.CURRENT, _run_of(current)))
    told = Said(lake.CHAMPION, _run_of(champion), f"ranker {champion.ranker}" if champion else "")
    if noted and noted.kept_model:
        told = dataclasses.replace(told, run=said[0].run, more=f"{told.more}, which the rollback kept")
    said += [told, *map(_server, urls)]
    due = _due(config, storage, noted) if noted else []
    agree = len({place.run for place in said}) == 1
    if not agree:
        newest = max(place.run[0] for place in said if place.run)
        due.insert(0, f"they differ; `adstocrat publish {newest}` makes them the same")
        if dataset and said[0].run != said[1].run:
            # Publishing decides by the lake whether there is anything to do. Who may only read is told all the same.
            with contextlib.suppress(PermissionError):
                storage.write(lake.differs(newest), b"")
    return {"places": [dataclasses.asdict(place) for place in said], "agree": agree, "due": due}


def lines(told: Mapping[str, Any]) -> str:
    """The status as lines to read."""
    width = max(len(place["place"]) for place in told["places"])
    said = [f"{place['place']:<{width}}  {'  '.join(place['run'] or ('nothing',))}  {place['more']}".rstrip() for place in told["places"]]
    return "\n".join([*said, *told["due"]])


def _run_of(told: Publication | Current | Champion | None) -> tuple[str, str] | None:
    return (told.month, told.run) if told else None


def _bigquery(config: Config, noted: Publication | None) -> Said:
    """What the score table has of the newest month, and of later ones."""
    from google.api_core.exceptions import NotFound

    place, since = f"{config.dataset}.scores", f"{noted.month if noted else '0001-01'}-01"
    text = f"SELECT month, run_id, COUNT(*) AS n FROM `{place}` WHERE month >= DATE '{since}' GROUP BY month, run_id ORDER BY month, n"
    try:
        rows = Jobs(config, "status").query(text, "status")
    except NotFound:
        rows = []
    if not rows:
        return Said(place, None)
    count = sum(row["n"] for row in rows)
    run = (rows[-1]["month"].isoformat()[:7], rows[-1]["run_id"])
    # Rows of another run beside it, or too few of them, are no run at all.
    whole = len(rows) == 1 and (noted is None or run != (noted.month, noted.run) or count == noted.rows)
    return Said(place, run if whole else (run[0], f"{run[1]} in part"), f"{count:,} rows")


def _server(url: str) -> Said:
    token = os.environ.get("ADSTOCRAT_TOKEN")
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/status", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            told = json.load(answer)
        return Said(url, (told["month"], told["run_id"]))
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return Said(url, None, f"does not say: {error}")


def _due(config: Config, storage: Storage, noted: Publication) -> list[str]:
    """Whether the month's inputs now make another run than the one published, and which of them changed."""
    try:
        run, inputs, _ = derive(config, noted.month, published_contract(config, noted.month))
    except StageError as error:
        return [f"whether {noted.month} changed since cannot be told: {error}"]
    if run.id == noted.run:
        return []
    if run.left("lookup"):
        return [f"{noted.month} has the run {run.id} too; `adstocrat publish {noted.month}`, with that run's flags, makes it current"]
    before = storage.read_json(f"{lake.run_folder(noted.month, noted.run)}/inputs.json") or {}
    # As JSON has them.
    changed = [name for name, value in inputs.items() if json.loads(json.dumps(value)) != before.get(name)]
    return [
        f"{noted.month} has other {', '.join(changed)} now than run {noted.run}; `adstocrat month {noted.month}` makes run {run.id} of it"
    ]
