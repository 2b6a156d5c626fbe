"""Small months of every shape through the command: what is odd about a delivery must not keep it from being scored."""

import datetime
import io
import pathlib
import random
from collections import Counter

import pyarrow as pa
import pytest
from PIL import Image
from webhook import webhook

from beam_jobs.cli import main
from beam_jobs.jobs import connect
from schemas import contract as contracts
from schemas import lake
from schemas.contract import Column, Contract
from schemas.lake import Champion, Current
from schemas.parquet import read_parquet
from schemas.storage import Folder, Storage, open_storage

AUGUST, SEPTEMBER = "2026-08", "2026-09"
KEY = Column("id", "bytes", frozenset({"key"}), required=True)
IMAGE = Column("image", "bytes", frozenset({"image"}))
DEVICE = Column("device", "bytes")
BID, BID_NAME = Column("bid", "float"), Column("bid", "bytes")
CLICKED = Column("clicked", "int", frozenset({"clicked"}))


def deliver(storage: Storage, month: str, rows: int = 400, images: int = 20, labelled: bool = True, more: str = "") -> None:
    """Rows with a click for every fifth, and pictures of one colour each."""
    rng = random.Random(month)
    lines = ["id,image,device,bid,clicked"]
    lines += [
        f"k{i},i{i % images if images else 0}.png,{rng.choice('ab')},{rng.random():.3f},{int(i % 5 == 0) if labelled else ''}"
        for i in range(rows)
    ]
    storage.write(lake.raw_ads(month) + "ads.csv", "\n".join([*lines, more]).encode())
    for i in range(images):
        data = io.BytesIO()
        Image.new("RGB", (80, 40), (10 * i, 255 - 10 * i, 77)).save(data, "PNG")
        storage.write(f"{lake.raw_images(month)}i{i}.png", data.getvalue())


def run(storage: Storage, tmp_path: pathlib.Path, month: str, *columns: Column, flags: tuple[str, ...] = ()) -> int:
    path = tmp_path / f"contract-{len(columns)}-{month}.pbtxt"
    path.write_text(contracts.dumps(Contract(columns)))
    return main(["month", month, "--lake", storage.uri, "--contract", str(path), *flags])


def scores(storage: Storage) -> pa.Table:
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    assert current is not None
    manifest = lake.read_manifest(storage, lake.stage_folder("scores", current.month, current.run))
    assert manifest is not None
    return pa.Table.from_batches([batch for file in manifest.files for batch in read_parquet(storage, file)])


@pytest.mark.parametrize(
    ("columns", "images", "rows", "statuses"),
    [
        ((KEY, DEVICE, BID, CLICKED), 20, 400, {"no_image": 400}),
        ((KEY, IMAGE, DEVICE, CLICKED), 0, 400, {"missing": 400}),
        ((KEY, IMAGE, CLICKED), 20, 400, {"ok": 400}),
        ((KEY, CLICKED), 20, 400, {"no_image": 400}),
        ((KEY, IMAGE, DEVICE, BID, CLICKED), 1, 30, {"ok": 30}),
    ],
    ids=["no image column", "no images delivered", "no features", "nothing but a key", "one image, few rows"],
)
def test_whatever_a_month_lacks_it_is_scored(
    tmp_path: pathlib.Path,
    columns: tuple[Column, ...],
    images: int,
    rows: int,
    statuses: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = Folder(str(tmp_path / "lake"))
    deliver(storage, AUGUST, rows, images)
    for _ in range(2):
        assert run(storage, tmp_path, AUGUST, *columns) == 0
        assert caplog.messages[-1].endswith("balanced")
    table = scores(storage)
    assert Counter(table["image_status"].to_pylist()) == statuses
    assert all(0 < p < 1 for p in table["p_click"].to_pylist())


def test_a_changed_contract_after_a_gap_starts_from_scratch_and_is_published(tmp_path: pathlib.Path) -> None:
    """What both have is compared all the same, but not how much came and went, nor what is not what it was."""
    storage, october = Folder(str(tmp_path / "lake")), "2026-10"
    for month, columns in ((AUGUST, (KEY, IMAGE, DEVICE, BID, CLICKED)), (october, (KEY, IMAGE, DEVICE, BID_NAME, CLICKED))):
        deliver(storage, month, more="" if month == AUGUST else "\n".join(f"n{i},i0.png,c,0.5,0" for i in range(200)))
        assert run(storage, tmp_path, month, *columns) == 0
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
    assert current is not None and current.month == october
    assert champion is not None and champion.ranker == f"{october}-{current.run}" and champion.encoder.startswith(AUGUST)
    drifted = storage.read_json(f"{lake.run_folder(october, current.run)}/drift.json")
    assert drifted["previous"] == AUGUST and not {"churn", "bid"} & {
        row[name] for row in drifted["compared"] for name in ("kind", "column")
    }
    assert any(told.startswith("drift device (c)") and f"last month; last month: {AUGUST}" in told for told in drifted["alarms"])


def test_a_month_with_nothing_to_learn_from_is_scored_with_the_champion(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: that its outcomes are missing is an alarm, which stops it where the settings say so, and a webhook is told."""
    storage = Folder(str(tmp_path / "lake"))
    columns = (KEY, IMAGE, DEVICE, CLICKED)
    deliver(storage, AUGUST)
    deliver(storage, SEPTEMBER, labelled=False)
    assert run(storage, tmp_path, SEPTEMBER, *columns, flags=("--window-months", "1")) == 1
    assert not storage.names("models/")
    assert run(storage, tmp_path, SEPTEMBER, *columns, flags=("--monitor-stop", "mising")) == 2
    # An encoder is due, too.
    flags = ("--window-months", "1", "--encoder-refresh", "months 1")
    with webhook() as (url, told):
        assert run(storage, tmp_path, AUGUST, *columns, flags=("--notify", url)) == 0
        assert run(storage, tmp_path, SEPTEMBER, *columns, flags=(*flags, "--notify", url, "--monitor-stop", "missing")) == 4
        # So it stays, until somebody says otherwise.
        assert run(storage, tmp_path, SEPTEMBER, *columns, flags=(*flags, "--monitor-stop", "missing")) == 4
        current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
        assert current is not None and current.month == AUGUST and not storage.names(f"models/ranker/{SEPTEMBER}")
    assert run(storage, tmp_path, SEPTEMBER, *columns, flags=(*flags, "--notify", url)) == 0
    published, stopped = told
    expected = {"event": "published", "month": AUGUST, "run": current.run, "lake": storage.uri, "status": 0, "why": None, "alarms": []}
    assert published == expected
    assert (stopped["event"], stopped["month"], stopped["status"]) == ("stopped", SEPTEMBER, 4)
    assert stopped["alarms"][0].startswith("missing clicked: 100.0%") and "missing clicked: 100.0%" in stopped["why"]
    # The alarms come first in the summary; and nobody is there to be told of it.
    assert f"127.0.0.1 was not told how {SEPTEMBER} ended" in caplog.messages[-1] and caplog.messages[-2].endswith("balanced")
    told_last, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    assert storage.read_json(f"{lake.run_folder(SEPTEMBER, told_last.run)}/report.json")["alarms"] == stopped["alarms"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[next(i for i, line in enumerate(shown) if "! missing clicked: 100.0%" in line) - 1].startswith(f"{SEPTEMBER} is ")
    assert "champion kept: nothing could be learnt from 2026-09" in caplog.text
    assert {version[:7] for version in scores(storage)["model_version"].to_pylist()} == {AUGUST}
    champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
    assert champion is not None and champion.month == SEPTEMBER and champion.ranker.startswith(AUGUST)


def test_a_run_that_is_published_again_is_what_is_there(cloud: dict[str, str], tmp_path: pathlib.Path) -> None:
    """A file comes late and is taken back: BigQuery, lookup and champion follow each time; and a segment comes in later."""
    storage, dataset = open_storage("gs://adstocrat/again"), f"{cloud['GOOGLE_CLOUD_PROJECT']}.again"
    late = lake.raw_ads(AUGUST) + "late.csv"
    columns = (KEY, IMAGE, DEVICE, CLICKED)
    deliver(storage, AUGUST)
    seen = []
    for delivered in (False, True, False):
        if delivered:
            storage.write(late, b"id,image,device,clicked\nlate,i1.png,a,0\n")
        else:
            storage.delete(late)
        assert run(storage, tmp_path, AUGUST, *columns, flags=("--dataset", dataset)) == 0
        client = connect(dataset.partition(".")[0], "US")
        (row,) = client.query(f"SELECT COUNT(*) AS n, MIN(run_id) AS first, MAX(run_id) AS last FROM `{dataset}.scores`").result()
        current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
        champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
        assert current is not None and champion is not None
        assert (row["n"], row["first"], row["last"]) == (400 + delivered, current.run, current.run) and champion.run == current.run
        seen.append(current.run)
    assert seen[0] == seen[2] != seen[1]
    assert lake.publications(storage, AUGUST)[-1].run == seen[0]

    segment = Column("device", "bytes", frozenset({"segment"}))
    assert run(storage, tmp_path, AUGUST, KEY, IMAGE, segment, CLICKED, flags=("--dataset", dataset)) == 0
    rows = client.query(f"SELECT month, device, COUNT(*) AS n FROM `{dataset}.scores` GROUP BY month, device ORDER BY device").result()
    found = [(row["month"], row["device"]) for row in rows]
    assert found == [(datetime.date(2026, 8, 1), "a"), (datetime.date(2026, 8, 1), "b")]

    def status() -> str:
        return str(storage.read_json(f"{lake.run_folder(AUGUST, seen[0])}/report.json")["status"])

    # Its page said that another was published in its place; a contract is not asked for again.
    assert main(["report", seen[0], "--lake", storage.uri]) == 0 and status() == "replaced"
    assert main(["rollback", AUGUST, "--to", seen[0], "--lake", storage.uri]) == 0 and status() == "published"
    assert main(["publish", AUGUST, "--lake", storage.uri, "--dataset", dataset]) == 0
    assert lake.publications(storage, AUGUST)[-1].run == seen[0]
