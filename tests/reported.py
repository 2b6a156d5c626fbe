"""Runs as the report reads them, laid down in a lake without the stages that would make them, in any number of rows."""

import dataclasses
import datetime
import hashlib
import json
import pathlib

import numpy as np
import pyarrow as pa

from beam_jobs import statistics
from beam_jobs.config import Config
from beam_jobs.creatives import PACK
from beam_jobs.join import INDEX
from beam_jobs.run import MonthRun, prepare
from model import gate
from model.evaluation import COLD, WARM, evaluate, quality
from model.images import THUMBNAIL_SIZE
from schemas import contract as contracts
from schemas import lake, tables
from schemas.contract import Column, Contract
from schemas.hashing import hash64_column
from schemas.lake import Current, Manifest, Publication, Receipt
from schemas.parquet import BATCH_ROWS, write_parquet
from schemas.storage import Storage, open_storage

CONTRACT = Contract(
    (
        Column("id", "bytes", frozenset({"key"}), required=True),
        Column("advertiser", "bytes", frozenset({"history"})),
        Column("device", "bytes", frozenset({"segment"})),
        Column("image", "bytes", frozenset({"image"})),
        Column("impressions", "int", frozenset({"impressions"})),
        Column("clicks", "int", frozenset({"clicks"})),
    )
)
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>$x$ ' & ü"
LAST, THIS = "2026-09", "2026-10"


@dataclasses.dataclass(frozen=True)
class World:
    """Two months of so many rows, and of a tenth as many creatives as rows up to 20,000."""

    config: Config
    rows: int

    @property
    def storage(self) -> Storage:
        return open_storage(self.config.lake)

    @property
    def creatives(self) -> int:
        return min(self.rows // 10, 20_000)

    def columns(self, month: str) -> dict[str, np.ndarray]:
        """What the month's scores say: a tenth of the keys is new in the second, and probabilities wander."""
        rng = np.random.default_rng(lake.month_number(month))
        first = self.rows // 10 * (month == THIS)
        number = np.arange(first, first + self.rows)
        base = np.random.default_rng(1).lognormal(-4, 0.8, 2 * self.rows)[number]
        p = np.clip(base * rng.lognormal(0, 0.1, self.rows), 1e-5, 0.9)
        # One that moves more than all others, by its key and by its picture.
        p[number % self.creatives == 107] = 0.01 if month == LAST else 0.9
        creative = number % self.creatives
        return {"number": number, "p": p, "creative": creative, "evidence_key": number % 251, "evidence_creative": 7 * creative % 401}

    def make(self, month: str, publish: bool = True, promoted: bool = True) -> MonthRun:
        """A run of the month with all its stages."""
        names = f"id,advertiser,device,image,impressions,clicks\n{month},a,b,,1,0\n"
        self.storage.write(lake.raw_ads(month) + HOSTILE.replace("/", "") + ".csv", names.encode())
        run = prepare(self.config, month)
        columns = self.columns(month)
        number, creative = columns["number"], columns["creative"]
        texts = np.array([hashlib.sha256(b"%d" % i).hexdigest() for i in range(self.creatives)], object)
        key = pa.array([f"{HOSTILE}{i}" if i % 10 == 7 else f"k{i:08d}" for i in number])
        advertiser = pa.array([f"adv{i}" for i in range(50)] + [HOSTILE]).take(pa.array(number % 51))
        device = pa.array(["mobile", HOSTILE, None]).take(pa.array(number % 3))
        shown = texts[creative]
        status = np.where(number % 50 == 0, "missing", "ok")
        no_picture = status == "missing"
        image = pa.array([f"{HOSTILE}{i}.jpg" for i in creative])
        rows = pa.table({"key": key, "advertiser": advertiser, "device": device, "image": image})
        same = {"month": datetime.date.fromisoformat(f"{month}-01"), "run_id": run.id, "encoder_version": "e", "model_version": run.version}
        own = {
            **{"key": key, "id": key, "device": device, "p_click": pa.array(columns["p"]), "image_status": pa.array(status)},
            "creative": pa.array(shown, mask=no_picture),
            "score_status": pa.array(np.where(no_picture, "no_image", "ok")),
            **{
                name: pa.array(np.where(no_picture & (name == "evidence_creative"), 0, columns[name]))
                for name in ("evidence_key", "evidence_creative")
            },
        }
        schema = tables.schema("scores", CONTRACT)
        scores = pa.table([own.get(f.name) or pa.repeat(pa.scalar(same[f.name], f.type), self.rows) for f in schema], schema=schema)
        half = self.rows // 2
        units = [(f"shard/{i:05d}.000", start, size) for i, (start, size) in enumerate(((0, half), (half, self.rows - half)))]
        kept = [self._write(run, "rows", unit, rows.slice(start, size)) for unit, start, size in units]
        read = Receipt("file/ads.csv", "", 0, {"read": self.rows + 3, "rejected:bad_number": 2, "rejected:duplicate_key": 1})
        self._commit(run, "rows", (read, *kept[:1], dataclasses.replace(kept[1], counts={"ingested": self.rows})), shards=2)
        self._images(run, texts)
        self._gate(run, promoted)
        made = {
            "month": month,
            "encoder": "e",
            "contract": CONTRACT.fingerprint,
            "parent": None,
            "digest": "d1",
            "training": {"mode": "refresh", "rows": 9, "clicks": 3.0},
        }
        lake.commit(self.storage, lake.model_folder("ranker", run.version), Manifest("train", (), made))
        written = [self._write(run, "scores", f"{unit}@{0:09d}", scores.slice(start, size)) for unit, start, size in units]
        counts = {"scored": self.rows, "score_status:ok": self.rows - int(no_picture.sum()), "score_status:no_image": int(no_picture.sum())}
        counts |= {"image_status:ok": counts["score_status:ok"], "image_status:missing": counts["score_status:no_image"]}
        self._commit(run, "scores", (written[0], dataclasses.replace(written[1], counts=counts)), encoder="e", ranker=run.version)
        self._commit(run, "lookup", (Receipt("shard/0", "", self.rows),), shards=1)
        for step, seconds in (("ingest", 4.0), ("train", 60.5)):
            used = {"step": step, "seconds": seconds, "metrics": {"TotalVcpuTime": 7200}}
            self.storage.write(lake.unique(f"{run.folder}/used", step, ".json"), json.dumps(used).encode())
        if publish:
            self.publish(run)
        return run

    def publish(self, run: MonthRun) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        lake.note_publication(self.storage, Publication(now, run.month, run.id, CONTRACT.fingerprint, self.rows, ""))
        lake.move_pointer(self.storage, lake.CURRENT, Current(run.month, run.id))

    def watched(self, run: MonthRun) -> tuple[str, str]:
        """What is found of drift and of realised quality laid down as well; returns the alarm and the verdict."""
        alarm, verdict = f"advertiser {HOSTILE} has 20 % of the rows, 2 % in {LAST}", "1.15 (1.10 to 1.20) times the clicks were predicted"
        common = {"last": 0.02, "this": 0.2, "distance": 0.18, "threshold": 0.05, "sentence": alarm, "action": "stop"}
        compared = [{"kind": "drift", "column": f"c{i}", "value": None, "alarm": False, **common} for i in range(24)]
        compared.append({**common, "kind": "drift", "column": "advertiser", "value": HOSTILE, "alarm": True})
        drift = {"previous": LAST, "compared": compared, "alarms": [alarm]}
        row = {"segment": None, "value": None, "impressions": 9000, "clicks": 300}
        row |= {"ne": 0.9, "ne_low": 0.8, "ne_high": 1.0, "calibration": 1.15, "calibration_low": 1.1, "calibration_high": 1.2}
        realised = {"month": LAST, "run": "r", "matched_share": 0.7, "unmatched": {}, "verdict": verdict, "action": "warn"}
        realised["rows"] = [row, {**row, "segment": "device", "value": HOSTILE}]
        for month, id in ((run.month, run.id), *run.earlier):
            of_hostile = 20 if month == THIS else 2
            names = [HOSTILE] * of_hostile + ["adv1"] * 30 + [f"adv{i}" for i in range(2, 72 - of_hostile)]
            sketches = {
                (statistics.LABELLED, "advertiser", None): statistics.of_column(pa.array(names), categorical=True),
                (statistics.LABELLED, "c1", None): statistics.of_column(pa.array(np.arange(21.0)), categorical=False),
            }
            statistics.write(self.storage, f"statistics/{month}/{id}/{statistics.SKETCHES}", sketches)
        for name, told in (("drift", drift), ("realised", realised)):
            self.storage.write(f"{run.folder}/{name}.json", json.dumps(told).encode())
        return alarm, verdict

    def _images(self, run: MonthRun, texts: np.ndarray) -> None:
        """A picture for each creative, and two that cannot be used as they are."""
        names = [f"i{i}.png" for i in range(len(texts))]
        grid = np.indices((THUMBNAIL_SIZE, THUMBNAIL_SIZE)).sum(axis=0)[..., None] * 2
        noise = np.random.default_rng(0).integers(0, 40, (THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3))

        def batch(start: int) -> pa.RecordBatch:
            numbers = range(start, min(start + 1024, len(texts)))
            pixels = [((grid + noise + np.array([i, 3 * i, 7 * i])) % 256).astype(np.uint8).tobytes() for i in numbers]
            same = {"size": 9, "crc32c": "", "image_status": "ok"}
            rows = [{"image": names[i], "creative": texts[i], "thumbnail": data, **same} for i, data in zip(numbers, pixels, strict=True)]
            return pa.RecordBatch.from_pylist(rows, PACK)

        if lake.pack_receipts(self.storage, "creatives/"):
            self._commit(run, "creatives/packs", (Receipt("pack/0", "", 0, {"fetched": 0, "decoded": 0}),))
        else:
            counts = {"fetched": len(texts), "decoded": len(texts)}
            pack = write_parquet(self.storage, run.stage("creatives") + "/packs", "pack/0", map(batch, range(0, len(texts), 1024)), counts)
            self._commit(run, "creatives/packs", (pack,))
        odd = [[HOSTILE, "cut.jpg"], [None, texts[0]], ["corrupt", "ok_truncated"]]
        index = pa.record_batch(
            [pa.array([*own, *more]) for own, more in zip(odd, (names, texts, ["ok"] * len(texts)), strict=True)], schema=INDEX
        )
        counts = {"images": len(index), "status:ok": len(texts), "status:corrupt": 1, "status:ok_truncated": 1}
        self._commit(run, "creatives", (write_parquet(self.storage, run.stage("creatives"), "index/00000.000", [index], counts),))

    def _gate(self, run: MonthRun, promoted: bool) -> None:
        rng = np.random.default_rng(5)
        p = rng.lognormal(-4, 0.8, 3000).clip(1e-4, 0.5)
        impressions = rng.integers(1, 200, len(p))
        clicks = rng.binomial(impressions, p)
        models = {"candidate": p, "base_rate": np.full(len(p), p.mean()), "champion": np.sqrt(p * p.mean())}
        slices = {(WARM, None): np.arange(0, 2000), (COLD, None): np.arange(2000, 3000), ("device", HOSTILE): np.arange(0, 3000, 2)}
        clusters = hash64_column(pa.array([f"{i % 500}" for i in range(len(p))]))
        found = evaluate(clicks, impressions, models, clusters, slices, 200)
        ruling = gate.verdict(found, [run.month], 0.005, 1000)
        if not promoted:
            ruling |= {"status": "kept", "promoted": False, "why": f"normalized entropy +2 % {HOSTILE} (9 rows); the champion stays; more"}
        metrics = {name: found.overall.metrics(i) for i, name in enumerate(found.models)}
        reliability = {name: found.overall.reliability(i) for i, name in enumerate(found.models) if name != "base_rate"}
        info = {**ruling, "month": run.month, "metrics": metrics, "reliability": reliability, "compared": gate.compared(found)}
        day = datetime.date.fromisoformat(f"{run.month}-01")
        same = {"month": day, "run_id": run.id, "kind": "evaluation", "judged_month": day}
        rows = quality(found, same, dict.fromkeys(models, "r"))
        written = write_parquet(self.storage, run.stage("evaluation"), "quality", [rows])
        self._commit(run, "evaluation", (written,), encoder="e", ranker=run.version, **info)

    def _write(self, run: MonthRun, stage: str, unit: str, table: pa.Table) -> Receipt:
        return write_parquet(self.storage, run.stage(stage), unit, table.combine_chunks().to_batches(BATCH_ROWS), {})

    def _commit(self, run: MonthRun, stage: str, receipts: tuple[Receipt, ...], **info: object) -> None:
        name, _, below = stage.partition("/")
        lake.commit(self.storage, "/".join(filter(None, (run.stage(name), below))), Manifest(stage, receipts, info))


def world(folder: pathlib.Path, rows: int) -> World:
    """Nothing but the contract yet."""
    path = folder / "contract.pbtxt"
    path.write_text(contracts.dumps(CONTRACT))
    return World(Config(lake=str(folder / "lake"), contract=str(path)), rows)
