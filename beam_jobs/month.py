"""The month: all stages in order, each skipped when its output is complete, each telling one line."""

import dataclasses
import functools
import logging
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

from beam_jobs import drift, ledger, publish, report
from beam_jobs.notify import notify
from beam_jobs.ready import check_rejects
from beam_jobs.run import HandedOverError, MonthRun, stage_error
from schemas import lake

log = logging.getLogger("adstocrat")
Flags = Sequence[str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the month.

    Attributes:
        name: of the command too.
        is_complete: whether there is nothing to do.
        execute: does it, given Beam's flags.
        tell: its counts in a few words, and the units of work that its rate counts.
    """

    name: str
    is_complete: Callable[[MonthRun], bool]
    execute: Callable[[MonthRun, Flags], None]
    tell: Callable[[MonthRun], tuple[str, int]]


def run_month(run: MonthRun, flags: Flags) -> report.Summary:
    """Run all stages, show the ledger, tell the webhook, and make the page; of a month that is stopped both say why."""
    try:
        ran = _run_stages(run, flags)
    except HandedOverError:
        raise
    except BaseException as error:
        notify(run, error)
        raise
    notify(run, None)
    report.went_on(run)
    made = report.read(run.storage, run.month, run.id)
    return made if made and not ran and made.status == report.verdict(run)[0] else report.write(run)


def _run_stages(run: MonthRun, flags: Flags) -> bool:
    """Whether any had to run."""
    log.info("month %s, run %s, window %s", run.month, run.id, ", ".join(month for month, _ in run.window))
    started, expected, ran = time.monotonic(), _expected(run), False
    for i, stage in enumerate(STAGES):
        left = sum(expected.get(later.name, 0.0) for later in STAGES[i:])
        if expected and not stage.is_complete(run):
            so_far = time.monotonic() - started
            log.info(
                "stage %d of %d, %s; %.0f s so far, about %.0f s left by the month before", i + 1, len(STAGES), stage.name, so_far, left
            )
        try:
            ran |= run_stage(stage, run, flags)
        except RuntimeError as error:
            if stopped := stage_error(error):
                try:
                    report.stopped(run, stage.name, stopped)
                except Exception:  # What stopped the month is what must be told, and is raised.
                    log.exception("the page that says why could not be made; `adstocrat report %s` tries again", run.id)
            raise
    log.info("%s", ledger.show(run.document("ledger")))
    return ran


def _expected(run: MonthRun) -> dict[str, float]:
    """Seconds that each stage took in the last run of the month before, as the ledger has them; nothing where there is none."""
    last = lake.last_publication(run.storage, lake.month_after(run.month, -1))
    told = last and run.storage.read_json(f"{lake.run_folder(last.month, last.run)}/ledger.json")
    seconds: dict[str, float] = {}
    for step, values in (told or {}).get("used", {}).items():
        stage = step.partition("-")[0]
        seconds[stage] = seconds.get(stage, 0.0) + values["seconds"]
    return seconds


def run_stage(stage: Stage, run: MonthRun, flags: Flags) -> bool:
    """Run one stage unless its output is complete, and tell its counts, rate and time; returns whether it ran."""
    if stage is not STAGES[0]:
        check_rejects(run)
    if stage.is_complete(run):
        log.info("%-10s complete, skipped: %s", stage.name, stage.tell(run)[0])
        return False
    started = time.monotonic()
    stage.execute(run, flags)
    seconds = time.monotonic() - started
    words, units = stage.tell(run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    log.info("%-10s %s; %s/s, %.1f s, peak memory %.1f GiB", stage.name, words, f"{units / max(seconds, 1e-9):,.0f}", seconds, peak)
    return True


def _complete(stage: str) -> Callable[[MonthRun], bool]:
    return lambda run: run.left(stage) is not None


def _pipeline(step: str, define: Any, flags: Flags, run: MonthRun, *arguments: Any) -> None:
    """Launch one pipeline and wait for it."""
    from beam_jobs.runner import run_step

    run_step(lambda root: define(root, run, *arguments), flags, run, step)


# A stage of pipelines imports its own job, so that a month in which nothing is to do imports neither Beam nor TensorFlow.


def _ingest(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import ingest

    _pipeline("ingest", ingest.define_pipeline, flags, run)


def _tell_ingest(run: MonthRun) -> tuple[str, int]:
    rows = run.manifest(run.stage("rows"))
    read, ingested, rejected = rows.count("read"), rows.count("ingested"), rows.counts("rejected:")
    reasons = f" ({', '.join(f'{reason} {count:,}' for reason, count in rejected.items())})" if rejected else ""
    return f"{read:,} rows read, {ingested:,} ingested, {sum(rejected.values()):,} rejected{reasons}", read


def _creatives(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import creatives

    shards = run.manifest(run.stage("rows")).info["shards"]
    if run.left("creatives", "packs") is None:
        _pipeline("creatives-packs", creatives.define_pack_pipeline, flags, run)
    _pipeline("creatives-index", creatives.define_index_pipeline, flags, run, shards)


def _tell_creatives(run: MonthRun) -> tuple[str, int]:
    index = run.manifest(run.stage("creatives"))
    packs = run.manifest(run.stage("creatives", "packs"))
    images, fetched = index.count("images"), packs.count("fetched")
    faults = sum(count for status, count in index.counts("status:").items() if not status.startswith("ok"))
    return f"{images:,} images, {fetched:,} new, {packs.count('decoded'):,} decoded, {faults:,} faults", fetched


def _realised(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import realised

    realised.execute(run, functools.partial(_pipeline, "realised", realised.define_pipeline, flags, run))


def _realised_is_complete(run: MonthRun) -> bool:
    told = run.document("realised")
    return told is not None and told["action"] != "stop"


def _tell_realised(run: MonthRun) -> tuple[str, int]:
    told = run.document("realised")
    judged = f"of {told['month']}, run {told['run']}, {told['matched_share']:.1%} of impressions matched: " if told["rows"] else ""
    return f"{judged}{told['verdict']}", sum(row["impressions"] for row in told["rows"] if row["segment"] is None)


def _tell_drift(run: MonthRun) -> tuple[str, int]:
    found = run.document("drift")
    against = f"against {found['previous']}" if found["previous"] else "no month to compare with"
    return f"{len(found['compared'])} comparisons, {against}: {len(found['alarms'])} alarms", len(found["compared"])


def _encoder(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import train

    _pipeline("encoder", train.define_pipeline, flags, run, train.train_encoder)


def _tell_model(kind: str, run: MonthRun) -> tuple[str, int]:
    info = run.manifest(run.stage(kind)).info
    training = info["training"]
    told = f"{training['rows']:,} rows, {training['clicks']:,.0f} clicks"
    if training.get("epochs"):
        told += f", {training['epochs']} epochs"
    if training.get("tune_loss") is not None:
        told += f", tune loss {training['tune_loss']:.5f}"
    return f"{kind} {info['version']}, {training['mode']}, {told}", training["rows"]


def _embed(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import embed

    run.manifest(run.stage("encoder"))
    # Each pipeline has a name of its own; those of the run's own encoder, which is the first, need no number.
    number = {encoder: f"-{i}" if i else "" for i, encoder in enumerate(dict.fromkeys(encoder for encoder, _, _ in _to_embed(run)))}
    for encoder in number:
        if lake.read_manifest(run.storage, lake.embeddings_folder(encoder, run.month, run.id) + "/packs") is None:
            _pipeline(f"embed-packs{number[encoder]}", embed.define_pack_pipeline, flags, run, encoder)
    for encoder, month, id in _to_embed(run):
        if lake.read_manifest(run.storage, lake.embeddings_folder(encoder, month, id)) is None:
            _pipeline(f"embed-{month}{number[encoder]}", embed.define_gather_pipeline, flags, run, encoder, month, id)


def _to_embed(run: MonthRun) -> list[tuple[str, str, str]]:
    """Encoder, month and run of the embeddings that there must be: of the whole window, for training and for the gate, by each pair's."""
    encoders = [run.encoder, *sorted({pair.encoder for pair in run.peers().values()} - {run.encoder})]
    return [(encoder, *month) for encoder in encoders for month in run.window]


def _embed_is_complete(run: MonthRun) -> bool:
    return all(lake.read_manifest(run.storage, lake.embeddings_folder(*wanted)) for wanted in _to_embed(run))


def _tell_embed(run: MonthRun) -> tuple[str, int]:
    embedded = run.manifest(lake.embeddings_folder(run.encoder, run.month, run.id) + "/packs").count("embedded")
    return f"{embedded:,} new creatives embedded by {run.encoder}", embedded


def _train(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import realised, train

    run.manifest(run.stage("encoder"))
    run.manifest(lake.embeddings_folder(run.encoder, run.month, run.id))
    drift.check(run)
    realised.check(run)
    _pipeline("train", train.define_pipeline, flags, realised.trained_as(run), train.train_ranker)


def _evaluate(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import evaluate

    candidate = run.manifest(run.stage("ranker"))
    if candidate.info["training"]["mode"] == "none":
        evaluate.keep_champion(run, candidate.info["training"]["why"])
    else:
        _pipeline("evaluate", evaluate.define_pipeline, flags, run)
    evaluate.check_promoted(run)


def _tell_evaluate(run: MonthRun) -> tuple[str, int]:
    info = run.manifest(run.stage("evaluation")).info
    ruling = "candidate promoted" if info["promoted"] else "champion kept"
    told = f"{ruling}{' (flagged)' if info['flagged'] else ''}: {info['why']}"
    return told, info["metrics"].get("candidate", {}).get("rows", 0)


def _score(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import evaluate, score, shift

    evaluate.check_promoted(run)
    if run.left("scores") is None:
        _pipeline("score", score.define_pipeline, flags, run, run.manifest(run.stage("evaluation")))
    shift.explain(run)


def _score_is_complete(run: MonthRun) -> bool:
    return run.left("scores") is not None and run.document("shift") is not None


def _tell_score(run: MonthRun) -> tuple[str, int]:
    scores = run.manifest(run.stage("scores"))
    statuses = ", ".join(f"{name} {count:,}" for name, count in scores.counts("score_status:").items())
    return f"{scores.count('scored'):,} rows scored with {scores.info['ranker']} ({statuses})", scores.count("scored")


def _lookup(run: MonthRun, flags: Flags) -> None:
    from beam_jobs import lookup

    _pipeline("lookup", lookup.define_pipeline, flags, run, run.manifest(run.stage("scores")))


def _tell_lookup(run: MonthRun) -> tuple[str, int]:
    lookup = run.manifest(run.stage("lookup"))
    return f"{lookup.rows:,} keys in {lookup.info['shards']} shards", lookup.rows


def _tell_publish(run: MonthRun) -> tuple[str, int]:
    rows = lake.publications(run.storage, run.month)[-1].rows
    return f"{rows:,} rows of run {run.id}{' to ' + run.config.dataset + '.scores' if run.config.dataset else ''}", rows


STAGES = (
    Stage("ingest", _complete("rows"), _ingest, _tell_ingest),
    Stage("creatives", _complete("creatives"), _creatives, _tell_creatives),
    Stage("realised", _realised_is_complete, _realised, _tell_realised),
    Stage("encoder", _complete("encoder"), _encoder, functools.partial(_tell_model, "encoder")),
    Stage("embed", _embed_is_complete, _embed, _tell_embed),
    Stage("drift", drift.is_complete, lambda run, _: drift.execute(run), _tell_drift),
    Stage("train", _complete("ranker"), _train, functools.partial(_tell_model, "ranker")),
    Stage("evaluate", _complete("evaluation"), _evaluate, _tell_evaluate),
    Stage("score", _score_is_complete, _score, _tell_score),
    Stage("lookup", _complete("lookup"), _lookup, _tell_lookup),
    Stage("publish", publish.is_published, lambda run, _: publish.publish(run), _tell_publish),
)
