import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from served import write_shard

from beam_jobs import ledger
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, StageError
from schemas import contract as contracts
from schemas import lake
from schemas.lake import MANIFEST, Manifest, Receipt
from schemas.parquet import upload, write_parquet
from schemas.storage import Folder
from serving.shard import shard_name

MONTH = "2026-10"
READ, INGESTED, REJECTED = 130, 120, 10
STAGES = ("rows", "creatives", "creatives/packs", "embeddings", "scores", "lookup")


def keys(start: int, rows: int) -> list[pa.RecordBatch]:
    return [pa.RecordBatch.from_pydict({"key": [f"k{i:04d}" for i in range(start, start + rows)]})]


def lookup_shard(storage: Folder, shard: int, start: int, rows: int) -> Receipt:
    path = pathlib.Path(storage.uri) / "local.shard"
    path.unlink(missing_ok=True)  # What was uploaded before may be the same file.
    written = write_shard(path, [f"k{i:04d}" for i in range(start, start + rows)], [b'{"key":1}'] * rows)
    file, checksum = upload(storage, path, lake.unique("lookup", "shard", ".shard"))
    return Receipt(shard_name(shard, 2), file, written, {"entries": written}, checksum)


def folder_of(run: MonthRun, stage: str) -> str:
    name, _, below = stage.partition("/")
    folder = lake.embeddings_folder("e", run.month, run.id) + "/packs" if name == "embeddings" else run.stage(name)
    return f"{folder}/{below}" if below else folder


@pytest.fixture
def run(tmp_path: pathlib.Path) -> MonthRun:
    """A run of which all is well: two files read, two units of rows, two units of scores, two shards of the lookup."""
    storage = Folder(str(tmp_path))
    run = MonthRun(storage, contracts.load(contracts.DEFAULT), Config(lake=storage.uri), MONTH, "r", (), None, None)
    reasons = {"rejected:field_count": 4, "rejected:unparsable": 6}
    statuses = {"image_status:ok": 50, "image_status:missing": 10, "score_status:ok": 50, "score_status:no_image": 10}
    receipts = {
        "rows": [
            Receipt("file/a.csv", "", 0, {"read": 100}),
            write_parquet(storage, "rejects", "file/b.csv", keys(1000, REJECTED), {"read": 30, **reasons}),
            *(write_parquet(storage, "rows", f"shard/{i:05d}.000", keys(60 * i, 60), {"ingested": 60}) for i in range(2)),
        ],
        "scores": [
            write_parquet(storage, "scores", f"shard/{i:05d}.000@000000000", keys(60 * i, 60), {"scored": 60, **statuses}) for i in range(2)
        ],
        "lookup": [lookup_shard(storage, i, 60 * i, 60) for i in range(2)],
        "creatives": [Receipt("index/00000.000", "index", 7, {"images": 7, "status:ok": 7})],
        "creatives/packs": [Receipt("pack/00000", "pack", 5, {"fetched": 5, "decoded": 4})],
        "embeddings": [Receipt("pack@0", "embedded", 4, {"embedded": 4})],
    }
    storage.write(f"{run.folder}/inputs.json", b'{"images": {"count": 7}}')
    for stage in STAGES:
        manifest = Manifest(stage, tuple(receipts[stage]), {"encoder": "e"})
        lake.commit(storage, folder_of(run, stage), manifest)
    return run


def change(run: MonthRun, stage: str, number: int, **values: Any) -> None:
    """Tamper with a manifest: another value in a receipt, or no such receipt at all where nothing is given."""
    manifest = run.manifest(folder_of(run, stage))
    receipts = list(manifest.receipts)
    if values:
        counts = {**receipts[number].counts, **values.pop("counts", {})}
        receipts[number] = dataclasses.replace(receipts[number], counts=counts, **values)
    else:
        del receipts[number]
    run.storage.write(f"{folder_of(run, stage)}/{MANIFEST}", dataclasses.replace(manifest, receipts=tuple(receipts)).to_json())


def short_file(run: MonthRun, stage: str, number: int) -> None:
    """A whole file with a row less than its receipt says."""
    receipt = write_parquet(run.storage, stage, "short", keys(0, run.manifest(folder_of(run, stage)).receipts[number].rows - 1))
    change(run, stage, number, file=receipt.file, crc32c=receipt.crc32c)


def short_shard(run: MonthRun) -> None:
    receipt = lookup_shard(run.storage, 1, 60, 59)
    change(run, "lookup", 1, file=receipt.file, crc32c=receipt.crc32c)


def test_it_balances(run: MonthRun) -> None:
    taken = ledger.take(run)
    assert taken == run.storage.read_json(f"{run.folder}/ledger.json")
    assert taken["balanced"] and taken["unbalanced"] == []
    assert taken["counts"] == {
        **{"read": READ, "rejected": REJECTED, "ingested": INGESTED, "ingested in files": INGESTED, "rejected in files": REJECTED},
        **{"scored": INGESTED, "scored in files": INGESTED, "lookup": INGESTED, "lookup in files": INGESTED},
        **{"images listed": 7, "images": 7, "images fetched": 5, "images decoded": 4, "creatives embedded": 4},
    }
    assert taken["rejected"] == {"field_count": 4, "unparsable": 6}
    assert taken["image_status"] == {"ok": 100, "missing": 20} and taken["score_status"] == {"ok": 100, "no_image": 20}
    shown = ledger.show(taken)
    assert shown.endswith("balanced") and "NOT" not in shown and "read 130 = ingested 120 + rejected 10" in shown


def test_rows_too_young_are_told(run: MonthRun) -> None:
    dated = contracts.parse(contracts.dumps(run.contract) + 'feature { name: "began" type: BYTES annotation { tag: "mature_before:7" } }')
    change(run, "rows", 2, counts={"too young": 3})
    taken = ledger.take(dataclasses.replace(run, contract=dated))
    assert taken["counts"]["too young"] == 3 and taken["balanced"]
    assert "3 rows, scored and neither learnt from nor judged by" in ledger.show(taken)


def test_no_new_creative_is_no_fault(run: MonthRun) -> None:
    run.storage.delete(folder_of(run, "embeddings"))
    assert ledger.take(run)["counts"]["creatives embedded"] == 0


UNBALANCED: dict[str, tuple[Callable[[MonthRun], None], list[str]]] = {
    "read a row more": (lambda run: change(run, "rows", 0, counts={"read": 101}), ["read 131 is not ingested + rejected 130"]),
    "read a file less": (lambda run: change(run, "rows", 0), ["read 30 is not ingested + rejected 130"]),
    "rejects uncounted": (
        lambda run: change(run, "rows", 1, counts={"rejected:unparsable": 5}),
        ["read 130 is not ingested + rejected 129", "rejected in files 10 is not rejected 9"],
    ),
    "rejects unwritten": (lambda run: change(run, "rows", 1, file=""), ["rejected in files 0 is not rejected 10"]),
    "ingested a unit less": (
        lambda run: change(run, "rows", 3),
        ["read 130 is not ingested + rejected 70", "scored 120 is not ingested 60", "lookup 120 is not ingested 60"],
    ),
    "ingested miscounted": (
        lambda run: change(run, "rows", 2, counts={"ingested": 61}),
        [
            *("read 130 is not ingested + rejected 131", "ingested in files 120 is not ingested 121"),
            *("scored 120 is not ingested 121", "lookup 120 is not ingested 121"),
        ],
    ),
    "rows file short": (lambda run: short_file(run, "rows", 2), ["ingested in files 119 is not ingested 120"]),
    "scored a unit less": (lambda run: change(run, "scores", 0), ["scored 60 is not ingested 120"]),
    "scored miscounted": (
        lambda run: change(run, "scores", 0, counts={"scored": 59}),
        ["scored 119 is not ingested 120", "scored in files 120 is not scored 119"],
    ),
    "scores file short": (lambda run: short_file(run, "scores", 1), ["scored in files 119 is not scored 120"]),
    "a unit's scores twice": (
        lambda run: change(run, "scores", 1, file=run.manifest(run.stage("scores")).receipts[0].file, counts={"scored": 61}),
        ["scored 121 is not ingested 120", "scored in files 120 is not scored 121"],
    ),
    "lookup a shard less": (lambda run: change(run, "lookup", 1), ["lookup 60 is not ingested 120"]),
    "lookup miscounted": (
        lambda run: change(run, "lookup", 1, rows=61),
        ["lookup 121 is not ingested 120", "lookup in files 120 is not lookup 121"],
    ),
    "lookup shard short": (short_shard, ["lookup in files 119 is not lookup 120"]),
    "images a shard less": (lambda run: change(run, "creatives", 0), ["images 0 is not images listed 7"]),
}


@pytest.mark.parametrize("name", UNBALANCED)
def test_what_does_not_balance_is_named(run: MonthRun, name: str) -> None:
    tamper, expected = UNBALANCED[name]
    tamper(run)
    with pytest.raises(
        StageError, match=f"the ledger of {MONTH} does not balance, nothing is published: {re.escape('; '.join(expected))}$"
    ):
        ledger.take(run)
    written = run.storage.read_json(f"{run.folder}/ledger.json")
    assert not written["balanced"] and written["unbalanced"] == expected
    assert ledger.show(written).splitlines()[-1] == f"  NOT balanced: {'; '.join(expected)}"


@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
@pytest.mark.parametrize(("stage", "number"), [("rows", 1), ("rows", 2), ("scores", 1), ("lookup", 0)])
def test_a_file_that_is_not_whole_is_named(run: MonthRun, stage: str, number: int, damage: str) -> None:
    path = pathlib.Path(run.storage.uri) / run.manifest(folder_of(run, stage)).receipts[number].file
    data = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises(StageError, match=f"{re.escape(str(path))} cannot be counted, nothing is published"):
        ledger.take(run)


@pytest.mark.parametrize(("stage", "command"), [("rows", "ingest"), ("creatives", "creatives"), ("scores", "score"), ("lookup", "lookup")])
def test_a_stage_that_is_not_complete_is_named(run: MonthRun, stage: str, command: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        (pathlib.Path(run.storage.uri) / folder_of(run, stage) / MANIFEST).unlink()
    with pytest.raises(StageError, match=f"is not complete; run `adstocrat {command} {MONTH}` first"):
        ledger.take(run)


def test_what_was_used_is_told_by_step(run: MonthRun) -> None:
    notes = [{"step": "score", "seconds": 10.5}, {"step": "score", "seconds": 2.0}]
    notes.append({"step": "embed-packs", "seconds": 60, "job": "1", "metrics": {"TotalVcpuTime": 7200.0, "TotalGpuTime": 1800.0}})
    for note in notes:
        run.storage.write(lake.unique(f"{run.folder}/used", note["step"], ".json"), json.dumps(note).encode())
    taken = ledger.take(run)
    assert taken["used"]["score"] == {"seconds": 12.5} and taken["used"]["embed-packs"]["TotalVcpuTime"] == 7200
    assert "  used     embed-packs 60 s, score 12 s; 2.00 vCPU hours, 0.50 GPU hours\n" in ledger.show(taken)
