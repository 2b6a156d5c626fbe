"""What a month will take, told before any money is spent: `adstocrat month 2026-10 --plan`.

An estimate: units of work by the rates that docs/scale.md measured, times the prices in the config.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from beam_jobs.arrow import SPILL_BYTES, shards_for
from beam_jobs.config import Config
from beam_jobs.creatives import IMAGES_PER_UNIT, pack_files
from beam_jobs.ingest import estimated_rows
from beam_jobs.month import STAGES
from beam_jobs.run import LISTING, MonthRun, joined
from model.encoder_training import passes
from schemas import lake
from schemas.hashing import hash64_column
from schemas.parquet import read_columns

# Units a second: of one vCPU, and of one worker with a GPU. docs/scale.md says which of them are measured and which assumed.
RATES = {"ingest": 100_000, "evaluate": 100_000, "score": 100_000, "lookup": 75_000}
IMAGES, IMAGE_BYTES, NAMES = 1_000, 50_000_000, 500_000
GPU_RATES = {"encoder": 20_000, "embed": 30_000, "train": 250_000}
TRAIN_EPOCHS = 7
# Of one vCPU, and of the machine of a GPU.
_VCPU_GB, _VCPU_DISK_GB, _GPU_VCPUS = 4, 8, 4
# Bytes of a row and of an image's name as batches hold them, and of a section's address in the shuffle.
_ROW_BYTES, _NAME_BYTES, _ADDRESS_BYTES = 100, 100, 250


@dataclasses.dataclass(frozen=True)
class Work:
    """What one stage takes.

    Attributes:
        stage: which.
        units, what: how much it does.
        vcpu_hours, gpu_hours: of workers without and with a GPU.
        reads, writes: requests to the bucket; listings count as writes.
        shuffled: bytes through the runner's shuffle.
    """

    stage: str
    units: int
    what: str
    vcpu_hours: float = 0.0
    gpu_hours: float = 0.0
    reads: int = 0
    writes: int = 0
    shuffled: int = 0

    def cost(self, config: Config) -> float:
        """In the currency of the config's prices."""
        vcpu = config.prices_vcpu_hour + _VCPU_GB * config.prices_gb_hour + _VCPU_DISK_GB * config.prices_disk_gb_hour
        gpu = config.gpu_count * config.prices_gpu_hour + _GPU_VCPUS * vcpu
        requests = (self.reads * config.prices_million_reads + self.writes * config.prices_million_writes) / 1e6
        return self.vcpu_hours * vcpu + self.gpu_hours * gpu + requests + self.shuffled / 1e9 * config.prices_shuffle_gb


@dataclasses.dataclass(frozen=True)
class Delivery:
    """How big a month is: rows, of it and of its whole window; images, and those of them that were never looked at, with their bytes."""

    rows: int
    window_rows: int
    images: int
    new_images: int
    new_bytes: int
    to_embed: int


def delivery(run: MonthRun) -> Delivery:
    rows = estimated_rows(run.storage, run.ads)
    earlier = (lake.read_manifest(run.storage, lake.stage_folder("rows", month, id)) for month, id in run.earlier)
    images, (new, size) = run.inputs["images"]["count"], new_images(run)
    # An encoder of its own embeds all that was ever looked at.
    known = 0 if run.known_encoder else sum(receipt.rows for receipt in lake.pack_receipts(run.storage, "creatives/"))
    return Delivery(rows, rows + sum(manifest.count("ingested") for manifest in earlier if manifest), images, new, size, known + new)


def new_images(run: MonthRun) -> tuple[int, int]:
    """How many of the month's images no run has looked at, and their bytes; by hashes of name, size and checksum."""
    known = np.concatenate([np.empty(0, np.uint64), *(hashes for file in pack_files(run.storage) for hashes, _ in _images(run, file))])
    count = size = 0
    for hashes, sizes in _images(run, run.inputs["listing"]):
        new = ~np.isin(hashes, known)
        count, size = count + int(new.sum()), size + int(sizes[new].sum())
    return count, size


def _images(run: MonthRun, file: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in read_columns(run.storage, file, LISTING.names):
        yield hash64_column(joined(batch)), batch["size"].to_numpy()


def work(month: Delivery) -> list[Work]:
    """What the stages of a month of that size take, all of them."""
    rows, shards = month.rows, shards_for(month.rows)
    units, spilled = shards_for(month.images, IMAGES_PER_UNIT), _sections(rows * _ROW_BYTES, shards)
    named, indexed = _sections(month.images * _NAME_BYTES, units), _sections(month.images * _NAME_BYTES, shards)
    looking = month.new_images / IMAGES + month.new_bytes / IMAGE_BYTES + 4 * month.images / NAMES

    def by_rows(stage: str, sections: int, reads: int, writes: int) -> Work:
        hours = rows / RATES[stage] / 3600
        return Work(stage, rows, "rows", hours, 0, sections + reads, writes, sections * _ADDRESS_BYTES)

    def on_gpu(stage: str, units: int, epochs: int, what: str, reads: int) -> Work:
        return Work(stage, units, what, 0, units * epochs / GPU_RATES[stage] / 3600, reads, 10)

    fetched, pages = month.new_images + 2 * (named + indexed), -(-month.images // 1000)
    addresses, passed = 2 * (named + indexed) * _ADDRESS_BYTES, passes(max(month.to_embed, 1))
    return [
        by_rows("ingest", 2 * spilled, shards, 2 * shards),
        Work("creatives", month.new_images, "new images", looking / 3600, 0, fetched, pages + units + shards, addresses),
        on_gpu("encoder", month.to_embed, passed, "creatives", passed * units),
        on_gpu("embed", month.to_embed, 1, "creatives", units + 3 * indexed),
        on_gpu("train", month.window_rows, TRAIN_EPOCHS, "rows of the window", TRAIN_EPOCHS * 3 * shards),
        by_rows("evaluate", 0, 3 * shards, 1),
        by_rows("score", 0, 3 * shards, shards),
        by_rows("lookup", spilled, shards, shards),
    ]


def _sections(size: int, shards: int) -> int:
    """How many pieces a shuffle by spill files is read in."""
    return -(-size // SPILL_BYTES) * shards


def numbers(run: MonthRun) -> dict[str, Any]:
    """The plan: what was `delivered`, and by stage its `work` with cost, None where it is complete or takes no worker."""
    month = delivery(run)
    todo = {each.stage: {**dataclasses.asdict(each), "cost": each.cost(run.config)} for each in work(month)}
    complete = [stage.name for stage in STAGES if stage.is_complete(run)]
    return {
        "month": run.month,
        "run": run.id,
        "delivered": {**dataclasses.asdict(month), "files": len(run.ads), "bytes": sum(entry.size for entry in run.ads)},
        "complete": complete,
        "work": {stage.name: None if stage.name in complete else todo.get(stage.name) for stage in STAGES},
    }


def show(plan: Mapping[str, Any]) -> str:
    """The plan as lines to read."""
    month, todo = plan["delivered"], [work for work in plan["work"].values() if work]
    lines = [
        f"plan of {plan['month']}, run {plan['run']}",
        f"  delivered  about {month['rows']:,} rows in {month['files']:,} files of {month['bytes'] / 1e9:,.3f} GB; "
        f"{month['images']:,} images, {month['new_images']:,} of them new, of {month['new_bytes'] / 1e9:,.3f} GB",
    ]
    for stage, each in plan["work"].items():
        told = "complete" if stage in plan["complete"] else "little, which is not reckoned with"
        if each:
            hours = f"{each['gpu_hours']:,.3f} GPU worker hours" if each["gpu_hours"] else f"{each['vcpu_hours']:,.3f} vCPU hours"
            told = f"{each['units']:,} {each['what']}, {hours}, {each['cost']:,.3f}"
        lines.append(f"  {stage:<10} {told}")
    vcpu, gpu, reads, writes, cost = (sum(each[name] for each in todo) for name in ("vcpu_hours", "gpu_hours", "reads", "writes", "cost"))
    lines.append(f"  in all     {vcpu:,.2f} vCPU hours, {gpu:,.2f} GPU worker hours, {reads:,} reads and {writes:,} writes of the bucket")
    lines.append(f"  estimate   {cost:,.2f} at the prices of the config, without storage and BigQuery")
    return "\n".join(lines)
