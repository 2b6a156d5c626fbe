"""Publishing and going back: what BigQuery, the pointers and a server end up with, and what stops it.

At full size where ADSTOCRAT_LONG is set.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from bigquery_proxy import BigQueryProxy, Where
from proxy import running
from whole_runs import CONTRACT, DEVICES, Months, months_in

from beam_jobs import cli
from beam_jobs.jobs import Jobs, connect
from beam_jobs.run import MonthRun
from schemas import lake, tables
from schemas.contract import Contract
from schemas.lake import CHAMPION, CURRENT, Champion, Current

LONG = bool(os.environ.get("ADSTOCRAT_LONG"))
SEPTEMBER, OCTOBER = "2026-09", "2026-10"
ROWS = 600


@pytest.fixture(scope="module")
def proxy(cloud: dict[str, str]) -> Iterator[BigQueryProxy]:
    """A proxy in front of the local cloud's BigQuery, and this process's environment pointing at it."""
    with running(cloud["BIGQUERY_EMULATOR_HOST"], BigQueryProxy) as proxy, mock.patch.dict(os.environ, BIGQUERY_EMULATOR_HOST=proxy.url):
        yield proxy


@pytest.fixture(scope="module")
def place(cloud: dict[str, str], proxy: BigQueryProxy, tmp_path_factory: pytest.TempPathFactory) -> Months:
    """September and two runs of October: the first is published, the second, of the delivery that is there, not yet."""
    dataset = f"{cloud['GOOGLE_CLOUD_PROJECT']}.published"
    place = months_in("gs://adstocrat/published", dataset, tmp_path_factory.mktemp("published"), ROWS)
    place.make(SEPTEMBER)
    assert command(place, "publish", SEPTEMBER) == 0
    place.make(OCTOBER, "1")
    assert command(place, "publish", OCTOBER) == 0
    place.make(OCTOBER, "2")
    return place


def command(place: Months, name: str, *arguments: str) -> int:
    return cli.main([name, *arguments, *place.flags])


def rows(place: Months, text: str) -> list[dict[str, Any]]:
    """The answer to a query, of the emulator itself; `DATASET` is the one."""
    dataset = str(place.config.dataset)
    return [dict(row) for row in connect(dataset.partition(".")[0], "US").query(text.replace("DATASET", dataset)).result()]


def published(place: Months, month: str) -> set[str]:
    """The runs whose rows the month has, each row of which is there once and all of them."""
    (found,) = rows(
        place, f"SELECT COUNT(*) AS n, COUNT(DISTINCT key) AS k, MIN(run_id) AS a, MAX(run_id) AS b FROM `DATASET.scores` WHERE {of(month)}"
    )
    assert found["n"] == found["k"] == place.rows
    return {found["a"], found["b"]}


def of(month: str) -> str:
    return f"month = DATE '{month}-01'"


def run_ids(place: Months, month: str) -> list[str]:
    """Of versions 1 and 2."""
    return [place.deliver(month, version).id for version in "12"]


# --- What publishing leaves ---


def test_a_month_is_replaced_by_one_job_with_one_transaction(place: Months, proxy: BigQueryProxy) -> None:
    old, new = run_ids(place, OCTOBER)
    assert published(place, OCTOBER) == {old}
    proxy.calls = []
    assert command(place, "publish", OCTOBER) == 0
    proxy.check_one_job()
    (job,) = proxy.changed("scores")
    assert proxy.changed("runs") == proxy.changed("outcomes") == proxy.changed("quality") == [job]
    sent = [call.job for call in proxy.calls if call.job]
    assert published(place, OCTOBER) == {new}
    assert all(set(job["labels"]) == {"adstocrat_stage", "adstocrat_run"} and job["labels"]["adstocrat_run"] == new for job in sent)
    assert {job["labels"]["adstocrat_stage"] for job in sent} == {"load", "audit", "publish", "count"}
    assert all(int(job["query"]["maximumBytesBilled"]) == place.config.max_bytes_billed for job in sent if "query" in job)
    # All of it again, in the order of runs; the other tables have the month once.
    noted = rows(place, f"SELECT run_id, scored_rows, promoted, why FROM `DATASET.runs` WHERE {of(OCTOBER)} ORDER BY published")
    assert noted == [{"run_id": run, "scored_rows": ROWS, "promoted": True, "why": 'it is "better"'} for run in (old, new)]
    assert rows(place, f"SELECT run_id FROM `DATASET.quality` WHERE {of(OCTOBER)}") == [{"run_id": new}]
    assert rows(place, f"SELECT COUNT(*) AS n, SUM(impressions) AS i, SUM(clicks) AS c FROM `DATASET.outcomes` WHERE {of(OCTOBER)}") == [
        {"n": 400, "i": sum(n % 5 + 1 for n in range(ROWS) if n % 3), "c": sum(n % 2 for n in range(ROWS) if n % 3)}
    ]
    assert not [table for table in connect("p", "US").list_tables(str(place.config.dataset)) if "staging" in table.table_id]


def test_nothing_to_do_is_told_by_the_lake_alone(place: Months, proxy: BigQueryProxy) -> None:
    assert command(place, "publish", OCTOBER) == 0
    proxy.calls = []
    flags = ["publish", OCTOBER, *place.flags]
    code = (
        f"import sys; from beam_jobs.cli import main; main({flags}); print({{'google.cloud.bigquery', 'apache_beam'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "complete, skipped" in done.stdout and done.stdout.splitlines()[-1] == "set()"
    assert proxy.calls == []


def test_tables_and_views_are_described_partitioned_and_clustered(place: Months) -> None:
    client, dataset = connect("p", "US"), place.config.dataset
    for name, about in tables.TABLES.items():
        table = client.get_table(f"{dataset}.{name}")
        assert (table.description, tuple(table.clustering_fields)) == (about.description, about.clustering)
        assert (table.time_partitioning.type_, table.time_partitioning.field) == ("MONTH", "month")
        assert [(field.name, field.description) for field in table.schema] == [
            (field["name"], field["description"]) for field in tables.fields(name, CONTRACT)
        ]
    for name, view in tables.statements("views", {"dataset": dataset, "segments": "", "columns": ""}).items():
        table = client.get_table(f"{dataset}.{name}")
        assert (table.table_type, table.description) == ("VIEW", view.description)


def test_the_views_say_what_plain_code_computes(place: Months) -> None:
    scores = {row["key"]: row for row in rows(place, f"SELECT * FROM `DATASET.scores` WHERE {of(OCTOBER)}")}
    current = {row["key"]: row for row in rows(place, "SELECT * FROM `DATASET.current_scores`")}
    assert current == scores
    changes = rows(place, "SELECT * FROM `DATASET.score_changes`")
    assert {row["key"] for row in changes} == set(scores) and {(row["ad"], row["new_model"]) for row in changes} == {("kept", True)}
    assert all(row["difference"] == row["p_click"] - row["last_p_click"] for row in changes)
    summary = {(row["segment"], row["value"]): row for row in rows(place, f"SELECT * FROM `DATASET.segment_summary` WHERE {of(OCTOBER)}")}
    assert set(summary) == {("overall", None), *(("device", device) for device in DEVICES.to_pylist())}
    mobile = [row["p_click"] for row in scores.values() if row["device"] == "mobile"]
    assert summary["device", "mobile"]["ads"] == len(mobile) == summary["device", "mobile"]["without_image"]
    assert summary["device", "mobile"]["mean_p_click"] == pytest.approx(sum(mobile) / len(mobile))
    # September's scores against October's outcomes.
    bins = rows(place, f"SELECT * FROM `DATASET.calibration` WHERE {of(SEPTEMBER)} ORDER BY p_click_from")
    assert [row["p_click_from"] for row in bins] == [2**-6, 2**-5, 2**-4] and sum(row["ads"] for row in bins) == 400
    expected = sum(scores[f"k{n}"]["p_click"] * (n % 5 + 1) for n in range(ROWS) if n % 3)
    assert sum(row["predicted_clicks"] for row in bins) == pytest.approx(expected)
    assert all(row["calibration"] == pytest.approx(row["predicted_clicks"] / row["clicks"]) for row in bins)
    assert rows(place, f"SELECT image_status, ads, share FROM `DATASET.image_faults` WHERE {of(OCTOBER)}") == [
        {"image_status": "missing", "ads": ROWS, "share": 1.0}
    ]


README = pathlib.Path(__file__).parent.parent.joinpath("README.md").read_text()


def test_the_queries_of_the_readme_run(place: Months) -> None:
    queries = [query for block in re.findall(r"```sql\n(.*?)```", README, re.DOTALL) for query in block.split(";") if query.strip()]
    views = set(tables.statements("views", {"dataset": "", "segments": "", "columns": ""}))
    assert views <= set(re.findall(r"PROJECT\.ads\.(\w+)", "".join(queries)))
    for query in queries:
        rows(place, query.replace("PROJECT.ads", "DATASET"))


# --- What stops it ---


def test_a_change_from_last_month_is_to_be_accepted(
    cloud: dict[str, str], proxy: BigQueryProxy, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], place: Months
) -> None:
    """In November, after the October of all other tests, and taken back from BigQuery by hand."""
    november = "2026-11"
    other = months_in(f"gs://adstocrat/{tmp_path.name}", place.config.dataset, tmp_path, ROWS)
    other.make(november, mean=0.057, devices=pa.array(["mobile"]))
    gone = ["--publish-gone", "device=desktop"]
    proxy.calls = []
    assert command(other, "publish", november, *gone) == 1 and not proxy.changed("scores")
    assert f"audit change_mean refused the scores of {november}, nothing is published; expected: " in capsys.readouterr().err
    assert command(other, "publish", november, *gone, "--accept-shift") == 0 and len(published(other, november)) == 1
    # What was let through is not asked for again.
    rows(place, f"DELETE FROM `DATASET.scores` WHERE {of(november)}")
    other.storage.write(lake.differs(november), b"")
    assert command(other, "publish", november) == 0 and len(published(other, november)) == 1
    for table in tables.TABLES:
        rows(place, f"DELETE FROM `DATASET.{table}` WHERE {of(november)}")


def test_each_audit_finds_what_it_is_for(cloud: dict[str, str]) -> None:
    client, dataset = connect("p", "US"), f"{cloud['GOOGLE_CLOUD_PROJECT']}.audited"
    client.create_dataset(dataset)
    columns = tables.names("scores", CONTRACT)

    def score(key: str | None = "a", p_click: float | None = 0.05, run: str = "r", month: str = OCTOBER) -> str:
        values = {"month": f"DATE '{month}-01'", "key": tables.literal(key), "p_click": tables.literal(p_click), "run_id": f"'{run}'"}
        values |= dict.fromkeys(("evidence_key", "evidence_creative"), "0")
        return ", ".join(values.get(name, "'x'") for name in columns.replace("`", "").split(", "))

    def found(names: Iterable[str]) -> set[str]:
        audits = tables.statements("audits", values)
        return {name for name in names if list(client.query(audits[name].text).result())}

    last = [score("a", month=SEPTEMBER), score("b", month=SEPTEMBER)]
    values = {"staging": f"{dataset}.staged", "scores": f"{dataset}.scores", "rows": 2, "month": OCTOBER, "last": SEPTEMBER, "run": "r"}
    values |= {"max_mean_shift": 0.1, "segments": tables.segments(CONTRACT), "gone": tables.listed([])}
    good = [score("a"), score("b", 0.054)]
    cases = {
        "": good,
        "row_count": good[:1],
        "key_unique": [good[0], good[0]],
        "not_null": [good[0], score(None)],
        "probability_range": [good[0].replace("0.05", "-0.9"), score("b", 1.0)],
        "one_month_one_run": [good[0], score("b", run="s")],
        "change_mean": [good[0], score("b", 0.07)],
        "change_segments": [line.replace("'x'", "'y'") for line in good],
    }
    types = ", ".join(f"`{field['name']}` {field['type']}" for field in tables.fields("scores", CONTRACT))
    client.query(f"CREATE TABLE `{dataset}.scores` ({types}); CREATE TABLE `{dataset}.staged` ({types})").result()
    client.query(f"INSERT INTO `{dataset}.scores` ({columns}) VALUES ({'), ('.join(last)})").result()
    assert set(cases) == {"", *tables.statements("audits", values)}
    for name, lines in cases.items():
        client.query(
            f"DELETE FROM `{dataset}.staged` WHERE TRUE; INSERT INTO `{dataset}.staged` ({columns}) VALUES ({'), ('.join(lines)})"
        ).result()
        assert found([name] if name else cases.keys() - {""}) == ({name} if name else set())
    values["gone"] = tables.listed([("device", "x")])
    assert not found(["change_segments"])


def test_a_column_that_is_there_with_another_type_is_refused(place: Months, proxy: BigQueryProxy, tmp_path: pathlib.Path) -> None:
    from beam_jobs.run import StageError
    from beam_jobs.warehouse import Warehouse

    run = place.deliver(OCTOBER, "2")
    columns = tuple(column if column.name != "device" else type(column)("device", "int", column.tags) for column in CONTRACT.columns)
    changed = MonthRun(run.storage, Contract(columns), run.config, run.month, run.id, (), None, None, ())
    with pytest.raises(StageError, match=r"published.scores has the column 'device' as STRING, the contract as INT64; rename it"):
        Warehouse(changed, ROWS).replace_month({}, {}, ())


# --- Faults ---


# Which call of a publication is broken.
CALLS: dict[str, Where] = {
    "first": lambda before, call: True,
    "first job": lambda before, call: bool(call.job),
    "load": lambda before, call: call.stage == "load",
    "second load": lambda before, call: call.stage == "load" and any(earlier.stage == "load" for earlier in before),
    "audit": lambda before, call: call.stage == "audit",
    "transaction": lambda before, call: call.writes("scores"),
    "its result": lambda before, call: call.method == "GET" and "-publish-" in call.path,
    "count after it": lambda before, call: call.stage == "count" and any(earlier.writes("scores") for earlier in before),
}
CASES = (
    [
        *((fault, where) for fault in ("503", "409", "lost") for where in CALLS if where not in ("first job", "second load")),
        *(("aborted", where) for where in CALLS if where not in ("first", "its result")),
        *(("killed before", where) for where in ("first", "audit", "count after it")),
        *(("killed behind", where) for where in ("load", "transaction", "its result")),
    ]
    if LONG
    else [("lost", "transaction"), ("aborted", "transaction"), ("killed behind", "transaction")]
)


def next_version(place: Months) -> tuple[str, str]:
    """Deliver that run of October that is not published: (the one that is, it)."""
    runs = run_ids(place, OCTOBER)
    (old,) = published(place, OCTOBER)
    new = place.deliver(OCTOBER, "2" if old == runs[0] else "1").id
    assert {old, new} == set(runs)
    return old, new


@pytest.mark.parametrize(("fault", "where"), CASES)
def test_whatever_becomes_of_a_call_the_next_try_completes(place: Months, proxy: BigQueryProxy, fault: str, where: str) -> None:
    """The two runs of October replace each other in turns."""
    old, new = next_version(place)
    proxy.will(fault, CALLS[where])
    if fault.startswith("killed"):
        with subprocess.Popen([sys.executable, "-m", "beam_jobs.cli", "publish", OCTOBER, *place.flags]) as process:
            proxy.kill = process.kill
            assert process.wait() == -signal.SIGKILL
    else:
        command(place, "publish", OCTOBER)
    assert not proxy.fault, "no call was broken"
    calls = list(proxy.calls)
    assert published(place, OCTOBER) in ({old}, {new})
    proxy.calls = calls
    assert command(place, "publish", OCTOBER) == 0
    proxy.check_one_job()
    assert published(place, OCTOBER) == {new}
    assert command(place, "status") == 0


def test_two_jobs_instead_of_one_are_noticed(place: Months, proxy: BigQueryProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    query = Jobs.query

    def in_two(self: Jobs, text: str, stage: str, holds: Any = None) -> list[dict[str, Any]]:
        if stage != "publish":
            return query(self, text, stage, holds)
        begin, delete, *others = text.splitlines()
        query(self, "\n".join((begin, delete, others[-1])), stage, holds)
        return query(self, "\n".join((begin, *others)), "publish-rest", holds)

    _, new = next_version(place)
    with monkeypatch.context() as patched:
        patched.setattr(Jobs, "query", in_two)
        proxy.calls = []
        assert command(place, "publish", OCTOBER) == 0
    with pytest.raises(AssertionError, match="scores was changed in 2 jobs"):
        proxy.check_one_job()
    if new != place.deliver(OCTOBER, "2").id:
        assert command(place, "publish", OCTOBER) == 0


# --- Back, and what is said of it ---


def test_back_forth_and_what_status_says(place: Months, proxy: BigQueryProxy, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = run_ids(place, OCTOBER)

    def status(*more: str) -> tuple[int, str]:
        capsys.readouterr()
        return command(place, "status", *more), capsys.readouterr().out

    def pointers() -> tuple[str, str]:
        current, _ = lake.read_pointer(place.storage, CURRENT, Current)
        champion, _ = lake.read_pointer(place.storage, CHAMPION, Champion)
        assert current and champion and champion.ranker == f"{OCTOBER}-{champion.run}"
        return current.run, champion.run

    assert command(place, "publish", OCTOBER) == 0 and status()[0] == 0 and pointers() == (new, new)
    proxy.calls = []
    assert command(place, "rollback", OCTOBER) == 0
    proxy.check_one_job()
    assert published(place, OCTOBER) == {old} and pointers() == (old, old)
    code, said = status()
    assert code == 0 and said.count(old) == 4 + 1 and f"has the run {new} too; `adstocrat publish {OCTOBER}`" in said
    assert command(place, "publish", OCTOBER) == 0
    assert published(place, OCTOBER) == {new} and pointers() == (new, new)
    assert command(place, "rollback", OCTOBER, "--to", old, "--keep-model") == 0
    assert published(place, OCTOBER) == {old} and pointers() == (old, new)
    assert status()[0] == 0
    assert command(place, "rollback", OCTOBER, "--to", new) == 0 and pointers() == (new, new)
    # Whatever differs, publishing heals it.
    lake.move_pointer(place.storage, CURRENT, Current(OCTOBER, old))
    assert status()[0] == 3
    lake.move_pointer(place.storage, CHAMPION, Champion("e", f"{OCTOBER}-{old}", OCTOBER, old))
    lake.move_pointer(place.storage, CURRENT, Current(OCTOBER, new))
    assert status()[0] == 3 and command(place, "publish", OCTOBER) == 0 and status()[0] == 0
    rows(place, f"DELETE FROM `DATASET.scores` WHERE {of(OCTOBER)} AND key = 'k7'; DELETE FROM `DATASET.runs` WHERE {of(OCTOBER)}")
    code, said = status()
    assert code == 3 and f"they differ; `adstocrat publish {OCTOBER}`" in said
    assert command(place, "publish", OCTOBER) == 0 and status()[0] == 0 and published(place, OCTOBER) == {new}
    code, said = status("--url", "http://127.0.0.1:9")
    assert code == 3 and "http://127.0.0.1:9" in said and "does not say: " in said


def test_what_cannot_be_gone_back_to_is_named(place: Months, proxy: BigQueryProxy, capsys: pytest.CaptureFixture[str]) -> None:
    only = place.deliver(SEPTEMBER, "1").id
    for arguments, message in (
        ((SEPTEMBER,), f"month {SEPTEMBER} has no earlier run to go back to: its only one is {only}, published "),
        (("2025-01",), "month 2025-01 has no earlier run to go back to: none of it was published"),
        ((SEPTEMBER, "--to", "nothing"), f"run 'nothing' of {SEPTEMBER} is not in {place.config.lake}"),
        (
            (SEPTEMBER, "--to", place.deliver(SEPTEMBER, "unfinished").id),
            "is not whole: it has no rows, creatives, evaluation, scores, lookup",
        ),
    ):
        assert command(place, "rollback", *arguments) == 1
        assert message in capsys.readouterr().err
    place.deliver(SEPTEMBER, "1")


def test_a_late_file_makes_a_run_due(place: Months, proxy: BigQueryProxy, capsys: pytest.CaptureFixture[str]) -> None:
    late = place.deliver(OCTOBER, "late")
    capsys.readouterr()
    assert command(place, "status") == 0
    said = capsys.readouterr().out
    assert re.search(rf"{OCTOBER} has other ads now than run \w+; `adstocrat month {OCTOBER}` makes run {late.id} of it", said)
    assert command(place, "status", "--seed", "7") == 0 and "has other ads, settings now" in capsys.readouterr().out
    place.deliver(OCTOBER, "2")


# --- Rollback behind a server ---


@contextlib.contextmanager
def server(uri: str, cache: pathlib.Path) -> Iterator[str]:
    arguments = ["--lake", uri, "--port", "0", "--probes-port", "0", "--poll-seconds", "0.5", "--cache", str(cache)]
    with subprocess.Popen([sys.executable, "-m", "serving", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield re.search(r"http://[\w.:]+", process.stdout.readline())[0]  # type: ignore[index]
        finally:
            process.send_signal(signal.SIGTERM)


def served_run(url: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{url}/v1/status", timeout=5) as answer:
            return json.load(answer)["run_id"]
    except OSError:
        return None


def in_a_process(place: Months, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "beam_jobs.cli", *arguments, *place.flags], check=False).returncode


@pytest.mark.alone
def test_every_server_follows_a_rollback(cloud: dict[str, str], proxy: BigQueryProxy, tmp_path: pathlib.Path) -> None:
    """Forth is a rollback too: to the later run."""
    dataset, count, launch = f"{cloud['GOOGLE_CLOUD_PROJECT']}.served", 2 if LONG else 1, in_a_process if LONG else command
    place = months_in("gs://adstocrat/served", dataset, tmp_path, 1_000_000 if LONG else 2_000, served=True)
    versions, urls = [], []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for version in "12":
            versions.append(place.make(OCTOBER, version).id)
            assert command(place, "publish", OCTOBER) == 0
            urls = urls or [stack.enter_context(server(place.config.lake, tmp_path / f"cache-{number}")) for number in range(count)]
            while {served_run(url) for url in urls} != {versions[-1]}:
                time.sleep(0.05)
        for to in versions:
            began = time.monotonic()
            done = pool.submit(launch, place, "rollback", OCTOBER, "--to", to)
            while lake.read_pointer(place.storage, CURRENT, Current)[0] != Current(OCTOBER, to):
                assert not done.done() or done.result() == 0
                time.sleep(0.01)
            moved = time.monotonic()
            while {served_run(url) for url in urls} != {to}:
                time.sleep(0.01)
            followed = time.monotonic() - moved
            assert done.result() == 0
            took = time.monotonic() - began
            print(f"rollback of {place.rows:,} rows: {count} servers followed after {followed:.2f} s, all of it took {took:.1f} s")
            assert not LONG or (followed <= 2 and took <= 30)
            assert published(place, OCTOBER) == {to}
            assert command(place, "status", "--url", *urls) == 0
