"""Runs that are complete but for their publication, laid down in a lake without the stages that would make them."""

import dataclasses
import datetime
import hashlib
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from served import write_shard

from beam_jobs import month as months
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, prepare
from schemas import contract as contracts
from schemas import lake, tables
from schemas.contract import Column, Contract
from schemas.lake import Manifest, Receipt
from schemas.parquet import BATCH_ROWS, upload, write_parquet
from schemas.storage import Storage, open_storage

CONTRACT = Contract(
    (
        Column("id", "bytes", frozenset({"key"}), required=True),
        Column("device", "bytes", frozenset({"segment"})),
        Column("impressions", "int", frozenset({"impressions"})),
        Column("clicks", "int", frozenset({"clicks"})),
    )
)
DEVICES = pa.array(["mobile", "desktop", None])


@dataclasses.dataclass(frozen=True)
class Months:
    """A lake and a dataset, and runs of so many rows in them.

    Attributes:
        config: of all runs.
        rows: of each run.
        served: whether the service can answer from them.
    """

    config: Config
    rows: int
    served: bool = False

    @property
    def storage(self) -> Storage:
        return open_storage(self.config.lake)

    @property
    def flags(self) -> list[str]:
        config = self.config
        dataset = ["--dataset", config.dataset] if config.dataset else []
        return ["--lake", config.lake, *dataset, "--contract", str(config.contract)]

    def deliver(self, month: str, version: str) -> MonthRun:
        """The month's delivery, which decides its run."""
        self.storage.write(lake.raw_ads(month) + "ads.csv", f"id,device,impressions,clicks\n{version},mobile,1,0\n".encode())
        return prepare(self.config, month)

    def make(self, month: str, version: str = "1", mean: float = 0.05, devices: pa.Array = DEVICES) -> MonthRun:
        """The run of a delivery with all stages before `publish`: probabilities around `mean`, impressions for two rows of three."""
        run = self.deliver(month, version)
        number = np.arange(self.rows)
        key = pc.binary_join_element_wise("k", pa.array(number).cast(pa.string()), "")
        device = devices.take(pa.array(number % len(devices)))
        impressions = pa.array(number % 5 + 1, mask=number % 3 == 0)
        clicks = pa.array(number % 2, mask=number % 3 == 0)
        rows = pa.record_batch({"key": key, "id": key, "device": device, "impressions": impressions, "clicks": clicks})
        ingested = write_parquet(self.storage, run.stage("rows"), "shard/00000.000", cut(rows), {"ingested": self.rows})
        self._commit(run, "rows", (Receipt("file/ads.csv", "", 0, {"read": self.rows}), ingested), shards=1)
        self._commit(run, "creatives", ())
        self._commit(run, "creatives/packs", ())
        pair = {"encoder": "e", "ranker": run.version}
        made = {
            "month": month,
            "encoder": "e",
            "contract": CONTRACT.fingerprint,
            "parent": run.champion and dataclasses.asdict(run.champion),
        }
        lake.commit(self.storage, lake.model_folder("ranker", run.version), Manifest("train", (), made))
        same = {
            **{"month": datetime.date.fromisoformat(f"{month}-01"), "image_status": "missing", "score_status": "no_image"},
            **{"run_id": run.id, "encoder_version": pair["encoder"], "model_version": pair["ranker"], "creative": None},
            **{"evidence_key": 3, "evidence_creative": 0},
        }
        schema = tables.schema("scores", CONTRACT)
        own = {"key": key, "id": key, "device": device, "p_click": pa.array(mean * (0.5 + number / self.rows))}
        scores = [own.get(field.name) or pa.repeat(pa.scalar(same[field.name], field.type), self.rows) for field in schema]
        batch = pa.RecordBatch.from_arrays(scores, schema=schema)
        statuses = {"scored": self.rows, "score_status:no_image": self.rows, "image_status:missing": self.rows}
        written = write_parquet(self.storage, run.stage("scores"), "shard/00000.000@0", cut(batch), statuses)
        self._commit(run, "scores", (written,), **pair)
        quality = pa.RecordBatch.from_pylist(
            [
                {
                    **{"month": same["month"], "run_id": run.id, "kind": "evaluation", "model": "candidate", "judged_month": same["month"]},
                    **{"model_version": pair["ranker"], "segment": "overall", "rows": 7, "impressions": 9.0, "clicks": 1.0},
                }
            ],
            schema=tables.schema("quality"),
        )
        judged = write_parquet(self.storage, run.stage("evaluation"), "quality", [quality])
        self._commit(run, "evaluation", (judged,), **pair, promoted=True, status="promoted", why='it is "better"')
        if self.served:
            months.run_stage(next(stage for stage in months.STAGES if stage.name == "lookup"), run, [])
        else:
            self._commit(run, "lookup", (self._counted(run),))
        return run

    def _counted(self, run: MonthRun) -> Receipt:
        """A file that has as many entries as a lookup would, quicker than the stage."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "shard"
            write_shard(path, [str(number) for number in range(self.rows)], [b"{}"] * self.rows)
            file, checksum = upload(self.storage, path, lake.unique(run.stage("lookup"), "shard", ".shard"))
        return Receipt("shard/0", file, self.rows, {"entries": self.rows}, checksum)

    def _commit(self, run: MonthRun, stage: str, receipts: tuple[Receipt, ...], **info: object) -> None:
        name, _, below = stage.partition("/")
        lake.commit(self.storage, "/".join(filter(None, (run.stage(name), below))), Manifest(stage, receipts, info))


def cut(batch: pa.RecordBatch) -> list[pa.RecordBatch]:
    return [batch.slice(start, BATCH_ROWS) for start in range(0, len(batch), BATCH_ROWS)]


def months_in(lake_uri: str, dataset: str | None, folder: pathlib.Path, rows: int, served: bool = False) -> Months:
    """No runs yet, with the contract written to `folder`."""
    path = folder / f"{hashlib.sha256(lake_uri.encode()).hexdigest()[:8]}.pbtxt"
    path.write_text(contracts.dumps(CONTRACT))
    return Months(Config(lake=lake_uri, dataset=dataset, contract=str(path)), rows, served)
