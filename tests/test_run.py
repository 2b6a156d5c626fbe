import dataclasses
import json
import os
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from beam_jobs import run as runs
from beam_jobs import train
from beam_jobs.config import Config
from beam_jobs.run import LISTING, MonthRun, StageError, champion_before, earlier_champion, prepare
from model.registry import FORMAT
from schemas import contract as contracts
from schemas import lake
from schemas.checksum import crc32c
from schemas.lake import CHAMPION, Champion, Manifest, raw_ads, raw_images
from schemas.parquet import read_parquet
from schemas.sample import write_months
from schemas.storage import Folder, Storage, open_storage

MONTH = "2026-10"
ADS = {"a.csv": b"ad_id,bid\nx,1\n", "b.csv.gz": b"packed"}
IMAGES = {"one.png": b"1111", "sub/two.png": b"22"}


def deliver(storage: Storage, ads: dict[str, bytes] = ADS, images: dict[str, bytes] = IMAGES) -> None:
    for prefix, files in ((raw_ads(MONTH), ads), (raw_images(MONTH), images)):
        for name, data in files.items():
            storage.write(prefix + name, data)


@pytest.fixture
def storage(tmp_path: pathlib.Path) -> Folder:
    found = Folder(str(tmp_path / "lake"))
    deliver(found)
    return found


def run_of(storage: Storage, month: str = MONTH, **settings: Any) -> MonthRun:
    return prepare(Config(lake=storage.uri, **settings), month)


# --- the id -------------------------------------------------------------------------------------------------------------------------------


def test_the_same_inputs_are_the_same_run(storage: Folder, tmp_path: pathlib.Path) -> None:
    other = Folder(str(tmp_path / "another lake"))
    deliver(other)
    os.utime(pathlib.Path(other.uri) / raw_ads(MONTH) / "a.csv", (0, 0))
    other.write(raw_ads(MONTH) + "notes.txt", b"no rows")
    other.write(raw_ads("2026-09") + "a.csv", b"another month")
    first, second = run_of(storage), run_of(other)
    assert first.id == second.id and len(first.id) == 16
    assert [entry.name for entry in second.ads] == [raw_ads(MONTH) + name for name in ADS]


def test_a_bucket_and_a_folder_give_the_same_run(storage: Folder, cloud: dict[str, str]) -> None:
    bucket = open_storage(f"gs://adstocrat/{uuid.uuid4().hex}")
    deliver(bucket)
    first, second = run_of(storage), run_of(bucket, dataset="project.ads")
    assert first.id == second.id

    def inputs(run: MonthRun) -> dict[str, Any]:
        found = run.storage.read_json(f"{run.folder}/inputs.json")
        assert found.pop("listing").startswith(run.folder) and found.pop("created")
        return found

    assert inputs(first) == inputs(second)
    assert listed(first) == listed(second)


def rename(storage: Storage, folder: str, name: str, other: str) -> None:
    storage.write(folder + other, storage.read(folder + name))
    storage.delete(folder + name)


CHANGES: dict[str, Callable[[Storage], None]] = {
    "a byte of a file": lambda storage: storage.write(raw_ads(MONTH) + "a.csv", ADS["a.csv"].replace(b"1", b"2")),
    "a longer file": lambda storage: storage.write(raw_ads(MONTH) + "a.csv", ADS["a.csv"] + b"y,2\n"),
    "a late file": lambda storage: storage.write(raw_ads(MONTH) + "late.csv", b"ad_id,bid\n"),
    "a file gone": lambda storage: storage.delete(raw_ads(MONTH) + "a.csv"),
    "a byte of an image": lambda storage: storage.write(raw_images(MONTH) + "one.png", b"1112"),
    "a late image": lambda storage: storage.write(raw_images(MONTH) + "late.png", b"1111"),
    "an image gone": lambda storage: storage.delete(raw_images(MONTH) + "one.png"),
    "an image renamed": lambda storage: rename(storage, raw_images(MONTH), "one.png", "1.png"),
    "a file renamed": lambda storage: rename(storage, raw_ads(MONTH), "a.csv", "c.csv"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_files_are_another_run(storage: Folder, name: str) -> None:
    before = run_of(storage)
    CHANGES[name](storage)
    after = run_of(storage)
    assert after.id != before.id
    # What is delivered back is the first run again.
    storage.delete(f"raw/{MONTH}/")
    deliver(storage)
    assert run_of(storage).id == before.id


OTHER_SETTINGS = {
    **{field.name: field.default + 1 for field in dataclasses.fields(Config) if type(field.default) is int},
    "bigquery_location": "EU",
    "csv_newlines_in_values": False,
    "csv_encoding": "latin-1",
    "encoder_refresh": "never",
    "encoder_backbone": "MobileNetV3Small small.weights.h5",
    "train_mode": "scratch",
    "train_negatives": 0.5,
    "ingest_ready": "quiet 1s",
    "max_reject_share": 0.5,
    "max_ne_loss": 0.01,
    "require_promotion": True,
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_settings_that_affect_the_model_are_another_run(storage: Folder, name: str) -> None:
    changed = run_of(storage, **{name: OTHER_SETTINGS[name]}).id != run_of(storage).id
    assert changed == (name in Config(storage.uri).affecting_model())


def test_another_contract_is_another_run(storage: Folder, tmp_path: pathlib.Path) -> None:
    text = contracts.DEFAULT.read_text()
    same, other = tmp_path / "same.pbtxt", tmp_path / "other.pbtxt"
    same.write_text("# the same, elsewhere\n" + text)
    other.write_text(text.replace("max: 23", "max: 22"))
    assert run_of(storage, contract=str(same)).id == run_of(storage).id != run_of(storage, contract=str(other)).id


def test_other_code_is_another_run(storage: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_of(storage).id
    monkeypatch.setattr(runs, "source_digest", lambda: "other")
    assert run_of(storage).id != before


# --- what is prepared ---------------------------------------------------------------------------------------------------------------------


def listed(run: MonthRun) -> list[tuple[str, int, str]]:
    batches = list(read_parquet(run.storage, run.inputs["listing"]))
    assert all(batch.schema.equals(LISTING) for batch in batches)
    return [tuple(row.values()) for row in pa.Table.from_batches(batches, LISTING).to_pylist()]


@pytest.mark.parametrize("images", [IMAGES, {}])
def test_the_images_are_listed(tmp_path: pathlib.Path, images: dict[str, bytes]) -> None:
    storage = Folder(str(tmp_path))
    deliver(storage, images=images)
    assert listed(run_of(storage)) == [(name, len(data), crc32c(data)) for name, data in images.items()]


def test_a_resumed_run_keeps_what_the_first_laid_down(storage: Folder) -> None:
    first = run_of(storage)
    before = {name: storage.read(name) for name in storage.names(first.folder)}
    assert len(before) == 3
    again = run_of(storage)
    assert again == first and {name: storage.read(name) for name in storage.names(first.folder)} == before
    inputs = json.loads(before[f"{first.folder}/inputs.json"])
    assert inputs["ads"] == [[name, len(data), crc32c(data)] for name, data in ADS.items()]
    assert inputs["images"]["count"] == 2 and inputs["images"]["bytes"] == 6


@pytest.mark.parametrize("ads", [{}, {"a.txt": b"x"}, {"a.csv.zip": b"x"}])
def test_a_month_without_ads_is_an_error(tmp_path: pathlib.Path, ads: dict[str, bytes]) -> None:
    storage = Folder(str(tmp_path))
    deliver(storage, ads=ads)
    with pytest.raises(StageError, match=rf"month {MONTH} has no ads: expected \*\.csv or \*\.csv\.gz in {tmp_path}/raw/{MONTH}/ads"):
        run_of(storage)
    assert not storage.names("runs/")


@pytest.mark.parametrize("month", ["2026-13", "2026-1", "october", "../2026-10"])
def test_what_is_no_month_is_an_error(storage: Folder, month: str) -> None:
    with pytest.raises(ValueError, match="expected YYYY-MM"):
        run_of(storage, month)


# --- champion -----------------------------------------------------------------------------------------------------------------------------

CHAIN = [Champion("e1", f"{month}-r", month, "r") for month in ("2026-08", "2026-09", "2026-10")]


def promote(storage: Storage, chain: list[Champion]) -> None:
    """Each refreshed from the one before it; the last is champion."""
    for parent, champion in zip([None, *chain], chain, strict=False):
        info = {"month": champion.month, "parent": dataclasses.asdict(parent) if parent else None}
        lake.commit(storage, lake.model_folder("ranker", champion.ranker), Manifest("ranker", (), info))
        trained = {"training": {"mode": "scratch"}, "month": champion.month, "format": FORMAT}
        lake.commit(storage, lake.model_folder("encoder", champion.encoder), Manifest("encoder", (), trained))
        lake.move_pointer(storage, CHAMPION, champion)


@pytest.mark.parametrize(
    ("month", "expected"),
    [("2027-01", CHAIN[2]), ("2026-11", CHAIN[2]), ("2026-10", CHAIN[1]), ("2026-09", CHAIN[0]), ("2026-08", None), ("2025-01", None)],
)
def test_the_champion_is_the_one_before_the_month(storage: Folder, month: str, expected: Champion | None) -> None:
    promote(storage, CHAIN)
    assert champion_before(storage, month) == expected


def test_a_month_that_kept_the_champion_hands_on_that_one(storage: Folder) -> None:
    promote(storage, CHAIN)
    # A later run of the last month found its own model worse, and was scored with the one before.
    lake.move_pointer(storage, CHAMPION, Champion("e1", CHAIN[1].ranker, "2026-10", "late"))
    for month, ranker in (("2026-11", CHAIN[1].ranker), ("2026-10", CHAIN[1].ranker), ("2026-09", CHAIN[0].ranker)):
        champion = champion_before(storage, month)
        assert champion is not None and champion.ranker == ranker


def test_an_untrained_encoder_is_not_gone_on_with(storage: Folder) -> None:
    lake.commit(storage, lake.model_folder("encoder", "e1"), Manifest("encoder", (), {"training": {"mode": "untrained"}, "format": FORMAT}))
    promote(storage, CHAIN[:1])
    run = run_of(storage)
    assert run.champion == CHAIN[0] and run.encoder == run.version


@pytest.mark.parametrize(
    ("setting", "embedded", "due"),
    [
        ("never", {"2026-08": 10, "2026-09": 1000}, False),
        ("months 3", {}, False),
        ("months 2", {}, True),
        ("drift", {"2026-08": 100, "2026-09": 50}, False),
        ("drift", {"2026-08": 100, "2026-09": 51}, True),
        # What this month has brought, if it is run again, must not change the run.
        ("drift", {"2026-08": 100, "2026-10": 51}, False),
    ],
)
def test_an_encoder_is_trained_anew_when_it_is_due(storage: Folder, setting: str, embedded: dict[str, int], due: bool) -> None:
    promote(storage, CHAIN[:2])
    for month, rows in embedded.items():
        folder = lake.embeddings_folder("e1", month, "r") + "/packs"
        lake.commit(storage, folder, Manifest("packs", (lake.Receipt("p", f"{folder}/p.parquet", rows),), {}))
    run = run_of(storage, encoder_refresh=setting)
    assert run.champion == CHAIN[1]
    assert run.encoder == (run.version if due else "e1")


def test_without_a_champion_the_encoder_is_its_own(storage: Folder) -> None:
    assert champion_before(storage, MONTH) is None
    run = run_of(storage)
    assert run.champion is None and run.encoder == run.version == f"{MONTH}-{run.id}"


def test_a_run_that_promotes_its_model_stays_the_same_run(storage: Folder) -> None:
    promote(storage, CHAIN[:1])
    before = run_of(storage)
    assert before.champion == CHAIN[0] and before.encoder == "e1"
    promote(storage, [CHAIN[0], Champion("e1", before.version, MONTH, before.id)])
    assert lake.read_pointer(storage, CHAMPION, Champion)[0] != before.champion
    assert run_of(storage) == before
    promote(storage, [CHAIN[0], Champion("e1", "2026-11-r", "2026-11", "r")])
    assert run_of(storage) == before


def test_another_champion_is_another_run(storage: Folder) -> None:
    before = run_of(storage).id
    promote(storage, CHAIN[:1])
    assert run_of(storage).id != before


# --- window -------------------------------------------------------------------------------------------------------------------------------

SAME = contracts.load(contracts.DEFAULT).fingerprint


def published(storage: Storage, month: str, run: str, at: int, contract: str = SAME) -> None:
    lake.note_publication(storage, lake.Publication(f"2026-11-{at:02d}T00:00:00+00:00", month, run, contract, 7, ""))


@pytest.mark.parametrize(
    ("runs_published", "window_months", "expected"),
    [
        ([], 3, ()),
        ([("2026-08", "a", 1), ("2026-09", "b", 2)], 3, (("2026-08", "a"), ("2026-09", "b"))),
        ([("2026-08", "a", 1), ("2026-09", "b", 2)], 2, (("2026-09", "b"),)),
        ([("2026-08", "a", 1), ("2026-09", "b", 2)], 1, ()),
        ([("2026-08", "a", 1), ("2026-07", "b", 2), ("2026-10", "c", 3), ("2026-11", "d", 4)], 3, (("2026-08", "a"),)),
        ([("2026-09", "z", 1), ("2026-09", "b", 3), ("2026-09", "c", 2)], 3, (("2026-09", "b"),)),
        # Published again after another, it is what counts.
        ([("2026-09", "a", 1), ("2026-09", "b", 2), ("2026-09", "a", 3)], 3, (("2026-09", "a"),)),
        ([("2026-09", "a", 1), ("2026-09", "b", 2, "other")], 3, (("2026-09", "a"),)),
        ([("2026-08", "a", 1), ("2026-09", "b", 2, "other")], 3, (("2026-08", "a"),)),
    ],
)
def test_window(storage: Folder, runs_published: list[tuple], window_months: int, expected: tuple[tuple[str, str], ...]) -> None:
    for told in runs_published:
        published(storage, *told)
    storage.write("publish/2026-09/unfinished/staging.parquet", b"not complete")
    run = run_of(storage, window_months=window_months)
    assert run.earlier == expected and run.window == (*expected, (MONTH, run.id))


def test_another_run_in_the_window_is_another_run(storage: Folder) -> None:
    ids = [run_of(storage).id]
    for at, run in enumerate(("a", "b")):
        published(storage, "2026-09", run, at + 1)
        ids.append(run_of(storage).id)
    assert len(set(ids)) == 3


def test_a_stage_that_is_not_complete_is_named(storage: Folder) -> None:
    run = run_of(storage)
    with pytest.raises(StageError, match=rf"rows/{MONTH}/{run.id} is not complete; run `adstocrat ingest {MONTH}` first"):
        run.manifest(run.stage("rows"))


def test_a_file_whose_name_is_no_text_is_left_out(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an archive that was packed elsewhere leaves them; no row could name it."""
    caplog.set_level("INFO")
    write_months(Folder(str(tmp_path)), ["2026-08"], 20, 20, 0, lambda line: None)
    run = prepare(Config(lake=str(tmp_path)), "2026-08")
    for folder, name in ((raw_images("2026-08"), b"caf\xe9.jpg"), (raw_ads("2026-08"), b"caf\xe9.csv")):
        pathlib.Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), folder.encode(), name))).write_bytes(b"x")
    assert prepare(Config(lake=str(tmp_path)), "2026-08").id == run.id
    assert r"caf\udce9.jpg' is left out: its name is not UTF-8" in caplog.text and r"caf\udce9.csv' is left out" in caplog.text


# --- the champion of half a year ago ------------------------------------------------------------------------------------------------------


def judged(storage: Storage, month: str, ranker: str, at: int = 1, contract: str = SAME, run: str = "r") -> None:
    """A month that was published, scored with that ranker."""
    lake.commit(storage, lake.stage_folder("evaluation", month, run), Manifest("evaluate", (), {"encoder": "e", "ranker": ranker}))
    lake.commit(
        storage, lake.model_folder("ranker", ranker), Manifest("ranker", (), {"contract": contract, "month": month, "parent": None})
    )
    published(storage, month, run, at)


@pytest.mark.parametrize(
    ("months", "expected"),
    [
        ({}, None),
        ({"2026-09": "now"}, None),
        ({"2026-08": "a", "2026-09": "now"}, ("2026-08", "a")),
        ({"2026-03": "z", "2026-04": "a", "2026-05": "b", "2026-09": "now"}, ("2026-04", "a")),
        ({"2026-03": "z", "2026-09": "now"}, ("2026-03", "z")),
        ({"2025-12": "y", "2026-02": "z", "2026-05": "b", "2026-09": "now"}, ("2026-02", "z")),
        # What was champion then is champion still.
        ({"2026-04": "now", "2026-05": "b", "2026-09": "now"}, None),
    ],
)
def test_the_champion_of_half_a_year_ago(storage: Folder, months: dict[str, str], expected: tuple[str, str] | None) -> None:
    for at, (month, ranker) in enumerate(months.items()):
        judged(storage, month, ranker, at + 1)
    found = earlier_champion(storage, contracts.load(contracts.DEFAULT), MONTH, Champion("e", "now", "2026-09", "r"))
    assert (found and (found.month, found.ranker)) == expected


def test_of_half_a_year_ago_counts_what_is_kept_and_of_this_contract(storage: Folder) -> None:
    judged(storage, "2026-04", "other contract", 1, contract="other")
    judged(storage, "2026-05", "gone", 2)
    storage.delete("models/ranker/gone/")
    judged(storage, "2026-06", "first", 3)
    judged(storage, "2026-06", "last", 4, run="again")
    found = earlier_champion(storage, contracts.load(contracts.DEFAULT), MONTH, Champion("e", "now", "2026-09", "r"))
    assert found == Champion("e", "last", "2026-06", "again")


def test_the_champion_of_half_a_year_ago_is_part_of_the_run(storage: Folder) -> None:
    promote(storage, CHAIN[:1])
    before = run_of(storage)
    judged(storage, "2026-05", "old")
    after = run_of(storage)
    assert before.earlier_champion is None and after.earlier_champion == Champion("e", "old", "2026-05", "r") and after.id != before.id


def test_a_backbones_weights_are_a_file_of_the_lake(storage: Folder) -> None:
    run = run_of(storage, encoder_backbone="MobileNetV3Small backbones/small.weights.h5")
    with pytest.raises(StageError, match=r"backbones/small.weights.h5 is not there"), train._backbone(run):
        pass
    storage.write("backbones/small.weights.h5", b"weights")
    with train._backbone(run) as backbone:
        assert backbone and backbone[0] == "MobileNetV3Small" and backbone[1].read_bytes() == b"weights"
    with train._backbone(run_of(storage)) as backbone:
        assert backbone is None
