"""Whole months through the command, as a user runs it, against what plain Python, Arrow and the SavedModels say they should be."""

import csv
import datetime
import hashlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tensorflow_metadata.proto.v0 import statistics_pb2

from beam_jobs import drift
from beam_jobs.config import Config
from beam_jobs.jobs import connect
from beam_jobs.join import month_rows
from beam_jobs.realised import position_effect
from beam_jobs.run import kept
from model import registry
from model.features import Features, embedding_column
from model.images import decode
from schemas import contract as contracts
from schemas import lake
from schemas.checksum import crc32c
from schemas.lake import Champion, Current
from schemas.sample import write_months
from schemas.storage import Storage, open_storage
from serving.store import fetch

MONTHS = ["2026-08", "2026-09", "2026-10"]
STAGES = ["ingest", "creatives", "realised", "encoder", "embed", "drift", "train", "evaluate", "score", "lookup", "publish"]
ADS, CREATIVES = 4000, 300
BROKEN = "broken.jpg"


def adstocrat(*arguments: str) -> str:
    """Run the command in a process of its own; its output, or an error with it."""
    command = [sys.executable, "-m", "beam_jobs.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def lay_out(uri: str) -> Storage:
    """Three sample months, the last with a file of bad rows, a broken image, and a row without an image."""
    storage = open_storage(uri)
    write_months(storage, MONTHS, ADS, CREATIVES, 0, lambda line: None)
    names = "ad_id,advertiser,campaign,format,placement,device,hour,bid,position,image,impressions,clicks"
    rows = [
        f"extra-1,adv,cmp,banner,slot01,mobile,3,0.5,2,{BROKEN},10,1",
        "extra-2,adv,cmp,banner,slot01,mobile,3,0.5,2,,10,0",
        '"extra ""3"", é",adv,cmp,banner,slot01,mobile,,,,never-delivered.jpg,,',
        "bad-1,adv,cmp,banner,slot01,mobile,x,0.5,2,,10,0",
        "bad-2,adv,cmp,banner,slot01,mobile,3,0.5,2,../escape.jpg,10,0",
        "bad-3,adv,cmp",
    ]
    storage.write(lake.raw_ads(MONTHS[-1]) + "extra.csv", "\r\n".join([names, *rows]).encode())
    storage.write(lake.raw_images(MONTHS[-1]) + BROKEN, b"no picture at all")
    return storage


def published_table(dataset: str, month: str) -> dict[str, dict[str, Any]]:
    client = connect(dataset.partition(".")[0], "US")
    rows = client.query(f"SELECT * FROM `{dataset}.scores` WHERE month = DATE '{month}-01'").result()
    table = {row["key"]: dict(row) for row in rows}
    assert len(table) == rows.total_rows
    return table


@pytest.fixture(scope="module")
def undisturbed(cloud: dict[str, str]) -> tuple[str, str, list[str]]:
    """A lake whose three months ran without a disturbance: its URI, its dataset, and what each month printed."""
    uri, dataset = "gs://adstocrat/undisturbed", f"{cloud['GOOGLE_CLOUD_PROJECT']}.undisturbed"
    lay_out(uri)
    return uri, dataset, [adstocrat("month", month, "--lake", uri, "--dataset", dataset) for month in MONTHS]


def test_every_month_tells_its_stages_and_balances(undisturbed: tuple[str, str, list[str]]) -> None:
    for output in undisturbed[2]:
        lines = output.splitlines()
        assert [line.split()[0] for line in lines if line.split() and line.split()[0] in STAGES] == STAGES
        assert "  balanced" in lines and lines[-1].endswith("/report.html")


def test_the_published_table_is_what_plain_code_computes(undisturbed: tuple[str, str, list[str]], tmp_path: pathlib.Path) -> None:
    import tensorflow as tf

    uri, dataset, _ = undisturbed
    storage, month = open_storage(uri), MONTHS[-1]
    champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    assert champion is not None and current is not None and current.month == month
    table = published_table(dataset, month)
    contract = contracts.load(contracts.DEFAULT)

    # The rows, by Python's own reader.
    expected: dict[str, dict[str, Any]] = {}
    for name in storage.names(lake.raw_ads(month)):
        for row in csv.DictReader(io.StringIO(storage.read(name).decode(), newline="")):
            if not row["ad_id"].startswith("bad-"):
                expected[row["ad_id"]] = row
    assert set(table) == set(expected) and len(table) == ADS + 3

    # The images, by their bytes.
    pixels, status = {}, {}
    for name in storage.names(lake.raw_images(month)):
        data, image = storage.read(name), name.rpartition("/")[2]
        status[image] = ("ok", hashlib.sha256(data).hexdigest()) if image != BROKEN else ("not_an_image", None)
        if image != BROKEN:
            pixels[status[image][1]] = decode(data)[0]
    for key, row in expected.items():
        image_status, creative = status.get(row["image"], ("missing", None)) if row["image"] else ("no_image", None)
        assert (table[key]["image_status"], table[key]["creative"]) == (image_status, creative), key
        assert table[key]["score_status"] == ("ok" if creative else "no_image"), key
        for name in ("ad_id", "format", "placement", "device"):
            assert table[key][name] == row[name]
    assert {row["run_id"] for row in table.values()} == {current.run}
    assert Counter(row["image_status"] for row in table.values())["missing"] > 1

    # The scores, by the SavedModels themselves.
    ranker = next(iter({row["model_version"] for row in table.values()}))
    encoder = next(iter({row["encoder_version"] for row in table.values()}))
    for kind, version in (("encoder", encoder), ("ranker", ranker)):
        registry.fetch(storage, kind, version, tmp_path / kind)
    creatives = sorted(pixels)
    embed = tf.saved_model.load(str(tmp_path / "encoder" / "saved_model"))
    embeddings = embed.serve({"thumbnail": tf.constant(np.stack([pixels[creative] for creative in creatives]))})["embedding"].numpy()
    keys = sorted(expected)
    columns: dict[str, Any] = {
        column.name: pa.array([expected[key][column.name] or None for key in keys], pa.string()).cast(column.arrow_type)
        for column in contract.kept
    }
    place = {creative: i for i, creative in enumerate(creatives)}
    found = [place.get(table[key]["creative"]) for key in keys]
    columns["key"] = pa.array(keys)
    columns["month_number"] = pa.array([lake.month_number(month)] * len(keys), pa.int32())
    columns["creative"] = pa.array([table[key]["creative"] for key in keys], pa.string())
    nothing = np.full(embeddings.shape[1], np.nan, np.float32)
    columns["embedding"] = embedding_column(np.stack([nothing if i is None else embeddings[i] for i in found]))
    features = Features.from_json(json.loads((tmp_path / "ranker" / "spec.json").read_text())["features"])
    arrays = features.arrays(pa.RecordBatch.from_pydict(columns), at_reference=True)
    rank = tf.saved_model.load(str(tmp_path / "ranker" / "saved_model"))
    logits = rank.serve(arrays)["calibrated"].numpy()[:, 0]
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose([table[key]["p_click"] for key in keys], probability, rtol=0, atol=1e-6)

    # The lookup answers the same.
    answers = fetch(storage, current, tmp_path / "cache")
    for key in keys:
        answer = json.loads(answers.get(key.encode()) or b"{}")
        assert answer == {name: value for name, value in table[key].items() if name in answer}
        assert {"key", "p_click", "image_status", "score_status"} <= set(answer)
    assert answers.get(b"bad-1") is None
    answers.close()


def test_every_month_is_watched(undisturbed: tuple[str, str, list[str]]) -> None:
    """Statistics of all rows; drift against the month before; and last month's run, held against what came of it, by plain code too."""
    uri, dataset, outputs = undisturbed
    storage, runs = open_storage(uri), {month: lake.publications(open_storage(uri), month)[-1].run for month in MONTHS}
    for month, before, output in zip(MONTHS, [None, *MONTHS], outputs, strict=False):
        drifted, told, moved, ledger = (
            storage.read_json(f"{lake.run_folder(month, runs[month])}/{name}.json") for name in ("drift", "realised", "shift", "ledger")
        )
        found = statistics_pb2.DatasetFeatureStatisticsList.FromString(storage.read(f"statistics/{month}/{runs[month]}/statistics.pb"))
        assert {dataset.name: dataset.num_examples for dataset in found.datasets}["rows"] == ledger["counts"]["ingested"]
        assert (drifted["previous"], told["month"]) == (before, before) and not [
            row for row in drifted["compared"] if row["action"] == "stop"
        ]
        assert output.splitlines().count(f"  ! {drifted['alarms'][0]}" if drifted["alarms"] else "") == bool(drifted["alarms"])
        if before is None:
            assert not told["rows"] and not drifted["compared"] and moved == {}
            continue
        assert {row["kind"] for row in drifted["compared"]} == set(drift.KINDS) and told["run"] == runs[before]
        assert moved["sentence"] in output and moved["this"] / moved["last"] - 1 == pytest.approx(moved["mix"] + moved["model"])
        scores, now = published_table(dataset, before), published_table(dataset, month)
        assert moved["this"] == pytest.approx(np.mean([row["p_click"] for row in now.values()]))
        clicks = predicted = 0.0
        run = kept(Config(lake=uri), before, runs[before])
        ranker = registry.load(storage, "ranker", storage_ranker(storage, before, runs[before]))
        effects = position_effect(ranker, run.contract, np.arange(1.0, 7.0))
        for row in (
            row for rows in delivered(storage, month) for row in rows if row["impressions"] not in ("", "0") and row["ad_id"] in scores
        ):
            p = scores[row["ad_id"]]["p_click"]
            predicted += int(row["impressions"]) / (1 + (1 - p) / p * np.exp(-effects[int(row["position"]) - 1]))
            clicks += int(row["clicks"])
        assert told["rows"][0]["clicks"] == clicks and told["rows"][0]["calibration"] == pytest.approx(predicted / clicks, rel=1e-6)
        # Position only adds to what a ranker says, whatever the row is.
        rows = month_rows(run, before, runs[before], ranker.encoder_version)
        batch = next(iter(rows.batches(rows.units[0])))
        at, there = (ranker.predict(batch, at_reference=which) for which in (True, False))
        added = position_effect(ranker, run.contract, batch["position"].to_numpy(zero_copy_only=False).astype(float))
        assert np.allclose(np.log(there / (1 - there)), np.log(at / (1 - at)) + added, atol=1e-4)
        client = connect(dataset.partition(".")[0], "US")
        query = f"SELECT month, run_id, calibration FROM `{dataset}.quality` WHERE kind = 'realised' AND judged_month = DATE '{month}-01'"
        (noted,) = client.query(f"{query} AND segment = 'overall'").result()
        assert (noted["month"].isoformat()[:7], noted["run_id"]) == (before, runs[before])
        assert noted["calibration"] == pytest.approx(told["rows"][0]["calibration"])


def storage_ranker(storage: Storage, month: str, run: str) -> str:
    scores = lake.read_manifest(storage, lake.stage_folder("scores", month, run))
    assert scores is not None
    return scores.info["ranker"]


def delivered(storage: Storage, month: str) -> Iterator[Iterator[dict[str, str]]]:
    """The rows of each file, by Python's own reader, but for those that are bad."""
    for name in storage.names(lake.raw_ads(month)):
        reader = csv.DictReader(io.StringIO(storage.read(name).decode(), newline=""))
        yield (row for row in reader if not row["ad_id"].startswith("bad-"))


def test_a_month_that_is_done_does_nothing(undisturbed: tuple[str, str, list[str]]) -> None:
    uri, dataset, _ = undisturbed
    before = open_storage(uri).names("")
    output = adstocrat("month", MONTHS[0], "--lake", uri, "--dataset", dataset)
    assert all("complete, skipped" in line for line in output.splitlines() if line.split()[0] in STAGES)
    assert open_storage(uri).names("") == before


def kill_behind(printed: str, delay: float, *arguments: str) -> list[str]:
    """Start the command, and kill it `delay` seconds after it printed a line that begins so; the lines that it had printed."""
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "beam_jobs.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith(printed):
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        lines += process.stdout.read().splitlines()
    assert process.returncode == -signal.SIGKILL, lines
    return lines


def kill_after(seconds: float, *arguments: str) -> list[str]:
    """Start the command, and kill it after that time; the lines that it had printed."""
    command = [sys.executable, "-u", "-m", "beam_jobs.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        time.sleep(seconds)
        process.kill()
        return process.communicate()[0].splitlines()


def kill_before_a_pointer_moves(moves: int, *arguments: str) -> None:
    """Run the command until it has moved so many pointers and would move the next, and have it killed there."""
    script = f"""
import itertools, os, signal, sys
from schemas import lake
move, calls = lake.move_pointer, itertools.count()
lake.move_pointer = lambda *to: move(*to) if next(calls) < {moves} else os.kill(os.getpid(), signal.SIGKILL)
from beam_jobs.cli import main
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stdout


def test_killed_at_every_stage_it_resumes_to_the_same_table(undisturbed: tuple[str, str, list[str]], cloud: dict[str, str]) -> None:
    """Also: the same months in another fresh lake give the same run ids and bit-equal scores."""
    uri, dataset = "gs://adstocrat/killed", f"{cloud['GOOGLE_CLOUD_PROJECT']}.killed"
    lay_out(uri)
    begins = dict(zip(STAGES, ["month ", *(f"{stage} " for stage in STAGES)], strict=False))
    arguments = ("month", MONTHS[0], "--lake", uri, "--dataset", dataset)
    done: dict[str, str] = {}
    # Those two have next to nothing to do in a first month.
    for stage in [stage for stage in STAGES[:-1] if stage not in ("realised", "drift")]:
        lines = kill_behind(begins[stage], 0.2, *arguments)
        told = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in STAGES}
        for earlier in STAGES[: STAGES.index(stage)]:
            # What was complete when it was killed before is not done again.
            assert earlier not in done or "complete, skipped" in told[earlier], (stage, earlier, told)
        done |= dict.fromkeys(STAGES[: STAGES.index(stage)], "done")
    # The last stage, where a half is worst.
    # BigQuery has the month and no pointer has moved; then, the champion has moved and the lookup has not.
    for moves in (0, 1):
        kill_before_a_pointer_moves(moves, *arguments)
        assert len(published_table(dataset, MONTHS[0])) == ADS
        assert lake.read_pointer(open_storage(uri), lake.CURRENT, Current) == (None, None)
    adstocrat(*arguments)
    kills, rng = 40 if os.environ.get("ADSTOCRAT_LONG") else 4, random.Random(0)
    for month in MONTHS[1:]:
        complete: set[str] = set()
        for _ in range(kills // 2):
            lines = kill_after(rng.uniform(1, 6), "month", month, "--lake", uri, "--dataset", dataset)
            told = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in STAGES}
            assert all("complete, skipped" in told[stage] for stage in complete & set(told))
            complete |= set(told)
            current, _ = lake.read_pointer(open_storage(uri), lake.CURRENT, Current)
            assert current and lake.read_manifest(open_storage(uri), lake.stage_folder("lookup", current.month, current.run))
        adstocrat("month", month, "--lake", uri, "--dataset", dataset)
    for month in MONTHS:
        expected, resumed = published_table(undisturbed[1], month), published_table(dataset, month)
        assert resumed == expected
    one, other = open_storage(undisturbed[0]), open_storage(uri)
    for pointer, kind in ((lake.CHAMPION, Champion), (lake.CURRENT, Current)):
        assert lake.read_pointer(one, pointer, kind)[0] == lake.read_pointer(other, pointer, kind)[0]


def test_a_late_file_makes_a_new_run_that_replaces_the_month(undisturbed: tuple[str, str, list[str]], tmp_path: pathlib.Path) -> None:
    lake_folder = tmp_path / "lake"
    storage = open_storage(str(lake_folder))
    write_months(storage, MONTHS[:1], 1500, 100, 1, lambda line: None)
    adstocrat("month", MONTHS[0], "--lake", str(lake_folder))
    first, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    late = storage.read(storage.names(lake.raw_ads(MONTHS[0]))[0]).splitlines()[0] + b"\nlate,adv,cmp,banner,slot01,mobile,3,0.5,2,,10,0\n"
    storage.write(lake.raw_ads(MONTHS[0]) + "late.csv", late)
    output = adstocrat("month", MONTHS[0], "--lake", str(lake_folder))
    second, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    assert first is not None and second is not None and first.run != second.run
    assert "1,501 ingested" in output and " 0 new" in output

    listed = adstocrat("runs", "--lake", str(lake_folder)).splitlines()
    assert [first.run in line for line in listed] == [True, False]
    assert ["served" in line for line in listed] == [False, True]
    assert second.run in json.loads(adstocrat("show", second.run, "--lake", str(lake_folder)))["run"]
    before = storage.names("")
    planned = adstocrat("gc", "--keep", "1", "--dry-run", "--lake", str(lake_folder)).splitlines()[:-1]
    assert planned and storage.names("") == before
    adstocrat("gc", "--keep", "1", "--lake", str(lake_folder))
    gone = set(before) - set(storage.names(""))
    assert {storage.url(name) for name in gone} == set(planned)
    # Its images stay known; its encoder, which no model that is kept takes, is gone with its embeddings.
    assert {name.split("/")[0] for name in gone} >= {"rows", "scores", "lookup", "runs"} and all(
        first.run in name or "/units/" in name for name in gone
    )
    assert not [name for name in gone if name.startswith("creatives/") and "/packs/" in name]
    output = adstocrat("month", MONTHS[0], "--lake", str(lake_folder))
    assert all("complete, skipped" in line for line in output.splitlines() if line.split()[0] in STAGES)
    assert adstocrat("gc", "--keep", "1", "--lake", str(lake_folder)).strip() == "0 objects were removed"


REAL_LAKE = os.environ.get("ADSTOCRAT_REAL_LAKE")


@pytest.mark.skipif(not REAL_LAKE, reason="ADSTOCRAT_REAL_LAKE names no lake of real rows and photos")
def test_real_rows_and_photos(cloud: dict[str, str], tmp_path: pathlib.Path) -> None:
    uri, dataset = "gs://adstocrat/real", f"{cloud['GOOGLE_CLOUD_PROJECT']}.real"
    source, storage = pathlib.Path(str(REAL_LAKE)), open_storage(uri)
    for path in sorted(source.glob("raw/**/*.*")):
        storage.upload(path, path.relative_to(source).as_posix())
    contract = str(tmp_path / "real.pbtxt")
    files = [str(path) for path in sorted(source.glob("raw/*/ads/*.csv"))]
    adstocrat("infer-contract", *files, "--key", "ad_id", "--image", "image", "--clicked", "clicked", "--out", contract)
    outputs = [adstocrat("month", month, "--lake", uri, "--dataset", dataset, "--contract", contract) for month in MONTHS]
    assert all("  balanced" in output.splitlines() for output in outputs)

    counted = connect(dataset.partition(".")[0], "US").query(
        f"SELECT month, COUNT(*) AS n FROM `{dataset}.scores` GROUP BY month ORDER BY month"
    )
    assert [(row["month"], row["n"]) for row in counted.result()] == [
        (datetime.date(2026, 8, 1), 2667),
        (datetime.date(2026, 9, 1), 2667),
        (datetime.date(2026, 10, 1), 2666),
    ]
    contents = {hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("raw/*/images/*")}
    for path in source.glob("raw/*/images/*"):
        with Image.open(path) as image:
            assert image.format == "JPEG"
    manifests = [name.rpartition("/")[0] for name in storage.names("") if name.endswith("/packs/manifest.json")]
    decoded, embedded = Counter[str](), Counter[str]()
    for folder in manifests:
        manifest = lake.read_manifest(storage, folder)
        assert manifest is not None
        for receipt in manifest.receipts:
            assert not receipt.file or crc32c(storage.read(receipt.file)) == receipt.crc32c
        top, version = folder.split("/")[:2]
        if top == "creatives":
            decoded["all"] += manifest.count("decoded")
        else:
            embedded[version] += manifest.count("embedded")
    assert decoded["all"] == len(contents)
    assert set(embedded.values()) == {len(contents)}
