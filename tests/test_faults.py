"""Storage that fails now and then, and bundles that fail once: what is done again comes to the same.

Requests are made again, pointers move by compare-and-swap, only new images are fetched, and only what manifests list counts.

At full size where ADSTOCRAT_LONG is set, at about a tenth of it otherwise.
"""

import http.client
import io
import json
import os
import pathlib
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar
from unittest import mock
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.worker.bundle_processor import BundleProcessor
from PIL import Image
from proxy import Proxy, first, per_hundred, running, untouched
from test_end_to_end import published_table

from beam_jobs import ingest, ledger, runner
from beam_jobs import month as months
from beam_jobs.config import Config
from beam_jobs.run import MonthRun, prepare
from beam_jobs.runs import garbage
from schemas import lake, retries, storage
from schemas.lake import CHAMPION, CURRENT, Champion, Current, Manifest, Receipt
from schemas.sample import write_months
from schemas.storage import Bucket, Folder, Storage, open_storage

LONG = bool(os.environ.get("ADSTOCRAT_LONG"))
MONTHS = ["2026-08", "2026-09", "2026-10"] if LONG else ["2026-08"]
ADS, CREATIVES = (4000, 300) if LONG else (600, 60)
RACES = 200 if LONG else 20
IMAGES = 2000 if LONG else 200
READS = {"503": 5, "reset": 2, "truncated": 1}
DATA = os.urandom(100_000)
Made = TypeVar("Made")
# A lake, and the table that each month published.
Published = tuple[Storage, list[dict[str, dict[str, Any]]]]


@pytest.fixture
def proxy(cloud: dict[str, str]) -> Iterator[Proxy]:
    """A proxy in front of the local cloud's storage, and this process's environment pointing at it."""
    with running(cloud["STORAGE_EMULATOR_HOST"]) as proxy, mock.patch.dict(os.environ, STORAGE_EMULATOR_HOST=proxy.url):
        storage._client.cache_clear()
        retries.take_retries()
        yield proxy
    storage._client.cache_clear()
    retries.take_retries()


@pytest.fixture
def bucket(proxy: Proxy, tmp_path: pathlib.Path) -> Storage:
    """A lake behind the proxy with two objects."""
    bucket = open_storage(f"gs://adstocrat/{tmp_path.name}")
    for name in ("a", "b/c"):
        bucket.write(name, DATA)
    return bucket


# --- One request at a time ---


def local(bucket: Storage, name: str) -> bytes:
    with bucket.local(name) as path:
        return path.read_bytes()


def stream(bucket: Storage, name: str) -> bytes:
    with bucket.open(name) as opened:
        assert opened.seek(10) == 10
        return opened.read()


PASSING = ("503", "429", "reset", "lost", "truncated")
READING: dict[str, tuple[Callable[[Storage], Any], Any]] = {
    "read": (lambda bucket: bucket.read("a"), DATA),
    "range": (lambda bucket: bucket.read("a", 7, 1000), DATA[7:1007]),
    "stream": (lambda bucket: stream(bucket, "a"), DATA[10:]),
    "local": (lambda bucket: local(bucket, "a"), DATA),
    "names": (lambda bucket: bucket.names(""), ["a", "b/c"]),
    "entries": (lambda bucket: [entry.size for entry in bucket.entries("b/")], [len(DATA)]),
    "versioned": (lambda bucket: bucket.read_versioned("a")[0], DATA),
}


@pytest.mark.parametrize(
    ("how", "fault"),
    # A listing may take its time.
    [(how, fault) for how in READING for fault in (*PASSING, *(["stall"] if how not in ("names", "entries") else []))],
)
def test_a_read_that_fails_is_made_again(bucket: Storage, proxy: Proxy, how: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT", (5.0, 0.2))
    read, expected = READING[how]
    proxy.plan = first(fault)
    assert read(bucket) == expected
    assert retries.take_retries() == {"retries": 1} and proxy.faults == {fault: 1}


@pytest.mark.parametrize("how", ["read", "range", "local", "stream", "names"])
def test_a_body_that_is_cut_where_it_says_that_it_is_whole_is_read_again(bucket: Storage, proxy: Proxy, how: str) -> None:
    read, expected = READING[how]
    # The stream's first request is for what is known of the object.
    proxy.plan = lambda method, before: "cut" if before == (how == "stream") else ""
    assert read(bucket) == expected
    assert proxy.faults == {"cut": 1}


def test_bytes_of_a_stream_that_stop_coming_are_asked_for_again(bucket: Storage, proxy: Proxy) -> None:
    proxy.plan = lambda method, before: {1: "truncated", 2: "reset", 3: "503"}.get(before, "")
    with bucket.open("a") as opened:
        assert opened.read() == DATA
    assert retries.take_retries() == {"retries": 3}


@pytest.mark.parametrize("fault", PASSING)
def test_a_write_that_fails_is_made_again(bucket: Storage, proxy: Proxy, fault: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "small").write_bytes(DATA)
    # So large that it is uploaded in more than one request.
    (tmp_path / "large").write_bytes(bytes(9 << 20))
    _, version = bucket.read_versioned("a")
    writes: list[tuple[Callable[[], Any], Any]] = [
        (lambda: bucket.write("w", DATA), None),
        (lambda: bucket.upload(tmp_path / "small", "u"), None),
        (lambda: bucket.upload(tmp_path / "large", "v"), None),
        (lambda: bucket.create("c", DATA), True),
        (lambda: bucket.create("c", DATA), False),
        (lambda: bucket.swap("a", version, b"moved"), True),
        (lambda: bucket.swap("a", version, b"moved"), False),
        (lambda: bucket.swap("new", None, b"moved"), True),
        (lambda: bucket.delete("b/"), None),
    ]
    for write, answer in writes:
        proxy.plan = first(fault)
        assert write() is answer
        assert retries.take_retries()["retries"] >= 1
    assert bucket.names("") == ["a", "c", "new", "u", "v", "w"]
    assert bucket.read("u") == bucket.read("w") == bucket.read("c") == DATA
    assert bucket.read("v") == bytes(9 << 20) and bucket.read("a") == bucket.read("new") == b"moved"


def test_a_write_that_another_s_equal_one_came_before_is_not_taken_for_it(bucket: Storage, proxy: Proxy) -> None:
    """Both write the same bytes; the one that was refused must not think that its answer was lost."""
    _, version = bucket.read_versioned("a")

    def overtaken(method: str, before: int) -> str:
        if (method, before) != ("POST", 0):
            return ""
        proxy.plan = untouched
        assert bucket.swap("a", version, b"same")
        return "reset"

    proxy.plan = overtaken
    assert not bucket.swap("a", version, b"same")


def test_what_stays_refused_is_told_at_once_and_in_words(bucket: Storage, proxy: Proxy, tmp_path: pathlib.Path) -> None:
    proxy.plan = lambda method, before: "403"
    for request in (lambda: bucket.names(""), lambda: bucket.read("a"), lambda: bucket.open("a"), lambda: bucket.create("x", b"")):
        with pytest.raises(
            PermissionError, match=rf"{bucket.uri}.* may not be used: expected .* on gs://adstocrat, or name another --lake"
        ):
            request()
    proxy.plan = untouched
    other = open_storage("gs://never-made/lake")
    for request in (lambda: other.names(""), lambda: other.write("a", b""), lambda: other.swap("a", None, b"")):
        with pytest.raises(FileNotFoundError, match=r"^gs://never-made/lake lies in no bucket: expected gs://never-made to exist; create"):
            request()
    assert not retries.take_retries()


def test_a_server_that_stays_away_is_told_in_words(bucket: Storage, proxy: Proxy) -> None:
    proxy.plan = lambda method, before: "503"
    with mock.patch.object(retries, "RETRY_SECONDS", 0.5), pytest.raises(TimeoutError, match=f"{bucket.uri}/a cannot be reached"):
        bucket.read("a")


def test_a_retry_draws_nothing_that_a_training_would_draw(bucket: Storage, proxy: Proxy) -> None:
    """Both in one process: a model must not depend on whether its rows came at the first try."""
    proxy.plan = first("503")
    random.seed(1)
    assert bucket.read("a") == DATA
    drawn = random.random()
    random.seed(1)
    assert drawn == random.random() and retries.take_retries() == {"retries": 1}


def test_the_plan_keeps_its_shares() -> None:
    plan = per_hundred(3, READS, {"lost": 4}, stall=70)
    faults = [Counter(plan(method, n) for n in range(1000)) for method in ("GET", "POST")]
    assert faults[0]["stall"] == 1 and sum(faults[0][fault] for fault in ("", "stall")) >= 920
    assert all(0 <= 10 * READS[fault] - faults[0][fault] <= 1 for fault in READS)
    assert faults[1] == {"": 960, "lost": 40}
    assert [plan("GET", n) for n in range(200)] == [per_hundred(3, READS, stall=70)("GET", n) for n in range(200)]


# --- Whole months ---


def months_of(
    cloud: dict[str, str], name: str, begin: Callable[[int], Any] = lambda number: None, ended: Callable[[MonthRun], Any] = lambda run: None
) -> Published:
    """Run the sample's months, with some bad rows, in a lake and a dataset of that name: the lake, and each month's published table.

    Args:
        begin: called with each month's number before it runs.
        ended: called when it ran.
    """
    place, dataset = open_storage(f"gs://adstocrat/{name}"), f"{cloud['GOOGLE_CLOUD_PROJECT']}.{name}"
    write_months(place, MONTHS, ADS, CREATIVES, 0, lambda line: None)
    for i, month in enumerate(MONTHS):
        ads = place.names(lake.raw_ads(month))[0]
        bad = b"bad-1,adv,cmp\nbad-2,adv,cmp,banner,slot01,mobile,3,0.5,2,../escape.jpg,10,0\n"
        place.write(ads, place.read(ads) + bad)
        place.write(f"{lake.raw_images(month)}broken.jpg", b"no picture")
        begin(i)
        # What came after the ledger of the month before is no part of this one's.
        retries.take_retries()
        # In parts, so that what they reject is put together.
        with mock.patch.object(ingest, "SPLIT_BYTES", 10_000):
            run = prepare(Config(lake=place.uri, dataset=dataset, csv_newlines_in_values=False), month)
            months.run_month(run, [])
        ended(run)
        assert lake.read_pointer(place, CURRENT, Current)[0] == Current(month, run.id)
        taken = place.read_json(f"{run.folder}/ledger.json")
        assert taken["balanced"] and taken["rejected"] == {"field_count": 1, "image_outside_month": 1}
    return place, [published_table(dataset, month) for month in MONTHS]


@pytest.fixture(scope="module")
def faultless(cloud: dict[str, str]) -> Published:
    """The months without a fault."""
    place, tables = months_of(cloud, "faultless", ended=lambda run: retries_of(run, 0))
    assert [len(table) for table in tables] == [ADS for _ in MONTHS]
    return place, tables


def retries_of(run: MonthRun, expected: int) -> None:
    """The ledger tells of so many requests that were made again."""
    taken = run.storage.read_json(f"{run.folder}/ledger.json")
    assert taken["counts"].get("retries", 0) == expected
    assert ("requests made again" in ledger.show(taken)) == (expected > 0)


def test_a_month_behind_faults_publishes_the_same_table_and_tells_of_its_retries(
    cloud: dict[str, str], faultless: Published, proxy: Proxy
) -> None:
    def begin(number: int) -> None:
        proxy.seen.clear()
        proxy.plan = per_hundred(number, READS, stall=None if number else 20)

    def end(run: MonthRun) -> None:
        proxy.plan = untouched
        # Every fault until the ledger was written is one request made again.
        last = next(n for n, seen in enumerate(proxy.seen) if seen.method == "POST" and seen.name.endswith("/ledger.json"))
        retries_of(run, sum(bool(seen.fault) for seen in proxy.seen[:last]))
        assert proxy.faults.keys() == {*READS, *(["stall"] if run.month == MONTHS[0] else [])}
        assert run.manifest(run.stage("creatives") + "/packs").count("retries") > 0

    place, tables = months_of(cloud, "faulty", begin, end)
    same_published(faultless, (place, tables))


def same_published(one: Published, other: Published) -> None:
    """Both published the same tables, run ids too, and their pointers are the same."""
    assert one[1] == other[1]
    for pointer, kind in ((CHAMPION, Champion), (CURRENT, Current)):
        found = [lake.read_pointer(place, pointer, kind)[0] for place, _ in (one, other)]
        assert found[0] == found[1]


# --- Bundles that fail ---


class ForcedError(RuntimeError):
    """What a bundle fails with once it is done."""


class FailingRunner(FnApiRunner):
    """The local runner, where every bundle of every stage fails once, when it has done and written all; what it put out is thrown away.

    Attributes:
        failing: whether the bundle that runs is to fail.
        failed: names of the transforms in the bundles that did.
    """

    failing = False
    failed: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        super().__init__(bundle_repeat=1)

    def _run_bundle_multiple_times_for_testing(self, *arguments: Any) -> None:
        FailingRunner.failing = True
        try:
            with pytest.raises(ForcedError):
                super()._run_bundle_multiple_times_for_testing(*arguments)
        finally:
            FailingRunner.failing = False


def process_and_fail(bundle: BundleProcessor, *arguments: Any) -> Any:
    """As the worker's own, but for the bundles that are to fail."""
    done = PROCESS_BUNDLE(bundle, *arguments)
    if FailingRunner.failing:
        FailingRunner.failed |= {
            part for each in bundle.process_bundle_descriptor.transforms.values() for part in each.unique_name.split("/")
        }
        raise ForcedError
    return done


PROCESS_BUNDLE = BundleProcessor.process_bundle
# The steps that write to the lake.
WRITING = {"ReadRows", "NumberRejects", "Spill", "WriteRows", "FetchAndDecode", "WriteIndex", "Train", "WriteEmbeddings", "WriteShards"}
WRITING |= {"Decide", "WriteScores", "WriteShard", "CreateManifest"}


def test_bundles_that_fail_once_they_have_written_leave_nothing_that_counts(
    cloud: dict[str, str], faultless: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is published, in all that it is made of; what failed bundles wrote is in no manifest, and all of it is garbage."""
    discarded: set[str] = set()
    unique = lake.unique

    def noted(folder: str, stem: str, suffix: str) -> str:
        name = unique(folder, stem, suffix)
        if FailingRunner.failing:
            discarded.add(name)
        return name

    monkeypatch.setattr(lake, "unique", noted)
    monkeypatch.setattr(runner, "FnApiRunner", FailingRunner)
    monkeypatch.setattr(BundleProcessor, "process_bundle", process_and_fail)
    repeated = months_of(cloud, "repeated")
    same_published(faultless, repeated)
    assert FailingRunner.failed >= WRITING

    contents: list[dict[str, Any]] = []
    for place, _ in (faultless, repeated):
        manifests = {
            name: lake.read_manifest(place, name.rpartition("/")[0]) for name in place.names("") if name.endswith("/manifest.json")
        }
        listed = {file for manifest in manifests.values() if manifest for file in manifest.files}
        # Not by unit, since that of embeddings names the pack; and a model's own files tell when they were written.
        contents.append(
            {
                name: sorted((receipt.rows, sorted(receipt.counts.items()), receipt.crc32c) for receipt in manifest.receipts)
                for name, manifest in manifests.items()
                if manifest and not name.startswith("models/")
            }
        )
    assert contents[0] == contents[1]

    # The manifests of a model and of the gate are written by the bundle itself: the first to write one counts, and the second is garbage.
    assert discarded and not {file for file in listed if not file.startswith(("models/", "evaluation/"))} & discarded
    made = {name for name in repeated[0].names("") if name.split("/")[0] not in ("raw", "truth", "runs", "publish")}
    made -= {name for name in made if name.startswith("statistics/") and "/units/" not in name}
    orphans = made - listed - manifests.keys() - {CHAMPION, CURRENT}
    of_stages = {"rows", "rejects", "creatives", "embeddings", "models", "evaluation", "scores", "lookup", "statistics"}
    assert {name.split("/")[0] for name in orphans} == of_stages
    assert set(garbage(repeated[0], 1)) == orphans


@pytest.mark.parametrize("complete", [False, True])
def test_packs_of_a_run_that_goes_stay_where_they_are_complete(tmp_path: pathlib.Path, complete: bool) -> None:
    place = Folder(str(tmp_path))
    for began, id in enumerate(("old", "new")):
        place.write(f"runs/2026-08/{id}/inputs.json", json.dumps({"created": f"{began}", "window": []}).encode())
        place.write(f"creatives/2026-08/{id}/packs/pack.parquet", b"")
    if complete:
        lake.commit(place, "creatives/2026-08/old/packs", Manifest("packs", (Receipt("pack", "creatives/2026-08/old/packs/pack.parquet"),)))
    gone = [*([] if complete else ["creatives/2026-08/old/packs/pack.parquet"]), "runs/2026-08/old/inputs.json"]
    assert garbage(place, 1) == gone


def each(act: Callable[[Made], None], all: Iterable[Made]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, all))


def deliver(place: Storage, month: str, first: int, images: int) -> None:
    """A month's rows, and images `first` and following, each of its own content."""
    noise = np.random.default_rng(first)

    def image(number: int) -> None:
        picture, data = Image.fromarray(noise.integers(0, 255, (8, 8, 3), np.uint8)).resize((160, 120)), io.BytesIO()
        picture.save(data, "JPEG", comment=str(number))
        place.write(f"{lake.raw_images(month)}{number:06d}.jpg", data.getvalue())

    each(image, range(first, first + images))
    names = "ad_id,advertiser,campaign,format,placement,device,hour,bid,position,image,impressions,clicks"
    rows = [f"ad-{n},adv,cmp,banner,slot01,mobile,3,0.5,2,{n:06d}.jpg,10,1" for n in range(first, first + images)]
    place.write(f"{lake.raw_ads(month)}{first}.csv", "\n".join([names, *rows]).encode())


def look_at(place: Storage, month: str) -> tuple[float, Manifest]:
    """Ingest the month and look at its images: how long the stage of creatives took, and its packs."""
    run = prepare(Config(lake=place.uri), month)
    ingest, creatives = (next(stage for stage in months.STAGES if stage.name == name) for name in ("ingest", "creatives"))
    months.run_stage(ingest, run, [])
    began = time.monotonic()
    months.run_stage(creatives, run, [])
    return time.monotonic() - began, run.manifest(run.stage("creatives") + "/packs")


def next_month(place: Storage, month: str, after: str, images: int) -> None:
    """The month after has what this one had, under the same names, and a tenth more images."""
    each(lambda name: place.write(name.replace(month, after), place.read(name)), place.names(f"raw/{month}/"))
    deliver(place, after, images, images // 10)


def test_a_month_fetches_exactly_its_new_images(proxy: Proxy, tmp_path: pathlib.Path) -> None:
    place = open_storage(f"gs://adstocrat/{tmp_path.name}")
    deliver(place, "2026-08", 0, IMAGES)

    def fetched(month: str) -> Counter[str]:
        proxy.seen.clear()
        look_at(place, month)
        images = f"{tmp_path.name}/raw/"
        return Counter(seen.name.rpartition("/")[2] for seen in proxy.seen if seen.media and "/images/" in seen.name.removeprefix(images))

    assert fetched("2026-08") == {f"{n:06d}.jpg": 1 for n in range(IMAGES)}
    next_month(place, "2026-08", "2026-09", IMAGES)
    assert fetched("2026-09") == {f"{n:06d}.jpg": 1 for n in range(IMAGES, IMAGES + IMAGES // 10)}


def creatives_seconds(place: Storage, month: str, new: int) -> float:
    """How long the stage takes in a month of which `new` images are new."""
    seconds, packs = look_at(place, month)
    assert packs.count("fetched") == new
    return seconds


if LONG:

    @pytest.mark.alone
    def test_the_creatives_of_a_month_cost_what_is_new(cloud: dict[str, str], tmp_path: pathlib.Path) -> None:
        """Without the proxy, which would take its share of the time."""
        warm, place = (open_storage(f"gs://adstocrat/{tmp_path.name}-{name}") for name in ("warm", "timed"))
        # What the stage costs whatever there is to do, once Beam is imported and its threads run.
        seconds = []
        for number, month in enumerate(lake.months_between("2026-08", "2026-11")):
            deliver(warm, month, 20 * number, 20)
            seconds.append(creatives_seconds(warm, month, 20))
        start_up = statistics.median(seconds[1:])
        deliver(place, "2026-08", 0, 10_000)
        all_new = creatives_seconds(place, "2026-08", 10_000)
        next_month(place, "2026-08", "2026-09", 10_000)
        a_tenth = creatives_seconds(place, "2026-09", 1000)
        print(f"creatives: {all_new:.2f} s, then {a_tenth:.2f} s; start-up {start_up:.2f} s of each")
        assert a_tenth - start_up <= 0.15 * (all_new - start_up)


# --- Pointers ---


@pytest.fixture(params=["bucket", "folder"])
def raced(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> tuple[Storage, Proxy | None]:
    """An empty lake to race on; a bucket is behind a proxy that fails now and then and loses answers."""
    if request.param == "folder":
        return Folder(str(tmp_path / "lake")), None
    proxy = request.getfixturevalue("proxy")
    proxy.plan = per_hundred(1, READS, {"503": 3, "reset": 2, "lost": 3})
    return open_storage(f"gs://adstocrat/{tmp_path.name}"), proxy


def test_a_stale_generation_is_refused_behind_the_proxy(bucket: Storage, proxy: Proxy) -> None:
    _, version = bucket.read_versioned("a")
    assert bucket.swap("a", version, b"newer")
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"))
    name = f"{bucket.uri.rpartition('/')[2]}/a"
    upload = {"uploadType": "media", "name": name}
    for generation, status in ((version, 412), ("0", 412), (bucket.read_versioned("a")[1], 200)):
        query = urlencode({**upload, "ifGenerationMatch": generation})
        connection.request("POST", f"/upload/storage/v1/b/adstocrat/o?{query}", f"over {generation}".encode())
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.request("GET", f"/download/storage/v1/b/adstocrat/o/{quote(name, safe='')}?alt=media")
    assert connection.getresponse().read().startswith(b"over 1")


class Meeting:
    """Makes two publishers read the pointer at the same time, so that each round is a race that one of them must lose."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._local = threading.local()

    def new_round(self) -> None:
        self._local.met = False

    def meet(self) -> None:
        if not self._local.met:
            self._local.met = True
            self._barrier.wait(60)

    def of(self, place: Storage) -> Storage:
        """The same lake, where a round's first look at the pointer waits for the other publisher's."""
        meeting, kind = self, type(place)

        class Met(kind):  # type: ignore[misc, valid-type]
            def read_versioned(self, name: str) -> Any:
                found = super().read_versioned(name)
                meeting.meet()
                return found

        return Met(place.uri)


@pytest.mark.parametrize("name", [CURRENT, CHAMPION])
def test_two_publishers_race(raced: tuple[Storage, Proxy | None], name: str) -> None:
    """Each round both publish a run; the pointer ends at the later month, and whoever reads it finds a complete run."""
    place, proxy = raced
    meeting = Meeting()
    racing = meeting.of(place)
    folder = "lookup" if name == CURRENT else "models/ranker"
    moved: dict[tuple[int, int], bool] = {}
    incomplete: list[Any] = []
    ended = threading.Event()

    def value(publisher: int, number: int) -> Any:
        # In every second round both are of one month, as two runs of it are.
        month = lake.month_after("2026-01", 2 * number + (publisher if number % 2 else 0))
        return Current(month, f"{publisher}-{number}") if name == CURRENT else Champion("e", f"{publisher}-{number}", month, "r")

    def manifest(pointer: Any) -> str:
        return f"{folder}/{pointer.run if name == CURRENT else pointer.ranker}"

    def publish(publisher: int) -> None:
        for number in range(RACES):
            pointer = value(publisher, number)
            lake.commit(racing, manifest(pointer), Manifest("s", ()))
            meeting.new_round()
            moved[publisher, number] = lake.move_pointer(racing, name, pointer)

    def watch() -> None:
        while not ended.is_set():
            pointer, _ = lake.read_pointer(place, name, Current if name == CURRENT else Champion)
            if pointer and lake.read_manifest(place, manifest(pointer)) is None:
                incomplete.append(pointer)

    with ThreadPoolExecutor(3) as pool:
        watching = pool.submit(watch)
        publishing = [pool.submit(publish, publisher) for publisher in range(2)]
        for publisher in publishing:
            publisher.result()
        ended.set()
        watching.result()
    assert incomplete == []
    assert len(moved) == 2 * RACES
    last, _ = lake.read_pointer(place, name, Current if name == CURRENT else Champion)
    assert last.month == max(value(publisher, RACES - 1).month for publisher in range(2))
    for number in range(RACES):
        # Who came second for a later or the same month moved it again; for an earlier one it was told so.
        assert moved[1, number] and (moved[0, number] or number % 2), number
    if proxy:
        pointer = f"{place.uri.rpartition('/')[2]}/{name}"
        writes = [seen for seen in proxy.seen if seen.name == pointer and seen.method == "POST"]
        done = [seen for seen in writes if seen.status == 200]
        # Each write was over the very one before it, and never of an earlier month.
        assert [seen.expected for seen in done] == ["0", *(seen.generation for seen in done[:-1])]
        written = [
            json.loads(seen.body.partition(b"\r\n\r\n")[2].partition(b"\r\n\r\n")[2].partition(b"\r\n")[0])["month"] for seen in done
        ]
        assert written == sorted(written)
        assert sum(seen.status == 412 for seen in writes) >= RACES
        assert {"503", "reset", "lost"} <= proxy.faults.keys() or not LONG


@pytest.mark.parametrize("kind", [Folder, Bucket])
def test_no_swap_is_lost_behind_faults(kind: type[Storage], proxy: Proxy, tmp_path: pathlib.Path) -> None:
    """Two add to one set by compare-and-swap; both write what the other may write, and what each was told holds."""
    place = kind(str(tmp_path / "lake") if kind is Folder else f"gs://adstocrat/{tmp_path.name}")
    proxy.plan = per_hundred(2, READS, {"503": 3, "reset": 3, "lost": 5})

    def add(adder: int) -> None:
        for number in range(RACES):
            while True:
                data, version = place.read_versioned("set")
                there = json.loads(data or b"[]")
                if f"{adder}-{number}" in there or place.swap("set", version, json.dumps([*there, f"{adder}-{number}"]).encode()):
                    break

    with ThreadPoolExecutor(2) as pool:
        for added in [pool.submit(add, adder) for adder in range(2)]:
            added.result()
    found = json.loads(place.read("set"))
    assert sorted(found) == sorted(f"{adder}-{number}" for adder in range(2) for number in range(RACES))
    assert [entry for entry in found if entry[0] == "0"] == [f"0-{number}" for number in range(RACES)]
