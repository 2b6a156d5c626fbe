"""The local cloud on real emulators: what it promises about starting, stopping, keeping data and standing in for a bucket."""

import io
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_jobs import local_cloud
from schemas import storage
from schemas.checksum import crc32c

RUN = "import pathlib, sys; from beam_jobs import local_cloud; sys.exit(local_cloud.run(pathlib.Path(sys.argv[1]), sys.argv[2:]))"


@pytest.fixture
def state(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A state folder whose servers are stopped in the end, whatever the test did."""
    yield tmp_path / "state"
    local_cloud.stop(tmp_path / "state")


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    storage._client.cache_clear()
    # Undone with the environment, so that the next test's client is made for its own.
    monkeypatch.setattr(storage, "_client", storage._client.__wrapped__)


def processes_of(state: pathlib.Path) -> list[str]:
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command, folder = (path / "cmdline").read_bytes().decode(), os.readlink(path / "cwd")
        except OSError:
            continue
        if folder == str(state) or str(state) in command:
            found.append(command)
    return found


def wait_until_gone(state: pathlib.Path, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(state) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(state) == []


def test_objects_and_tables_survive_a_stop_and_a_start(state: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.cloud import bigquery

    environment = local_cloud.start(state)
    assert local_cloud.start(state) == environment
    assert local_cloud.status(state) == environment
    use(environment, monkeypatch)
    lake = storage.open_storage("gs://adstocrat/lake")
    parquet = io.BytesIO()
    pq.write_table(pa.table({"ad_id": ["a", "b"]}), parquet)
    lake.write("scores/2026-10/run/part.parquet", parquet.getvalue())
    for number in range(100):
        lake.write(f"many/{number:03d}", b"x")
    client = bigquery.Client()
    client.create_dataset("ads")
    schema = [bigquery.SchemaField("ad_id", "STRING", "REQUIRED")]
    config = bigquery.LoadJobConfig(source_format="PARQUET", schema=schema)
    client.load_table_from_uri(lake.url("scores/2026-10/run/part.parquet"), "ads.scores", job_config=config).result()

    local_cloud.stop(state)
    assert processes_of(state) == []
    assert local_cloud.status(state) is None
    assert local_cloud.start(state) == environment
    assert lake.names("many/") == [f"many/{number:03d}" for number in range(100)]
    assert lake.read("scores/2026-10/run/part.parquet") == parquet.getvalue()
    rows = bigquery.Client().query("SELECT ad_id FROM ads.scores ORDER BY ad_id").result()
    assert [row.ad_id for row in rows] == ["a", "b"]


def test_half_a_cloud_is_started_anew_and_run_leaves_what_was_there(state: pathlib.Path) -> None:
    environment = local_cloud.start(state)
    os.kill(int((state / "storage.lock").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while local_cloud.status(state) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert local_cloud.status(state) is None
    assert local_cloud.start(state) == environment
    assert local_cloud.run(state, ["sh", "-c", "exit 3"]) == 3
    assert local_cloud.run(state, ["/no/such/command"]) == 127
    assert local_cloud.status(state) == environment
    local_cloud.stop(state)
    assert processes_of(state) == []


def test_nothing_runs_where_nothing_was_started(tmp_path: pathlib.Path) -> None:
    assert local_cloud.status(tmp_path / "never") is None
    local_cloud.stop(tmp_path / "never")
    local_cloud.stop(tmp_path)
    assert local_cloud.status(tmp_path) is None
    assert not (tmp_path / "never").exists()


def test_a_server_that_does_not_come_up_is_explained(state: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken, socket.socket() as free, socket.socket() as other:
        for probe in (taken, free, other):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (taken, free, other)]
        free.close()
        other.close()
        monkeypatch.setattr(local_cloud, "_free_ports", lambda _: ports)
        with pytest.raises(RuntimeError, match=r"(?s)the storage emulator ended; the end of .*storage.log:.*Address already in use"):
            local_cloud.start(state)
    assert processes_of(state) == []


def test_run_returns_the_commands_status_and_leaves_nothing(state: pathlib.Path) -> None:
    check = "import http.client, os; http.client.HTTPConnection(os.environ['STORAGE_EMULATOR_HOST'][7:]).request('GET', '/'); os._exit(7)"
    assert local_cloud.run(state, [sys.executable, "-c", check]) == 7
    assert processes_of(state) == []
    assert local_cloud.run(state, ["sh", "-c", "kill -KILL $$"]) == 128 + signal.SIGKILL
    assert processes_of(state) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signalled_run_passes_it_on_and_leaves_nothing(state: pathlib.Path, signum: signal.Signals) -> None:
    process = started_run(state, "trap 'exit 9' INT TERM; echo ready; while :; do sleep 0.05; done")
    process.send_signal(signum)
    assert process.wait(30) == 9
    assert processes_of(state) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_killed_run_takes_the_servers_with_it(state: pathlib.Path) -> None:
    process = started_run(state, "echo ready; exec sleep 30")
    process.kill()
    process.wait(10)
    wait_until_gone(state)


def started_run(state: pathlib.Path, script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(state), "sh", "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_export_lines_survive_the_shell() -> None:
    lines = local_cloud.export_lines({"A": "it's", "B": "$HOME b"})
    assert subprocess.run(["sh", "-c", f'{lines}printf %s "$A|$B"'], capture_output=True, text=True, check=True).stdout == "it's|$HOME b"
    assert lines.startswith("export A=") and shlex.split(lines) == ["export", "A=it's", "export", "B=$HOME b"]


def test_the_bucket_creates_once_and_swaps(cloud: dict[str, str]) -> None:
    lake = storage.open_storage("gs://adstocrat/conditions")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda number: lake.create("once", b"%d" % number), range(16))) == 1
    lake.write("counter", b"0")

    def count(_: int) -> None:
        while True:
            data, version = lake.read_versioned("counter")
            assert data is not None
            if lake.swap("counter", version, b"%d" % (int(data) + 1)):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(20)))
    assert lake.read("counter") == b"20"
    assert lake.read_versioned("absent") == (None, None)
    assert not lake.swap("counter", None, b"")


def test_the_bucket_gives_back_what_was_put(cloud: dict[str, str], tmp_path: pathlib.Path) -> None:
    lake = storage.open_storage("gs://adstocrat/bytes")
    contents = {"empty": b"", "lines": b"\r\n--\r\n\n\r", "with space/ü#?%": bytes(range(256)), "big": os.urandom(9 << 20)}
    for name, data in contents.items():
        lake.write(name, data)
    entries = [storage.Entry(name, len(data), crc32c(data)) for name, data in sorted(contents.items())]
    assert lake.entries("") == entries
    for name, data in contents.items():
        assert lake.read(name) == data
        with lake.open(name) as stream, lake.local(name) as path:
            assert stream.read() == path.read_bytes() == data
    assert lake.read("big", 5, 10) == contents["big"][5:15]
    assert lake.read("big", len(contents["big"]) - 3) == contents["big"][-3:]
    (tmp_path / "file").write_bytes(contents["big"])
    lake.upload(tmp_path / "file", "uploaded")
    assert lake.read("uploaded") == contents["big"]
    with pytest.raises(FileNotFoundError):
        lake.read("absent")
