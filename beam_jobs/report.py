"""The month on a page: what a run did and what came of it, for a person; and all runs, on a page of their own.

    adstocrat report 3f2a9c0d11b7e654 --lake gs://bucket

Writes `runs/<month>/<run>/report.html` and `report.json`, which says the same in short, and `runs/index.html`. All of it is told from what
the stages left, so a page can be made again at any time, also of a run that was stopped.
"""

import base64
import dataclasses
import datetime
import hashlib
import pathlib
from typing import Any

from beam_jobs.config import Config
from beam_jobs.run import MonthRun, StageError, kept
from beam_jobs.runs import find
from schemas import lake
from schemas.storage import Storage, open_storage

PUBLISHED, KEPT, REPLACED, STOPPED, UNFINISHED = "published", "kept", "replaced", "stopped", "unfinished"
INDEX = "runs/index.html"
_TEMPLATES = pathlib.Path(__file__).with_name("templates")


@dataclasses.dataclass(frozen=True)
class Number:
    """One of the four that matter, as text, and what it is to be compared with."""

    label: str
    value: str
    note: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in short.

    Attributes:
        month, run: which.
        status: PUBLISHED, or with the champion KEPT; REPLACED by another run; STOPPED, or UNFINISHED.
        verdict: that in one sentence, with the reason.
        alarms: what changed in the world, a sentence each, the worst first.
        numbers: the four that matter.
    """

    month: str
    run: str
    status: str
    verdict: str
    alarms: list[str]
    numbers: list[Number]


def of_run(config: Config, id: str) -> MonthRun:
    """The run of that id, of whatever month.

    Raises:
        StageError: there is none, or it was removed.
    """
    found = find(open_storage(config.lake), id)
    return kept(config, found.month, found.id)


def read(storage: Storage, month: str, id: str) -> Summary | None:
    """What the last page of a run said in short; None while there is no page."""
    told = storage.read_json(f"{lake.run_folder(month, id)}/report.json")
    return Summary(**{**told, "numbers": [Number(**number) for number in told["numbers"]]}) if told else None


def write(run: MonthRun) -> Summary:
    """Make the page of a run, and that of all runs."""
    from beam_jobs.report_page import collect

    status, sentence = verdict(run)
    page = collect(run, status, sentence)
    run.storage.write(f"{run.folder}/report.html", _rendered("report.html", page=page).encode())
    run.storage.write_json(f"{run.folder}/report.json", dataclasses.asdict(page["summary"]))
    write_index(run.storage)
    return page["summary"]


def refresh(run: MonthRun) -> None:
    """Make the page of a run again if there is one and the run is not what it says; and that of all runs."""
    made = read(run.storage, run.month, run.id)
    if made and made.status != verdict(run)[0]:
        write(run)
    else:
        write_index(run.storage)


def stopped(run: MonthRun, stage: str, error: StageError) -> Summary:
    """Note that a stage stopped the month, and why, and make the page that says so."""
    told = {"stage": stage, "why": str(error), "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")}
    run.storage.write_json(f"{run.folder}/stopped.json", told)
    return write(run)


def went_on(run: MonthRun) -> None:
    """Take back that the month was stopped."""
    run.storage.delete(f"{run.folder}/stopped.json")


def verdict(run: MonthRun) -> tuple[str, str]:
    """The status of a run, and that in one sentence."""
    noted = lake.publications(run.storage, run.month)
    ours = [note for note in noted if note.run == run.id]
    stop = run.document("stopped")
    # A stage that was run alone since may have published it.
    if stop and not (ours and ours[-1].published > stop["at"]):
        again = f"; {noted[-1].run} stays the month's run" if noted and noted[-1].run != run.id else ""
        return STOPPED, f"{run.month} is not published: stopped at {stop['stage']}, because {_sentence(stop['why'])}{again}."
    if not ours:
        return UNFINISHED, f"{run.month} is not published yet by this run; `adstocrat month {run.month}` goes on with it."
    if noted[-1].run != run.id:
        return REPLACED, f"{run.month} was published by this run on {ours[-1].published[:10]}, and later by {noted[-1].run}."
    ads, info = f"{ours[-1].rows:,} ads", run.manifest(run.stage("evaluation")).info
    if not info["promoted"]:
        why = _sentence(info["why"], "; the champion stays")
        return KEPT, f"{run.month} is published: {ads} are scored by the champion, which was kept because {why}."
    if info["status"] == "promoted":
        return PUBLISHED, f"{run.month} is published: {ads} are scored by a new model, which the gate let take the champion's place."
    flag = f"; it is flagged, because {_sentence(info['why'], '; published all')}" if info["flagged"] else ""
    return PUBLISHED, f"{run.month} is published: {ads} are scored by a first model{flag}."


def _sentence(why: str, end: str = "\n") -> str:
    """A reason as part of a sentence: what stands before `end`, without a full stop."""
    return why.partition(end)[0].rstrip(". ")


def write_index(storage: Storage) -> None:
    """Make the page of all runs."""
    from beam_jobs.report_page import index

    storage.write(INDEX, _rendered("index.html", index=index(storage)).encode())


def _rendered(template: str, **values: Any) -> str:
    """A page; whatever is put into it is text, unless it was made here as markup."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (_TEMPLATES / "sort.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(script), script_digest=f"sha256-{digest}", **values)
