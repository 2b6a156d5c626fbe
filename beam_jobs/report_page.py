"""What the page of a run, and that of all runs, are made of: plain values, tables and charts, told from what the stages left."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from beam_jobs import ledger, plots, report_scores, statistics
from beam_jobs import report_sections as sections
from beam_jobs.drift import headlines
from beam_jobs.join import INDEX
from beam_jobs.report import PUBLISHED, REPLACED, STOPPED, UNFINISHED, Number, Summary, read
from beam_jobs.report_scores import EXAMPLES, LOW_EVIDENCE, Month
from beam_jobs.report_sections import TABLE_LINES, Cell, Chart, Table, number, table
from beam_jobs.run import MonthRun, StageError, kept
from beam_jobs.runs import all_runs
from model.evaluation import OVERALL
from model.gate import CANDIDATE, CHAMPION
from model.images import MISSING, OK, USABLE
from schemas import lake
from schemas.lake import Current, Manifest
from schemas.parquet import read_columns
from schemas.storage import Storage


class _Left:
    """What a run's stages left, read once; None where a stage is not complete."""

    def __init__(self, run: MonthRun):
        self.run, self.inputs = run, run.inputs
        self.rows, self.packs, self.images = run.left("rows"), run.left("creatives", "packs"), run.left("creatives")
        self.evaluation, self.scores, self.lookup = run.left("evaluation"), run.left("scores"), run.left("lookup")


def collect(run: MonthRun, status: str, verdict: str) -> dict[str, Any]:
    """All that the template of a run's page shows; a section is None where its stage has left nothing."""
    left, before = _Left(run), _before(run)
    scored = report_scores.read(run, before)
    galleries = report_scores.galleries(scored.creatives) if scored else {}
    faults, moves = _faults(left, scored), sections.moved(scored.moved, before) if scored and scored.moved and before else None
    tables = [*(moves["tables"] if moves else []), *([faults["examples"]] if faults else [])]
    wanted = {cell.creative for table in tables for row in table.rows for cell in row if cell.creative}
    wanted |= {row["creative"] for rows in galleries.values() for row in rows}
    drift, realised, shift = map(run.document, ("drift", "realised", "shift"))
    alarms = headlines(run)
    return {
        "summary": Summary(run.month, run.id, status, verdict, alarms, _numbers(left, scored, before, realised)),
        "flow": _flow(left),
        "gate": sections.gate(run.storage, left.evaluation) if left.evaluation else None,
        "scores": sections.distribution(scored, before) if scored else None,
        "shift": shift["sentence"] if shift else "",
        "moved": moves,
        "creatives": {name: [sections.creative(row) for row in rows] for name, rows in galleries.items()} or None,
        "evidence": sections.evidence(scored) if scored else None,
        "low_evidence": LOW_EVIDENCE,
        "faults": faults,
        "drift": sections.drift(drift, *_known(run, drift["previous"])) if drift else None,
        "realised": sections.realised(realised) if realised else None,
        "stages": _stages(left),
        "lineage": _lineage(left),
        "pictures": report_scores.thumbnails(run.storage, wanted),
    }


def _before(run: MonthRun) -> Month | None:
    """The scores that the month before was last published with; None where there are none, or they were removed."""
    last = lake.last_publication(run.storage, lake.month_after(run.month, -1))
    try:
        return report_scores.read(kept(run.config, last.month, last.run), missing_images=False) if last else None
    except StageError:
        return None


def _known(run: MonthRun, previous: str | None) -> list[sections.Known]:
    """What is known of the columns, of the month that was compared with and of this one."""
    last = lake.last_publication(run.storage, previous) if previous else None
    months = [statistics.of_run(run.storage, last.month, last.run) if last else {}, statistics.of_run(run.storage, run.month, run.id)]
    return [sections.known_of(sketches, run.contract) for sketches in months]


def _count(manifest: Manifest | None, name: str) -> int | None:
    return manifest.count(name) if manifest else None


def _numbers(left: _Left, scored: Month | None, before: Month | None, realised: Mapping[str, Any] | None) -> list[Number]:
    """The four that matter."""
    rejected = (
        f"{sum(left.rows.counts('rejected:').values()):,} of {left.rows.count('read'):,} rows rejected" if left.rows else "no row read"
    )
    shift = f"{scored.mean / before.mean - 1:+.1%} against {before.month}" if scored and before else "no month before"
    info = left.evaluation.info if left.evaluation else {"metrics": {}}
    metrics = info["metrics"].get(CANDIDATE if info.get("promoted") else CHAMPION, {})
    overall = next((row for row in info.get("compared", ()) if row["segment"] == OVERALL), None)
    against = f"candidate {overall['difference']:+.2%} against champion; less is better" if overall else "less is better"
    found = sections.overall(realised)
    judged, which = (found, f"realised in {realised['month']}") if realised and found else (metrics, "on gate rows")
    entropy, calibration = metrics.get("normalized_entropy"), judged.get("calibration")
    ends = f"; 95 %: {judged['calibration_low']:.3f} to {judged['calibration_high']:.3f}" if judged.get("calibration_low") else ""
    return [
        Number("Ads scored", f"{scored.rows:,}" if scored else "–", rejected),
        Number("Mean p_click", f"{scored.mean:.3%}" if scored else "–", shift),
        Number("Normalized entropy", f"{entropy:.4f}" if entropy else "–", against if entropy else "not judged"),
        Number("Calibration", f"{calibration:.3f}" if calibration else "–", which + ends if calibration else "not judged"),
    ]


def _flow(left: _Left) -> list[dict]:
    """The month's rows from files to lookup."""
    run, rows = left.run, left.rows
    read = rows.count("read") if rows else 0

    def each(counts: Mapping[str, int], what: str) -> list[str]:
        return [f"{count:,} {what} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])]

    def step(name: str, count: int | None, parts: Sequence[str] = ()) -> dict:
        share = None if count is None else round(100 * count / max(read, 1), 2)
        return {"name": name, "count": "not reached" if count is None else f"{count:,} rows", "share": share, "parts": parts}

    size, listed = sum(entry[1] for entry in left.inputs["ads"]), left.inputs["images"]["count"]
    images = f"{listed:,} images"
    images += f", {left.packs.count('fetched'):,} of them new, {left.packs.count('decoded'):,} decoded" if left.packs else ""
    statuses = each(left.scores.counts("score_status:"), "with score_status") if left.scores else []
    noted = [note for note in lake.publications(run.storage, run.month) if note.run == run.id]
    steps = [
        step("Read", _count(rows, "read"), each(rows.counts("rejected:"), "rejected:") if rows else ()),
        step("Ingested", _count(rows, "ingested")),
        step("Scored", _count(left.scores, "scored"), statuses),
        step("In the lookup", left.lookup.rows if left.lookup else None),
        step("Published", noted[-1].rows if noted else None, [f"to {noted[-1].dataset}.scores"] if noted and noted[-1].dataset else ()),
    ]
    files = f"{size / 1e6:,.1f} MB in {len(left.inputs['ads']):,} CSV files"
    return [{"name": "Delivered", "count": files, "share": None, "parts": [images]}, *steps]


def _faults(left: _Left, scored: Month | None) -> dict | None:
    """Images that could not be used, or only in part, and some that ads name and that were not delivered."""
    if not left.images:
        return None
    images, ads = left.images.counts("status:"), left.scores.counts("image_status:") if left.scores else {}
    counts = [
        [Cell(status, alarm=status not in (*USABLE, "no_image")), images.get(status, 0), ads.get(status) if left.scores else None]
        for status in sorted({*images, *ads}, key=lambda status: (status != OK, -ads.get(status, 0)))
    ]
    examples, shown = list[list[Cell | str]](), Counter[str]()
    for batch in (batch for file in left.images.files for batch in read_columns(left.run.storage, file, INDEX.names)):
        for row in batch.filter(pc.not_equal(batch["image_status"], OK)).to_pylist():
            shown[row["image_status"]] += 1
            if shown[row["image_status"]] <= EXAMPLES:
                fault = Cell(row["image_status"], alarm=row["image_status"] not in USABLE)
                examples.append([Cell(row["image"], creative=row["creative"]), fault])
    for image, key in scored.missing.items() if scored else ():
        examples.append([f"{image}, of the ad {key}", Cell(MISSING, alarm=True)])
    columns = ("image_status", "images", "ads")
    return {"counts": table("Images and ads by status", columns, counts), "examples": table("Examples", ("image", "fault"), examples)}


def _stages(left: _Left) -> dict | None:
    """Time, rate and cost of each step."""
    run, used = left.run, ledger.used(left.run)
    if not used:
        return None
    made = {kind: lake.read_manifest(run.storage, lake.model_folder(kind, run.version)) for kind in ("encoder", "ranker")}
    trained = {kind: manifest.info["training"]["rows"] if manifest else None for kind, manifest in made.items()}
    encoder = left.scores.info["encoder"] if left.scores else run.encoder
    embedded = lake.read_manifest(run.storage, lake.embeddings_folder(encoder, run.month, run.id) + "/packs")
    units = {
        "ingest": _count(left.rows, "read"),
        "creatives-packs": _count(left.packs, "fetched"),
        "creatives-index": _count(left.images, "images"),
        "embed-packs": embedded.count("embedded") if embedded else None,
        "encoder": trained["encoder"],
        "train": trained["ranker"],
        "evaluate": left.evaluation.info["metrics"].get(CANDIDATE, {}).get("rows") if left.evaluation else None,
        "score": _count(left.scores, "scored"),
        "lookup": left.lookup.rows if left.lookup else None,
    }
    lines, seconds, cost = [], 0.0, 0.0
    # In the order of the month; steps of its own come first.
    order = "ingest creatives encoder embed train evaluate score lookup"
    for step, values in sorted(used.items(), key=lambda item: (order.find(item[0].partition("-")[0]), item[0])):
        vcpu, gpu = (values.get(name, 0) / 3600 for name in ("TotalVcpuTime", "TotalGpuTime"))
        price = None
        if vcpu:
            from beam_jobs.plan import Work

            price = Work(step, 0, "", vcpu, gpu).cost(run.config)
        seconds, cost = seconds + values["seconds"], cost + (price or 0)
        count, took = units.get(step), max(values["seconds"], 0.05)
        hours = [number(some or None, ",.2f") for some in (vcpu, gpu)]
        rate = count / took if count is not None else None
        lines.append([step, number(values["seconds"], ",.1f"), count, rate, *hours, number(price, ",.2f")])
    columns = ("step", "seconds", "units", "units a second", "vCPU hours", "GPU hours", "cost")
    told = f"{seconds:,.0f} s in all, all attempts together. " + (
        f"{cost:,.2f} at the prices of the config, without requests, storage and BigQuery."
        if cost
        else "The runner told of no hours of machines, so there is no cost to tell."
    )
    return {"table": table("Steps", columns, lines), "told": told}


def _lineage(left: _Left) -> list[Table]:
    """What went into the run, each by its digest."""
    run, inputs = left.run, left.inputs
    lines = [("run", run.id, inputs["created"]), ("contract", inputs["contract"], ""), ("source", inputs["source"], "of the package")]
    lines.append(("images", inputs["images"]["digest"], f"{inputs['images']['count']:,} images, {inputs['images']['bytes']:,} bytes"))
    lines += [("window", id, month) for month, id in inputs["window"]]
    for name, pair in (("champion before", inputs["champion"]), ("champion half a year ago", inputs.get("earlier_champion"))):
        lines += [(name, version, kind) for kind, version in zip(("encoder", "ranker"), pair or (), strict=False)]
    for kind, version in ((kind, left.scores.info[kind]) for kind in ("encoder", "ranker")) if left.scores else ():
        if made := lake.read_manifest(run.storage, lake.model_folder(kind, version)):
            mode = made.info.get("training", {}).get("mode", "")
            lines.append((f"{kind} that scored", made.info.get("digest", ""), f"{version}, {mode}"))
    settings = [[name, json.dumps(value)] for name, value in sorted(inputs["settings"].items())]
    of_files = f"Files, {len(inputs['ads']):,}" + (f", of them the first {TABLE_LINES}" if len(inputs["ads"]) > TABLE_LINES else "")
    return [
        table("What went into the run", ("what", "digest or version", "more"), lines),
        table("Settings that affect the model", ("setting", "value"), settings),
        table(of_files, ("file", "bytes", "crc32c"), inputs["ads"][:TABLE_LINES]),
    ]


def index(storage: Storage) -> dict:
    """All runs, the newest month first, and realised quality by month."""
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    lines: list[list[Cell | str]] = []
    judged: dict[str, dict] = {}
    for run in reversed(all_runs(storage)):
        summary, folder = read(storage, run.month, run.id), lake.run_folder(run.month, run.id)
        realised = storage.read_json(f"{folder}/realised.json")
        # What was published when its page was made may have been replaced since.
        replaced = run.published and lake.publications(storage, run.month)[-1].run != run.id
        if (found := sections.overall(realised)) and (realised["month"] not in judged or (run.published and not replaced)):
            judged[realised["month"]] = found
        unread = PUBLISHED if run.published else UNFINISHED
        status = REPLACED if replaced else summary.status if summary else unread
        served = current == Current(run.month, run.id)
        lines.append(
            [
                Cell(run.month, link=f"{run.month}/{run.id}/report.html" if summary else ""),
                run.id,
                Cell("current" if served else status, alarm=status == STOPPED and not served),
                run.inputs["created"][:16],
                run.published[:16],
                *([told.value for told in summary.numbers] if summary else [""] * 4),
                number(len(summary.alarms) if summary else None, alarm=bool(summary and summary.alarms)),
            ]
        )
    names = ("month", "run", "status", "began", "published", "ads", "mean p_click", "normalized entropy", "calibration", "alarms")
    charts, months = [], sorted(judged)
    for name, label in (("calibration", "calibration"), ("ne", "normalized entropy")) if judged else ():
        values = [sections.ends(judged[month], name) for month in months]
        told = f"Realised {label} by month, with 95 % intervals: what was published, judged by the outcomes that came a month later."
        cells = [[month, sections.interval(judged[month], name, ".4f")] for month in months]
        numbers = table(f"Realised {label}", ("month", label), cells)
        charts.append(Chart(plots.over_time(months, values, 1.0, label, told), told, numbers))
    told = f"Current is {current.month}, run {current.run}." if current else "Nothing is published yet."
    return {"told": told, "status": PUBLISHED if current else UNFINISHED, "runs": table("All runs", names, lines), "charts": charts}
