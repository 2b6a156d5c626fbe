"""Months on a real Flink cluster whose TaskManagers are killed, on Prism, and pointers on a server that enforces generations.

`scripts/test --cluster` runs these, and installs what they need. The tests use one lake after each other, each emptied but for what was
delivered: a small month that everything is trained on, and a full one that refreshes it.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from test_storage import race

from beam_jobs.cli import main
from beam_jobs.config import Config
from beam_jobs.jobs import connect
from beam_jobs.run import prepare
from beam_jobs.runner import run_step
from schemas import lake, storage
from schemas.lake import Champion, Current
from schemas.sample import write_months
from schemas.storage import Bucket, open_storage

pytestmark = pytest.mark.cluster
TOP = pathlib.Path(__file__).resolve().parent.parent
GO = TOP / ".venv" / "go"
LAKE = "gs://adstocrat/cluster"
SMALL, FULL = "2026-08", "2026-09"
ROWS = {SMALL: (4_000, 300), FULL: (200_000, 10_000)}
FLINK = ["--runner=PortableRunner", "--job_endpoint=localhost:8099", "--artifact_endpoint=localhost:8098", "--parallelism=2"]
FLINK += ["--environment_type=EXTERNAL", "--environment_config=workers:50000"]
PRISM = ["--runner=PrismRunner", f"--prism_location={GO / 'prism'}", "--environment_type=LOOPBACK"]
# Behind what is in the lake for the first time, the step is in the middle of its work.
KILLS = {"ingest": "spill/", "embed-packs": "embeddings/", "score": "scores/", "lookup": "spill/"}


def command(month: str, dataset: str, flags: list[str]) -> list[str]:
    # The months are of different worlds, so their means differ.
    month_of = ["month", month, "--lake", LAKE, "--dataset", dataset, "--accept-shift"]
    return [sys.executable, "-m", "beam_jobs.cli", *month_of, *(["--", *flags] if flags else [])]


def run_month(month: str, dataset: str, flags: list[str]) -> str:
    done = subprocess.run(command(month, dataset, flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "  balanced" in done.stdout.splitlines(), done.stdout[-4000:]
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Published:
    """What a month left behind, but for its table: the run, the pointers, and the ledger's counts."""

    champion: Champion | None
    current: Current | None
    ledger: dict[str, Any]


def published(month: str) -> Published:
    store = open_storage(LAKE)
    champion, current = (lake.read_pointer(store, name, kind)[0] for name, kind in ((lake.CHAMPION, Champion), (lake.CURRENT, Current)))
    assert current is not None and current.month == month
    ledger = store.read_json(f"{lake.run_folder(month, current.run)}/ledger.json")
    # How often a loaded emulator was asked again is no runner's doing.
    ledger["counts"].pop("retries", None)
    return Published(champion, current, {name: value for name, value in ledger.items() if name not in ("used", "gate")})


def empty_lake() -> None:
    """Remove all but what was delivered."""
    store = open_storage(LAKE)
    for top in {name.split("/")[0] for name in store.names("")} - {"raw", "truth"}:
        store.delete(f"{top}/")


@pytest.fixture(scope="module")
def project(cloud: dict[str, str]) -> str:
    """Both months are delivered; the project of the datasets."""
    store = open_storage(LAKE)
    for month, (ads, creatives) in ROWS.items():
        write_months(store, [month], ads, creatives, 0, lambda line: None)
    return cloud["GOOGLE_CLOUD_PROJECT"]


@pytest.fixture(scope="module")
def locally(project: str) -> dict[str, Published]:
    """What each month is on the local runner; its tables are in the dataset `local`."""
    empty_lake()
    found = {}
    for month in ROWS:
        run_month(month, f"{project}.local", [])
        found[month] = published(month)
    empty_lake()
    return found


def assert_same_table(project: str, dataset: str, month: str) -> None:
    """The published rows are those of the local runner: each key once, all columns equal, probabilities to a millionth."""
    client = connect(project, "US")
    names = [field.name for field in client.get_table(f"{project}.local.scores").schema]
    differ = " OR ".join(f"a.`{name}` IS DISTINCT FROM b.`{name}`" for name in names if name != "p_click")
    rows = [f"(SELECT * FROM `{project}.{name}.scores` WHERE month = DATE '{month}-01')" for name in ("local", dataset)]
    query = f"""SELECT COUNT(*) AS n, COUNT(DISTINCT b.`key`) AS ours, MAX(ABS(a.p_click - b.p_click)) AS off, COUNTIF({differ}) AS other
    FROM {rows[0]} a FULL OUTER JOIN {rows[1]} b ON a.`key` = b.`key`"""
    (found,) = [dict(row) for row in client.query(query).result()]
    print(f"{dataset} {month}: {found}")
    assert found["n"] == found["ours"] == ROWS[month][0] and found["other"] == 0, found
    assert found["off"] <= 1e-6, found


def flink(path: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://localhost:8081{path}", timeout=30) as answer:
        return json.load(answer)


def jobs() -> dict[str, dict[str, Any]]:
    """The cluster's jobs by name."""
    return {job["name"]: job for job in flink("/jobs/overview")["jobs"]}


def tasks(job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A vertex's name, and what is said of it on one TaskManager."""
    for vertex in flink(f"/jobs/{job}")["vertices"]:
        for each in flink(f"/jobs/{job}/vertices/{vertex['id']}/taskmanagers")["taskmanagers"]:
            yield vertex["name"], each


@pytest.fixture(scope="module")
def cluster(project: str) -> Iterator[None]:
    """A new cluster, with workers that see this lake."""
    script = TOP / "scripts" / "flink"
    try:
        subprocess.run([script, "down"], check=True)
        subprocess.run([script, "up"], check=True)
        yield
    finally:
        subprocess.run([script, "down"], check=True)


def kill_in(job: str, prefix: str, ended: threading.Event) -> str:
    """Kill a TaskManager that has running tasks of the job, once there is something new under the prefix; which one it was."""
    store = open_storage(LAKE)
    while job not in jobs():
        assert not ended.wait(0.5), f"the month ended without {job}"
    # What a worker of a lost TaskManager wrote late may lie there.
    before, running = set(store.names(prefix)), list[str]()
    while not running:
        assert not ended.wait(0.1)
        if set(store.names(prefix)) != before:
            running = [each["taskmanager-id"] for _, each in tasks(jobs()[job]["jid"]) if each["status-counts"].get("RUNNING")]
            assert running or jobs()[job]["state"] != "FINISHED", f"{job} is done: too late to kill anything in it"
    victim = max(set(running), key=running.count)
    state = TOP / ".venv" / "flink" / "state"
    os.kill(int((state / f"taskmanager-{victim}.pid").read_text()), signal.SIGKILL)
    with open(state / f"taskmanager-{victim}.lock") as lock:
        # It is gone when its lock is.
        fcntl.flock(lock, fcntl.LOCK_SH)
    return victim


def test_taskmanagers_killed_in_four_stages_change_nothing(project: str, locally: dict[str, Published], cluster: None) -> None:
    empty_lake()
    run = prepare(Config(lake=LAKE, dataset=f"{project}.flink"), SMALL)
    ended, output = threading.Event(), list[str]()
    with subprocess.Popen(
        command(SMALL, f"{project}.flink", FLINK), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:

        def follow() -> None:
            assert process.stdout is not None
            output.extend(process.stdout)
            ended.set()

        threading.Thread(target=follow).start()
        try:
            for step, prefix in KILLS.items():
                job = f"adstocrat-{SMALL}-{run.id}-{step}"
                victim = kill_in(job, prefix, ended)
                # As an operator would; the job goes on with the other one meanwhile.
                subprocess.run([TOP / "scripts" / "flink", "up"], check=True, stdout=subprocess.DEVNULL)
                while jobs()[job]["state"] not in ("FINISHED", "FAILED"):
                    assert not ended.wait(0.2)
                history = flink(f"/jobs/{jobs()[job]['jid']}/exceptions")["exceptionHistory"]["entries"]
                print(f"{step}: killed {victim}; {[entry['exceptionName'] for entry in history]}; {jobs()[job]}")
                assert history, f"{job} did not notice that {victim} was killed"
            assert process.wait() == 0
        finally:
            process.kill()
            ended.wait()
            print("".join(output))
    assert_same_table(project, "flink", SMALL)
    assert published(SMALL) == locally[SMALL]


def test_a_full_month_on_flink_is_that_of_the_local_runner(project: str, locally: dict[str, Published], cluster: None) -> None:
    store = open_storage(LAKE)
    if lake.read_pointer(store, lake.CURRENT, Current)[0] is None:
        run_month(SMALL, f"{project}.flink", FLINK)
    run_month(FULL, f"{project}.flink", FLINK)
    assert_same_table(project, "flink", FULL)
    ours = published(FULL)
    assert ours == locally[FULL] and ours.current is not None
    # Both TaskManagers had tasks of every job, and both read rows.
    run = ours.current.run
    found = {name: list(tasks(job["jid"])) for name, job in jobs().items() if run in name}
    assert len(found) >= 8
    for name, of_job in found.items():
        workers = {each["taskmanager-id"] for _, each in of_job if each["status-counts"].get("FINISHED")}
        assert workers == {"a", "b"} or name.endswith(("-train", "-encoder")), (name, workers)
    read = [(each["taskmanager-id"], each["metrics"]) for name, each in found[f"adstocrat-{FULL}-{run}-ingest"] if "ReadRows" in name]
    written = {id: metrics["write-records"] for id, metrics in read}
    print(f"tasks on {written}")
    assert written.keys() == {"a", "b"} and all(written.values()), read


def test_the_steps_of_the_readme_run(cluster: None, tmp_path: pathlib.Path) -> None:
    """As they stand there, on a small month: workers of the cluster that is up are replaced by those that see another lake."""
    part = (TOP / "README.md").read_text().partition("## On Flink and Prism")[2]
    steps = part.partition("```\n")[2].partition("```")[0]
    assert all(flag in steps for flag in FLINK)
    small = steps.replace("build/cloud", f"{tmp_path}/cloud").replace("2026-08:2026-08", "2026-08:2026-08 --ads 600 --creatives 40")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("STORAGE_", "CLOUD_STORAGE_", "GOOGLE_"))}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    try:
        with open(tmp_path / "log", "wb") as log:
            done = subprocess.run(["sh", "-ec", small], cwd=TOP, env=environment, stdout=log, stderr=log, check=False)
    finally:
        main(["local-cloud", "stop", "--state", f"{tmp_path}/cloud"])
        told = (tmp_path / "log").read_text()
        print(told)
    assert done.returncode == 0 and "  balanced" in told.splitlines()
    assert subprocess.run([TOP / "scripts" / "flink", "status"], check=False).returncode == 1


def test_a_full_month_on_prism_is_that_of_the_local_runner(project: str, locally: dict[str, Published]) -> None:
    empty_lake()
    for month in ROWS:
        run_month(month, f"{project}.prism", PRISM)
        assert_same_table(project, "prism", month)
        assert published(month) == locally[month]


def refuse(element: int) -> None:
    from beam_jobs.run import StageError

    raise StageError(f"element {element} is refused; expected none")


def test_what_a_worker_raises_arrives_as_its_sentence(project: str) -> None:
    import apache_beam as beam

    from beam_jobs.run import StageError

    run = prepare(Config(lake=LAKE), SMALL)
    with pytest.raises(StageError, match=r"^element 1 is refused; expected none$"):
        run_step(lambda root: root | beam.Create([1]) | beam.Map(refuse), PRISM, run, "refused")


def test_a_job_server_that_is_not_there_is_told(project: str, capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--runner=PortableRunner", "--job_endpoint=localhost:1", "--job_server_timeout=2", "--environment_type=LOOPBACK"]
    assert main(["ingest", SMALL, "--lake", LAKE, "--seed", "7", "--", *nowhere]) == 2
    assert "no job server takes jobs at --job_endpoint=localhost:1" in capfd.readouterr().err


@pytest.fixture
def strict(tmp_path: pathlib.Path) -> Iterator[Bucket]:
    """A bucket of a server that enforces generations."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", address, "-backend", "memory"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen([GO / "fake-gcs-server", *flags], stdout=log, stderr=log)
    try:
        # Not those of the local cloud, whose server hands out its own tokens.
        environment = {"STORAGE_EMULATOR_HOST": f"http://{address}", "GOOGLE_CLOUD_PROJECT": "strict"}
        with mock.patch.dict(os.environ, environment):
            storage._client.cache_clear()
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
            storage._client().create_bucket("strict")
            yield Bucket("gs://strict/lake")
    finally:
        storage._client.cache_clear()
        server.terminate()
        server.wait()


def test_pointers_move_by_compare_and_swap_where_generations_are_enforced(strict: Bucket) -> None:
    # The server itself refuses, whoever asks.
    assert strict.create("once", b"first") and not strict.create("once", b"second") and strict.read("once") == b"first"
    _, version = strict.read_versioned("once")
    assert strict.swap("once", version, b"moved") and not strict.swap("once", version, b"stale") and strict.read("once") == b"moved"
    assert not strict.swap("once", None, b"stale") and not strict.swap("absent", version, b"stale")
    race(strict, 4, 25)
    assert strict.read("counter") == b"100"


@pytest.mark.parametrize("name", [lake.CHAMPION, lake.CURRENT])
def test_of_pointers_that_move_at_once_the_latest_month_stays(strict: Bucket, name: str) -> None:
    months = [f"2026-{month:02d}" for month in range(1, 13)]
    values = [Champion("e", "r", month, "run") if name == lake.CHAMPION else Current(month, "run") for month in months]
    start = threading.Barrier(len(values))

    def move(value: Any) -> None:
        start.wait()
        lake.move_pointer(strict, name, value)

    movers = [threading.Thread(target=move, args=(value,)) for value in values]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join()
    assert lake.read_pointer(strict, name, type(values[0]))[0] == values[-1]
