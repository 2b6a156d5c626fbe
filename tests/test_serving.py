"""The lookup table's shards, what a cache refuses, and the service over real HTTP."""

import contextlib
import dataclasses
import datetime
import fcntl
import http.client
import json
import logging
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import lmdb
import pytest
import uvicorn

from schemas.hashing import hash64, salted
from schemas.lake import CURRENT, Current, Manifest, Receipt, commit, move_pointer, read_manifest
from schemas.storage import Folder, Storage, crc32c, open_storage
from serving import __main__ as command
from serving.app import create_app
from serving.store import TableRefused, fetch, shard_name, shard_of, write_shard

ODD_KEYS = [
    "plain",
    "two words",
    "a/b//c",
    "100%",
    "%2F",
    "a+b",
    "Ünïcode – 広告 😀",
    "x" * 500,
    '"quoted"\\',
    "tab\tnew\nline",
    "..",
    ".",
    "?q#f",
]
CREATED = "2026-10-03T12:00:00+00:00"

SAME_FOR_ALL = {"month": "2026-10", "run_id": "r1", "encoder_version": "e1", "model_version": "r1"}


def row(key: str, p_click: float = 0.0123) -> bytes:
    return json.dumps({"key": key, "p_click": p_click, "score_status": "ok"}, ensure_ascii=False, separators=(",", ":")).encode()


def publish(
    lake: Storage, tmp_path: pathlib.Path, month: str, run: str, keys: list[str], shards: int = 3, p_click: float = 0.0123
) -> Current:
    """Write a run's table as the lookup job does; the pointer is not moved."""
    folder = f"lookup/{month}/{run}"
    receipts = []
    for shard in range(shards):
        items = sorted((key.encode(), row(key, p_click)) for key in keys if shard_of(key.encode(), shards) == shard)
        path = tmp_path / f"{run}-{shard}"
        assert write_shard(path, items, 1000) == len(items)
        name = f"{folder}/{shard_name(shard, shards)}-attempt.mdb"
        lake.upload(path, name)
        receipts.append(Receipt(shard_name(shard, shards), name, len(items), crc32c=crc32c(path.read_bytes())))
    info = {"month": month, "run": run, "shards": shards, "encoder_version": "e1", "model_version": "r1", "created": CREATED}
    commit(lake, folder, Manifest("lookup", tuple(receipts), info))
    return Current(month, run)


def rewrite(lake: Folder, current: Current, change: Callable[[Manifest], Manifest]) -> None:
    folder = f"lookup/{current.month}/{current.run}"
    manifest = read_manifest(lake, folder)
    assert manifest is not None
    lake.write(f"{folder}/manifest.json", change(manifest).to_json())


def with_receipt(number: int, **values: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        receipts = list(manifest.receipts)
        receipts[number] = dataclasses.replace(receipts[number], **values)
        return dataclasses.replace(manifest, receipts=tuple(receipts))

    return change


def with_info(**values: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(manifest, info={**manifest.info, **values})


@pytest.fixture
def lake(tmp_path: pathlib.Path) -> Folder:
    (tmp_path / "lake").mkdir()
    return Folder(str(tmp_path / "lake"))


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "cache"


# --- shards -------------------------------------------------------------------------------------------------------------------------------


def test_routing_is_the_hash_of_the_key() -> None:
    for shards in (1, 3, 1000):
        for key in ODD_KEYS:
            assert shard_of(key.encode(), shards) == hash64(key.encode(), salted("lookup")) % shards


def test_a_shard_grows_past_its_hint_and_is_compact(tmp_path: pathlib.Path) -> None:
    items = [(b"%08d" % i, b'{"x":"%s"}' % (b"y" * 900)) for i in range(25_000)]
    assert write_shard(tmp_path / "shard", iter(items), 0) == len(items)
    assert os.listdir(tmp_path) == ["shard"]
    with lmdb.open(str(tmp_path / "shard"), subdir=False, readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert list(transaction.cursor()) == items
        size = (tmp_path / "shard").stat().st_size
        assert size == (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        assert size < 1.2 * sum(len(key) + len(value) for key, value in items)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(b"a", b'{"k":1}'), (b"c", b'{"k":1}'), (b"b", b'{"k":1}')], r"b'b' comes after b'c'"),
        ([(b"a", b'{"k":1}'), (b"a", b'{"k":1}')], r"b'a' repeats"),
        ([(b"", b'{"k":1}')], r"b'' has 0 bytes"),
        ([(b"x" * 501, b'{"k":1}')], r"x' has 501 bytes; expected 1 to 500"),
        ([(b"a", b"{}")], r"b'a' has the value b'\{\}'"),
        ([(b"a", b'{"k":1}\n')], r"b'a' has the value"),
    ],
)
def test_a_shard_refuses_bad_items_and_leaves_nothing(tmp_path: pathlib.Path, items: list[tuple[bytes, bytes]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "shard", items, 100)
    # The same when the fault lies across a chunk's border.
    many = [(b"%05d" % i, b'{"k":1}') for i in range(10_000)]
    with pytest.raises(ValueError, match=r"b'09999' repeats"):
        write_shard(tmp_path / "shard", [*many, many[-1]], 100)
    assert os.listdir(tmp_path) == []


def test_an_odd_key_is_found_and_others_are_not(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS), cache)
    assert {key: table.get(key.encode()) for key in ODD_KEYS} == {key: row(key) for key in ODD_KEYS}
    assert [table.get(key) for key in (b"", b"absent", b"x" * 499, b"x" * 501, b"x" * 600, b"\xff")] == [None] * 6
    assert (table.rows, table.month, table.run, table.model_version, table.encoder_version) == (13, "2026-10", "r1", "r1", "e1")
    assert table.created == datetime.datetime(2026, 10, 3, 12, tzinfo=datetime.UTC)
    table.close()
    with pytest.raises(lmdb.Error):
        table.get(b"plain")


def test_empty_shards_are_fine(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ["one"], shards=12), cache)
    assert (table.rows, table.get(b"one"), table.get(b"two")) == (1, row("one"), None)
    table.close()


# --- cache --------------------------------------------------------------------------------------------------------------------------------


def first_file(lake: Folder, current: Current) -> pathlib.Path:
    return min(pathlib.Path(lake.uri, "lookup", current.month, current.run).glob("shard-00001-*"))


def truncate(lake: Folder, current: Current) -> None:
    path = first_file(lake, current)
    path.write_bytes(path.read_bytes()[:-4096])


def flip(lake: Folder, current: Current) -> None:
    path = first_file(lake, current)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap_shards(lake: Folder, current: Current) -> None:
    def change(manifest: Manifest) -> Manifest:
        first, second, *others = manifest.receipts
        units = (dataclasses.replace(second, unit=first.unit), dataclasses.replace(first, unit=second.unit))
        return dataclasses.replace(manifest, receipts=(*units, *others))

    rewrite(lake, current, change)


def not_lmdb(lake: Folder, current: Current) -> None:
    first_file(lake, current).write_bytes(b"no table")
    rewrite(lake, current, with_receipt(1, crc32c=crc32c(b"no table")))


FAULTS: dict[str, tuple[Callable[[Folder, Current], Any], str]] = {
    "truncated": (truncate, r"shard-00001-of-00003-attempt.mdb is corrupt: \d+ bytes with CRC32C \S+, but its receipt says"),
    "empty": (lambda lake, current: first_file(lake, current).write_bytes(b""), "is corrupt: 0 bytes"),
    "flipped bit": (flip, "shard-00001-of-00003-attempt.mdb is corrupt"),
    "not LMDB": (not_lmdb, "shard-00001-of-00003 of run r2 cannot be opened"),
    "missing file": (lambda lake, current: first_file(lake, current).unlink(), "shard-00001-of-00003 is missing: the lake has no lookup/"),
    "wrong count": (
        lambda lake, current: rewrite(lake, current, with_receipt(1, rows=77)),
        r"shard-00001-of-00003 of run r2 has \d+ keys, but its receipt says 77",
    ),
    "other shard": (swap_shards, r"shard-0000\d-of-00003 of run r2 has the key b'.*' of shard \d"),
    "missing shard": (
        lambda lake, current: rewrite(lake, current, lambda manifest: dataclasses.replace(manifest, receipts=manifest.receipts[:2])),
        "should list 3 shards with their files, and lists 2: see shard-00002-of-00003",
    ),
    "no file": (lambda lake, current: rewrite(lake, current, with_receipt(0, file="")), "and lists 2: see shard-00000-of-00003"),
    "repeated shard": (lambda lake, current: rewrite(lake, current, with_receipt(1, unit=shard_name(0, 3))), "lists 3: see shard-00001"),
    "no shards": (lambda lake, current: rewrite(lake, current, with_info(shards=0)), "should list 0 shards"),
    "other run": (lambda lake, current: rewrite(lake, current, with_info(run="r9")), "belongs to lookup/2026-11/r9"),
    "no date": (lambda lake, current: rewrite(lake, current, with_info(created="today")), "is damaged: ValueError"),
    "naive date": (lambda lake, current: rewrite(lake, current, with_info(created="2026-10-03T12:00:00")), "has no time zone"),
    "no version": (
        lambda lake, current: rewrite(lake, current, with_info(model_version=None)),
        "model_version and encoder_version must be strings",
    ),
    "half a manifest": (
        lambda lake, current: lake.write("lookup/2026-11/r2/manifest.json", b'{"stage": "loo'),
        "is damaged: JSONDecodeError",
    ),
    "list as manifest": (lambda lake, current: lake.write("lookup/2026-11/r2/manifest.json", b"[]"), "is damaged: "),
    "no manifest": (
        lambda lake, current: pathlib.Path(lake.uri, "lookup/2026-11/r2/manifest.json").unlink(),
        "lookup/2026-11/r2 has no manifest.json: its stage is not complete",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupt_run_is_refused_and_leaves_the_cache_alone(fault: str, lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS), cache).close()
    current = publish(lake, tmp_path, "2026-11", "r2", ODD_KEYS)
    spoil, message = FAULTS[fault]
    spoil(lake, current)
    with pytest.raises(TableRefused, match=message):
        fetch(lake, current, cache)
    assert {path.name for path in cache.iterdir()} == {".lock", "2026-10.r1"}


def test_a_pointer_cannot_lead_out_of_the_cache(lake: Folder, cache: pathlib.Path) -> None:
    with pytest.raises(TableRefused, match="not the folder of a run"):
        fetch(lake, Current("2026-10", "../../elsewhere"), cache)


def test_a_restart_copies_and_reads_nothing_again(
    lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    fetch(lake, current, cache).close()
    for path in pathlib.Path(lake.uri, "lookup/2026-10/r1").glob("shard-*"):
        path.unlink()
    monkeypatch.setattr("schemas.storage._crc32c_of_file", lambda path: pytest.fail(f"{path} was read again"))
    table = fetch(lake, current, cache)
    assert table.get(b"plain") == row("plain")
    table.close()


@pytest.mark.parametrize("damage", ["shorter", "changed", "removed", "other manifest"])
def test_a_damaged_cache_is_copied_anew(damage: str, lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    fetch(lake, current, cache).close()
    path = cache / "2026-10.r1" / shard_name(1, 3)
    data = path.read_bytes()
    if damage == "shorter":
        os.truncate(path, 4096)
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "removed":
        path.unlink()
    else:
        rewrite(lake, current, with_info(model_version="r2"))
    table = fetch(lake, current, cache)
    assert [table.get(key.encode()) for key in ODD_KEYS] == [row(key) for key in ODD_KEYS]
    assert path.read_bytes() == data
    assert table.model_version == ("r2" if damage == "other manifest" else "r1")
    table.close()


def test_the_last_two_runs_are_kept_and_leftovers_go(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    runs = [publish(lake, tmp_path, f"2026-{month:02d}", f"r{month}", ODD_KEYS) for month in (8, 9, 10)]
    (cache / "incoming-dead").mkdir(parents=True)
    tables = [fetch(lake, current, cache) for current in runs]
    assert {path.name for path in cache.iterdir()} == {".lock", "2026-09.r9", "2026-10.r10"}
    assert tables[0].get(b"plain") == row("plain")  # Its files are gone; its mapping is not.
    tables[1].close()
    tables.append(fetch(lake, runs[1], cache))
    tables.append(fetch(lake, runs[0], cache))  # The run used last is kept, not the one of the later month.
    assert {path.name for path in cache.iterdir()} == {".lock", "2026-08.r8", "2026-09.r9"}
    for table in tables:
        table.close()


def test_a_bucket_takes_the_same_way(cloud: dict[str, str], cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lake = open_storage("gs://adstocrat/serving")
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS), cache)
    assert [table.get(key.encode()) for key in ODD_KEYS] == [row(key) for key in ODD_KEYS]
    table.close()
    current = publish(lake, tmp_path, "2026-11", "r2", ODD_KEYS)
    lake.delete("lookup/2026-11/r2/shard-00002")
    with pytest.raises(TableRefused, match="shard-00002-of-00003 is missing: the lake has no lookup/2026-11/r2/shard-00002"):
        fetch(lake, current, cache)


def test_a_fetch_can_be_stopped(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    with pytest.raises(InterruptedError, match="while copying"):
        fetch(lake, current, cache, lambda: True)
    with (cache / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InterruptedError, match="while waiting"):
            fetch(lake, current, cache, lambda: True)
    assert [path.name for path in cache.iterdir()] == [".lock"]


# --- REST ---------------------------------------------------------------------------------------------------------------------------------


class Client:
    """A connection that sends paths as they are."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def __call__(self, path: str, method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
        self.connection.request(method, path)
        response = self.connection.getresponse()
        return response.status, response.headers, response.read()

    def problem(self, path: str, method: str = "GET") -> tuple[dict[str, Any], http.client.HTTPMessage]:
        status, headers, body = self(path, method)
        assert headers["content-type"] == "application/problem+json"
        values = json.loads(body)
        assert list(values) == ["type", "title", "status", "detail"]
        assert values["status"] == status
        return values, headers


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def client(lake: Folder, cache: pathlib.Path) -> Iterator[Client]:
    """A real server on the lake, in a thread; nothing is published yet."""
    config = uvicorn.Config(create_app(lake, cache, poll_seconds=0.02), http="httptools", lifespan="on", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            client = Client(listener.getsockname()[1])
            yield client
            client.connection.close()
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


def test_a_score_is_the_stored_row_with_month_and_run(client: Client, lake: Folder, tmp_path: pathlib.Path) -> None:
    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS))
    eventually(lambda: client("/readyz")[0] == 200)
    status, headers, body = client("/v1/scores/plain")
    assert (status, headers["content-type"]) == (200, "application/json")
    own, same = b'{"key":"plain","p_click":0.0123,"score_status":"ok",', json.dumps(SAME_FOR_ALL, separators=(",", ":")).encode()[1:]
    assert body == own + same
    for key in ODD_KEYS:
        status, _, body = client("/v1/scores/" + quote(key, safe=""))
        assert (status, json.loads(body)) == (200, {**json.loads(row(key)), **SAME_FOR_ALL})
    assert client("/v1/scores/a/b//c")[0] == 200  # Slashes may stay as they are,
    assert client("/v1/scores/a+b?x=1")[0] == 200  # a plus is a plus, and a query is no part of the key.

    status, headers, body = client("/v1/scores/plain", "HEAD")
    assert (status, headers["content-length"], body) == (200, "128", b"")
    assert json.loads(client("/healthz")[2]) == {"status": "ok"}
    assert json.loads(client("/readyz")[2]) == {"status": "ready"}
    values = json.loads(client("/v1/status")[2])
    age = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(CREATED)).total_seconds() / 86400
    assert values.pop("age_days") == pytest.approx(age, abs=0.02)
    assert values == {**SAME_FOR_ALL, "rows": 13}


def test_what_is_wrong_with_a_request_is_told_as_problem_details(client: Client, lake: Folder, tmp_path: pathlib.Path) -> None:
    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS))
    eventually(lambda: client("/readyz")[0] == 200)
    detail = "Month 2026-10 has no score under the key 'ad 7 ü'."
    assert client.problem("/v1/scores/ad%207%20%C3%BC")[0] == {"type": "about:blank", "title": "Not Found", "status": 404, "detail": detail}
    assert len(client.problem("/v1/scores/" + "x" * 9000)[0]["detail"]) < 200
    values, _ = client.problem("/v1/scores/%FF%FE")
    assert (values["status"], values["title"]) == (400, "Bad Request")
    assert "not UTF-8" in values["detail"]
    assert client.problem("/v1/scores/")[0]["status"] == 400
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        values, headers = client.problem("/v1/scores/plain", method)
        assert (values["status"], values["title"], headers["allow"]) == (405, "Method Not Allowed", "GET, HEAD")
    values, headers = client.problem("/v1/status", "POST")
    assert (values["status"], set(headers["allow"].split(", "))) == (405, {"GET", "HEAD"})
    for path in ("/", "/v1/scores", "/v1/status/", "/nothing"):
        values, _ = client.problem(path)
        assert values["status"] == 404
        assert values["detail"].startswith(f"There is no {path} here; there are /v1/scores/{{key}},")


def test_nothing_published_is_not_ready(client: Client) -> None:
    eventually(lambda: b"published yet" in client("/readyz")[2])
    assert client("/healthz")[0] == 200
    for path in ("/v1/scores/plain", "/v1/status", "/readyz"):
        values, headers = client.problem(path)
        detail = "No lookup table is published yet; the first published month will be served without a restart."
        assert values == {"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": detail}
        assert headers["retry-after"] == "1"


def test_a_new_run_is_served_without_a_gap_and_a_corrupt_one_is_not(
    client: Client, lake: Folder, tmp_path: pathlib.Path, cache: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving")

    def run_id() -> str:
        status, _, body = client("/v1/scores/plain")
        assert status == 200
        values = json.loads(body)
        # Row and run always belong together.
        assert values["p_click"] == {"r1": 0.1, "r2": 0.2, "r4": 0.4}[values["run_id"]]
        return values["run_id"]

    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS, p_click=0.1))
    eventually(lambda: client("/readyz")[0] == 200)
    assert run_id() == "r1"
    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-11", "r2", [*ODD_KEYS, "new"], shards=5, p_click=0.2))
    eventually(lambda: run_id() == "r2")
    assert json.loads(client("/v1/scores/new")[2])["month"] == "2026-11"

    corrupt = publish(lake, tmp_path, "2026-12", "r3", ODD_KEYS)
    flip(lake, corrupt)
    move_pointer(lake, CURRENT, corrupt)
    eventually(lambda: any("Refused run r3 of 2026-12, still serving run r2 of 2026-11: " in line for line in caplog.messages))
    time.sleep(0.1)
    assert sum("Refused" in line for line in caplog.messages) == 1
    assert run_id() == "r2"
    assert client("/readyz")[0] == 200

    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2027-01", "r4", ODD_KEYS, p_click=0.4))
    eventually(lambda: run_id() == "r4")
    pathlib.Path(lake.uri, CURRENT).write_bytes(b"no pointer")
    eventually(lambda: any("Cannot read lookup/CURRENT, still serving run r4" in line for line in caplog.messages))
    assert run_id() == "r4"
    # Rolling back is moving the pointer to an earlier run.
    pathlib.Path(lake.uri, CURRENT).write_text('{"month": "2026-11", "run": "r2"}')
    eventually(lambda: run_id() == "r2")
    assert {path.name for path in cache.iterdir()} == {".lock", "2026-11.r2", "2027-01.r4"}


def test_a_first_run_that_is_corrupt_is_tried_again(client: Client, lake: Folder, tmp_path: pathlib.Path) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    path = first_file(lake, current)
    data = path.read_bytes()
    flip(lake, current)
    move_pointer(lake, CURRENT, current)
    eventually(lambda: b"cannot be loaded" in client("/readyz")[2])
    assert client.problem("/v1/scores/plain")[0]["status"] == 503
    path.write_bytes(data)
    eventually(lambda: client("/v1/scores/plain")[0] == 200)


# --- command ------------------------------------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_stopped(lake: Folder, tmp_path: pathlib.Path) -> None:
    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS))
    arguments = ["--lake", lake.uri, "--port", "0", "--poll-seconds", "0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serving", *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"Adstocrat serves {re.escape(lake.uri)} at http://127\.0\.0\.1:(\d+) \(stop with Ctrl-C\)\n", line)
        assert found, line
        client = Client(int(found[1]))
        eventually(lambda: client("/readyz")[0] == 200)
        assert client("/v1/scores/plain")[0] == 200
        client.connection.close()
        process.send_signal(signal.SIGINT)
        out, log = process.communicate(timeout=10)
        assert (process.returncode, out) == (0, "")
        assert "INFO Serving run r1 of 2026-10: 13 rows." in log
        assert (tmp_path / "home/adstocrat" / command.default_cache(lake.uri).name / "2026-10.r1").is_dir()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lake", "/nowhere/lake"], "there is no lake at /nowhere/lake"),
        (["--lake", "s3://bucket"], "unknown scheme"),
        (["--lake", "."], "cannot listen on 127.0.0.1 port"),
        (["--lake", ".", "--port", "70000"], "port is 70000; expected 0 to 65535"),
        (["--lake", ".", "--poll-seconds", "0"], "expected more than 0"),
        ([], "the following arguments are required: --lake"),
    ],
)
def test_a_wrong_call_ends_with_a_sentence(
    arguments: list[str], message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.chdir(tmp_path), pytest.raises(SystemExit) as exit_:
        command.main(["--port", str(taken.getsockname()[1]), *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "curl http://127.0.0.1:8080/v1/scores/KEY" in capsys.readouterr().out


def test_imports_stay_light() -> None:
    code = "import sys, serving.app, serving.__main__; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"apache_beam", "numpy", "pyarrow", "tensorflow", "keras", "google.cloud.storage", "requests"}
    code = "import sys, serving.__main__; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"uvicorn", "starlette", "lmdb"}
