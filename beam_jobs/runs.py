"""What ran, what is there of it, and what can be removed."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

from schemas import lake
from schemas.lake import Champion, Current
from schemas.storage import Storage

# The folders that belong to one run of one month, whole; under `creatives` and `embeddings` the packs are every later month's as well.
OF_A_RUN = ("rows", "rejects", "evaluation", "scores", "outcomes", "lookup", "statistics", "realised", "runs")
_SPILL_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as the lake shows it.

    Attributes:
        month, id: which.
        inputs: its `inputs.json`.
        published: when it last was, in ISO 8601; empty where it never was.
    """

    month: str
    id: str
    inputs: dict[str, Any]
    published: str


def all_runs(storage: Storage) -> list[Run]:
    """All runs, in order of month and of when they began."""
    found = []
    for name in storage.names("runs/"):
        if name.endswith("/inputs.json"):
            _, month, id, _ = name.split("/")
            published = [note.published for note in lake.publications(storage, month) if note.run == id]
            found.append(Run(month, id, storage.read_json(name), max(published, default="")))
    return sorted(found, key=lambda run: (run.month, run.inputs["created"]))


def listed(storage: Storage) -> list[dict[str, Any]]:
    """All runs: what they had, how far they came, and which one is served."""
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    found = []
    for run in all_runs(storage):
        ledger = storage.read_json(f"{lake.run_folder(run.month, run.id)}/ledger.json")
        told = {"month": run.month, "run": run.id, "began": run.inputs["created"], "rows": ledger and ledger["counts"]["ingested"]}
        found.append({**told, "published": run.published or None, "served": current == Current(run.month, run.id)})
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """What was listed, as lines to read."""
    lines = []
    for run in runs:
        rows = f"{'':>17}" if run["rows"] is None else f"{run['rows']:>12,} rows"
        state = f"published {run['published'][:16]}" if run["published"] else "not published"
        lines.append(f"{run['month']}  {run['run']}  began {run['began'][:16]}  {rows}  {state}{', served' if run['served'] else ''}")
    return "\n".join(lines) or "no run is there"


def find(storage: Storage, id: str) -> Run:
    """The run of that id, or that the month stands before.

    Raises:
        ValueError: there is no such run.
    """
    runs = [run for run in all_runs(storage) if run.id == id or f"{run.month}-{run.id}" == id]
    if not runs:
        raise ValueError(f"run {id!r} is not in {storage.uri}; `adstocrat runs --lake {storage.uri}` lists those that are")
    return runs[0]


def show(storage: Storage, id: str) -> str:
    """One run's inputs, ledger and verdict. Raises as `find`."""
    run = find(storage, id)
    evaluation = lake.read_manifest(storage, lake.stage_folder("evaluation", run.month, run.id))
    parts = {
        "month": run.month,
        "run": run.id,
        "published": run.published or None,
        "inputs": run.inputs,
        "evaluation": evaluation.info if evaluation else None,
        **{
            name: storage.read_json(f"{lake.run_folder(run.month, run.id)}/{name}.json")
            for name in ("ledger", "drift", "realised", "shift")
        },
    }
    return json.dumps(parts, indent=1)


def garbage(storage: Storage, keep: int) -> list[str]:
    """Names of all objects that no kept run and no pointer needs, in an order in which they can be removed.

    Kept are the `keep` newest runs of each month, those of each contract that were published last, the run that is served, and, of each of
    these, the runs that it builds on and its models with all their parents. Images that were looked at stay known for ever, in packs that
    are complete.

    Raises:
        ValueError: nothing would be kept.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1 run of each month")
    # What tells of a run goes last: a removal that dies is taken up by the next.
    return sorted(set(_garbage(storage, keep)), key=lambda name: (name.startswith("runs/"), name.endswith("/inputs.json"), name))


def _garbage(storage: Storage, keep: int) -> Iterator[str]:
    runs = {(run.month, run.id): run for run in all_runs(storage)}
    kept = _kept_runs(storage, runs, keep)
    models = _kept_models(storage, kept)
    for folder in (*OF_A_RUN, "creatives", "embeddings"):
        names = set(storage.names(f"{folder}/"))
        for name in names:
            parts = name.split("/")
            if folder == "embeddings" and ("encoder", parts[1]) not in models:
                yield name
            elif name == lake.CURRENT or ("packs" in parts and f"{name.rpartition('/')[0]}/{lake.MANIFEST}" in names):
                continue
            elif (run := next((pair for pair in itertools.pairwise(parts) if pair in runs), None)) and run not in kept:
                yield name
    for kind in ("encoder", "ranker"):
        for name in storage.names(f"models/{kind}/"):
            if (kind, name.split("/")[2]) not in models:
                yield name
    yield from _unlisted(storage)
    for launch in {name.split("/")[1] for name in storage.names("spill/")}:
        if time.time() - (storage.last_change(f"spill/{launch}/") or 0) > _SPILL_SECONDS:
            yield from storage.names(f"spill/{launch}/")


def _kept_runs(storage: Storage, runs: dict[tuple[str, str], Run], keep: int) -> set[tuple[str, str]]:
    todo = []
    for month in {month for month, _ in runs}:
        of_month = [pair for pair in runs if pair[0] == month]
        published = sorted((pair for pair in of_month if runs[pair].published), key=lambda pair: runs[pair].published)
        # Of each contract the last: a later month's window may go back to it.
        todo += [*of_month[-keep:], *{runs[pair].inputs["contract"]: pair for pair in published}.values()]
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    if current:
        todo.append((current.month, current.run))
    kept: set[tuple[str, str]] = set()
    while todo:
        pair = todo.pop()
        if pair in runs and pair not in kept:
            kept.add(pair)
            todo += [(month, id) for month, id in runs[pair].inputs["window"]]
    return kept


def _kept_models(storage: Storage, kept: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """(kind, version) of the models that kept runs made or scored with, of the champion, and of all their parents."""
    champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
    todo = [f"{month}-{id}" for month, id in kept] + ([champion.ranker] if champion else [])
    for month, id in kept:
        evaluation = lake.read_manifest(storage, lake.stage_folder("evaluation", month, id))
        todo += [evaluation.info["ranker"]] if evaluation else []
    models = {("encoder", f"{month}-{id}") for month, id in kept}
    while todo:
        version = todo.pop()
        manifest = lake.read_manifest(storage, lake.model_folder("ranker", version))
        if ("ranker", version) not in models:
            models.add(("ranker", version))
            if manifest:
                models.add(("encoder", manifest.info["encoder"]))
                todo += [manifest.info["parent"]["ranker"]] if manifest.info["parent"] else []
    return models


def _unlisted(storage: Storage) -> Iterator[str]:
    """Files of attempts that failed or were repeated: of a stage that is complete, and in no manifest; and sketches that are merged."""
    names = [name for top in (*OF_A_RUN, "creatives", "embeddings", "models") if top != "runs" for name in storage.names(f"{top}/")]
    folders = [name.rpartition("/")[0] for name in names if name.endswith(f"/{lake.MANIFEST}")]
    listed = {file for folder in folders if (manifest := lake.read_manifest(storage, folder)) for file in manifest.files}
    # What was rejected stands in the manifest of the rows.
    complete = {*folders, *(folder.replace("rows/", "rejects/", 1) for folder in folders if folder.startswith("rows/"))}
    merged = {name.rpartition("/")[0] for name in names if name.startswith("statistics/") and name.endswith("/statistics.pb")}
    yield from (name for name in names if (parts := name.partition("/units/"))[1] and parts[0] in merged)
    for name in names:
        above = itertools.accumulate(name.split("/")[:-1], "{}/{}".format)
        if name not in listed and not name.endswith(f"/{lake.MANIFEST}") and not complete.isdisjoint(above):
            yield name
