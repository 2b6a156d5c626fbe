"""The ledger: every row of the month accounted for, from manifests and from the files themselves, never from a runner's counters."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from beam_jobs.run import MonthRun, StageError
from schemas import lake
from schemas.retries import take_retries
from schemas.storage import Storage
from serving.shard import read_header


def take(run: MonthRun) -> dict[str, Any]:
    """Account for the run and write `ledger.json`.

    Returns:
        `counts` by name, `rejected` by reason, `image_status` and `score_status` by value, `used` by step, and `balanced`.

    Raises:
        StageError: it does not balance, or a file is missing or damaged; says where.
    """
    rows = run.manifest(run.stage("rows"))
    scores, evaluation = run.manifest(run.stage("scores")), run.left("evaluation")
    lookup = run.manifest(run.stage("lookup"))
    packs = run.manifest(run.stage("creatives", "packs"))
    index = run.manifest(run.stage("creatives"))
    embeddings = lake.embeddings_folder(scores.info["encoder"], run.month, run.id)
    embedded, gathered = (lake.read_manifest(run.storage, folder) for folder in (f"{embeddings}/packs", embeddings))
    rejected, steps = rows.counts("rejected:"), used(run)
    counts = {
        "read": rows.count("read"),
        "rejected": sum(rejected.values()),
        "ingested": rows.count("ingested"),
        "ingested in files": _rows(run.storage, [r.file for r in rows.receipts if r.unit.startswith("shard/")], _in_parquet),
        "rejected in files": _rows(run.storage, [r.file for r in rows.receipts if r.unit.startswith("file/") and r.file], _in_parquet),
        "scored": scores.count("scored"),
        "scored in files": _rows(run.storage, scores.files, _in_parquet),
        "lookup": lookup.rows,
        "lookup in files": _rows(run.storage, lookup.files, lambda stream: read_header(stream)[0]),
        "images listed": run.inputs["images"]["count"],
        "images": index.count("images"),
        "images fetched": packs.count("fetched"),
        "images decoded": packs.count("decoded"),
        "creatives embedded": embedded.count("embedded") if embedded else 0,
    }
    if run.contract.mature_before:
        counts["too young"] = rows.count("too young")
    # Requests to storage that were made again, in the stages and in this process since: compared with nothing.
    told = [manifest.count("retries") for manifest in (rows, packs, index, embedded, gathered, scores, lookup) if manifest]
    if retries := sum(told) + take_retries()["retries"]:
        counts["retries"] = retries
    unbalanced = [
        f"{left} {counts[left]:,} is not {right} {wanted:,}"
        for left, right, wanted in (
            ("read", "ingested + rejected", counts["ingested"] + counts["rejected"]),
            ("ingested in files", "ingested", counts["ingested"]),
            ("rejected in files", "rejected", counts["rejected"]),
            ("scored", "ingested", counts["ingested"]),
            ("scored in files", "scored", counts["scored"]),
            ("lookup", "ingested", counts["ingested"]),
            ("lookup in files", "lookup", counts["lookup"]),
            ("images", "images listed", counts["images listed"]),
        )
        if counts[left] != wanted
    ]
    ledger = {
        "month": run.month,
        "run": run.id,
        "gate": {name: evaluation.info[name] for name in ("status", "why")} if evaluation else None,
        "counts": counts,
        "rejected": rejected,
        "image_status": scores.counts("image_status:"),
        "score_status": scores.counts("score_status:"),
        "used": steps,
        "balanced": not unbalanced,
        "unbalanced": unbalanced,
    }
    run.storage.write_json(f"{run.folder}/ledger.json", ledger)
    if unbalanced:
        raise StageError(f"the ledger of {run.month} does not balance, nothing is published: {'; '.join(unbalanced)}")
    return ledger


def used(run: MonthRun) -> dict[str, dict[str, float]]:
    """What each step used, all of its attempts together: `seconds` on the clock, and what the runner's service told of the job."""
    total: dict[str, Counter[str]] = {}
    for name in run.storage.names(f"{run.folder}/used/"):
        note = run.storage.read_json(name)
        step = total.setdefault(note["step"], Counter())
        step.update({"seconds": note["seconds"], **note.get("metrics", {})})
    return {step: dict(values) for step, values in sorted(total.items())}


def show(ledger: Mapping[str, Any]) -> str:
    """The ledger as lines to read, ending in `balanced` where it is."""
    counts = ledger["counts"]

    def each(values: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in values.items()) or "none"

    return "\n".join(
        (
            f"ledger of {ledger['month']}, run {ledger['run']}",
            f"  rows     read {counts['read']:,} = ingested {counts['ingested']:,} + rejected {counts['rejected']:,}",
            f"           rejected: {each(ledger['rejected'])}",
            f"           ingested {counts['ingested']:,} = scored {counts['scored']:,} = lookup {counts['lookup']:,}",
            f"  images   {counts['images']:,} delivered, {counts['images fetched']:,} fetched, {counts['images decoded']:,} decoded, "
            f"{counts['creatives embedded']:,} embedded",
            f"  status   image: {each(ledger['image_status'])}; score: {each(ledger['score_status'])}",
            *([f"  young    {counts['too young']:,} rows, scored and neither learnt from nor judged by"] if "too young" in counts else []),
            *([f"  storage  {counts['retries']:,} requests made again"] if counts.get("retries") else []),
            *([f"  gate     {ledger['gate']['status']}: {ledger['gate']['why']}"] if ledger["gate"] else []),
            *([f"  used     {_used(ledger['used'])}"] if ledger.get("used") else []),
            "  balanced" if ledger["balanced"] else f"  NOT balanced: {'; '.join(ledger['unbalanced'])}",
        )
    )


def _used(steps: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds by step, and the hours that a service told of."""
    vcpu, gpu = (sum(values.get(name, 0) for values in steps.values()) / 3600 for name in ("TotalVcpuTime", "TotalGpuTime"))
    seconds = ", ".join(f"{step} {values['seconds']:,.0f} s" for step, values in steps.items())
    return f"{seconds}; {vcpu:,.2f} vCPU hours, {gpu:,.2f} GPU hours" if vcpu else seconds


def _rows(storage: Storage, files: list[str], count: Callable[[BinaryIO], int]) -> int:
    """Rows by the files' own footers or headers; a file that a manifest lists must be there and whole."""
    total = 0
    for file in files:
        try:
            with storage.open(file) as stream:
                total += count(stream)
        except (PermissionError, TimeoutError):
            raise  # The storage's own sentence: the file may well be whole.
        except (OSError, ValueError) as error:  # Arrow's is one of the latter.
            raise StageError(
                f"{storage.url(file)} cannot be counted, nothing is published: {error}; remove its stage's folder and run the month again"
            ) from error
    return total


def _in_parquet(stream: BinaryIO) -> int:
    return pq.ParquetFile(pa.PythonFile(stream, "r")).metadata.num_rows
