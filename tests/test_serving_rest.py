"""The service over HTTP: what it answers, to whom, and what it does when a run is published, corrupt or rolled back, or it is stopped."""

import contextlib
import datetime
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import format_datetime
from urllib.parse import quote

import pytest
from served import CREATED, FAULTS, ODD_KEYS, SAME_FOR_ALL, Client, Server, eventually, publish, row, serving

from schemas.lake import CURRENT, move_pointer
from schemas.storage import Folder
from serving import __main__ as command
from serving import tokens
from serving.client import Client as TypedClient
from serving.client import ServiceError

KEYS = [*ODD_KEYS, *(f"ad{i}" for i in range(20_000))]


@pytest.fixture
def lake(tmp_path: pathlib.Path) -> Folder:
    (tmp_path / "lake").mkdir()
    return Folder(str(tmp_path / "lake"))


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers that serve r1 of 2026-10 throughout the module."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "lake").mkdir()
    lake = Folder(str(folder / "lake"))
    move_pointer(lake, CURRENT, publish(lake, folder, "2026-10", "r1", KEYS))
    with serving(lake.uri, folder / "cache", "--workers", "2") as server:
        eventually(server.ready)
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    client = server.client()
    yield client
    client.connection.close()


# --- answers ------------------------------------------------------------------------------------------------------------------------------


def test_a_score_is_the_stored_row_with_its_run(client: Client) -> None:
    status, headers, body = client("/v1/scores/plain")
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "application/json", "no-cache")
    assert body.startswith(row("plain")[:-1] + b"," + json.dumps(SAME_FOR_ALL, separators=(",", ":")).encode()[1:-1] + b',"age_days":')
    for key in ODD_KEYS:
        status, _, body = client("/v1/scores/" + quote(key, safe=""))
        values = json.loads(body)
        assert (status, values.pop("age_days") > 0, values) == (200, True, {**json.loads(row(key)), **SAME_FOR_ALL})
    assert client("/v1/scores/a/b//c")[0] == 200  # Slashes may stay as they are,
    assert client("/v1/scores/a+b?x=1")[0] == 200  # a plus is a plus, and a query is no part of the key.
    status, headers, nothing = client("/v1/scores/" + quote(ODD_KEYS[-1]), "HEAD")
    assert (status, int(headers["content-length"]), nothing) == (200, len(body), b"")


def test_a_cache_asks_whether_the_run_is_still_served(client: Client) -> None:
    _, headers, _ = client("/v1/scores/plain")
    assert (headers["etag"], headers["last-modified"]) == ('W/"r1"', format_datetime(datetime.datetime.fromisoformat(CREATED), usegmt=True))
    for known in ('W/"r1"', '"r1"', '"r0", W/"r1"', "*"):
        status, again, body = client("/v1/scores/plain", If_None_Match=known)
        assert (status, body, again["etag"], again["cache-control"]) == (304, b"", 'W/"r1"', "no-cache")
    assert client("/v1/scores/plain", If_None_Match='"r0"')[0] == 200
    assert client("/v1/scores/absent", If_None_Match='"r1"')[0] == 404


def test_a_batch_keeps_order_and_repeats_and_says_null(client: Client) -> None:
    keys = [*reversed(ODD_KEYS), "absent", "plain", "plain", "", "x" * 600]
    status, headers, body = client("/v1/scores:lookup", "POST", json.dumps({"keys": keys}).encode())
    answer = json.loads(body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer.pop("scores") == [json.loads(row(key)) if key in ODD_KEYS else None for key in keys]
    assert answer.pop("age_days") > 0 and answer == SAME_FOR_ALL
    for keys in ([], [f"ad{i}" for i in range(10_000)]):
        scores = json.loads(client("/v1/scores:lookup", "POST", json.dumps({"keys": keys}).encode())[2])["scores"]
        assert [score["key"] for score in scores] == keys


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 400, "The body is no JSON"),
        (b'{"keys": ["a"]', 400, "The body is no JSON"),
        (b'{"keys": ["\xff"]}', 400, "The body is no JSON"),
        (b"[" * 100_000, 400, "The body is no JSON"),
        (b"9" * 5000, 400, "The body is no JSON"),
        (b'["a"]', 400, "of another form"),
        (b"{}", 400, "of another form"),
        (b'{"keys": "a"}', 400, "of another form"),
        (b'{"keys": [], "more": 1}', 400, "of another form"),
        (b'{"keys": ["a", 1]}', 400, "A key is no string"),
        (b'{"keys": ["\\ud800"]}', 400, "half of a surrogate pair"),
        (json.dumps({"keys": ["a"] * 10_001}).encode(), 400, "There are 10,001 keys; expected at most 10,000 in a batch."),
        (b'{"keys": ["' + b"x" * (16 << 20) + b'"]}', 413, "A body has at most 16,777,216 bytes"),
    ],
)
def test_a_batch_that_is_none_is_refused(client: Client, body: bytes, status: int, detail: str) -> None:
    values, _ = client.problem("/v1/scores:lookup", "POST", body)
    assert values["status"] == status and detail in values["detail"]
    client.connection.close()
    assert client("/v1/scores/plain")[0] == 200


def test_what_is_wrong_with_a_request_is_told_as_problem_details(client: Client) -> None:
    detail = "Month 2026-10 has no score under the key 'ad 7 ü'."
    assert client.problem("/v1/scores/ad%207%20%C3%BC")[0] == {"type": "about:blank", "title": "Not Found", "status": 404, "detail": detail}
    assert len(client.problem("/v1/scores/" + "x" * 9000)[0]["detail"]) < 200
    values, _ = client.problem("/v1/scores/%FF%FE")
    assert (values["status"], values["title"]) == (400, "Bad Request") and "not UTF-8" in values["detail"]
    assert client.problem("/v1/scores/")[0]["status"] == 400
    for path, methods, allowed in (
        ("/v1/scores/plain", ("POST", "PUT", "DELETE", "OPTIONS"), {"GET", "HEAD"}),
        ("/v1/status", ("POST",), {"GET", "HEAD"}),
        ("/v1/scores:lookup", ("GET", "PATCH"), {"POST"}),
    ):
        for method in methods:
            values, headers = client.problem(path, method)
            assert (values["status"], set(headers["allow"].split(", "))) == (405, allowed)
    for path in ("/", "/v1/scores", "/v1/status/", "/healthz", "/metrics"):
        values, _ = client.problem(path)
        assert (values["status"], values["detail"].partition(";")[0]) == (404, f"There is no {path} here")


def test_many_requests_in_few_pieces_are_all_answered(server: Server) -> None:
    """Their headers are short one by one, and they come cut anywhere."""
    request, count = b"GET /v1/scores/plain HTTP/1.1\r\nhost: x\r\n\r\n", 2_000
    sent, answers = request * count, b""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        for start in range(0, len(sent), 1447):
            connection.sendall(sent[start : start + 1447])
            whole = (start + min(1447, len(sent) - start)) // len(request)
            while answers.count(b"HTTP/1.1 200 OK") < whole or not answers.endswith(b"}"):
                answers += (some := connection.recv(1 << 16))
                assert some
    assert answers.count(b"HTTP/1.1 ") == count


def test_status_and_probes_and_metrics_tell_what_is_served(server: Server, client: Client) -> None:
    values = json.loads(client("/v1/status")[2])
    assert values.pop("age_days") > 0 and values == {**SAME_FOR_ALL, "rows": len(KEYS)}
    assert server.probe("/healthz") == (200, b'{"status":"ok"}') and server.probe("/readyz") == (200, b'{"status":"ready"}')

    def counts() -> list[float]:
        found = ['scores",status="200', 'scores",status="404', 'scores",status="304', 'lookup",status="200']
        names = [f'adstocrat_requests_total{{route="{name}"}}' for name in found]
        return [server.metric(name) for name in (*names, *(f'adstocrat_lookups_total{{result="{result}"}}' for result in ("hit", "miss")))]

    before = counts()
    for path in ("plain", "absent", "plain"):
        client(f"/v1/scores/{path}")
    client("/v1/scores/plain", If_None_Match="*")
    client("/v1/scores:lookup", "POST", b'{"keys": ["plain", "absent", "absent", "ad1", "ad2"]}')
    assert [after - earlier for after, earlier in zip(counts(), before, strict=True)] == [2, 1, 1, 1, 3 + 3, 1 + 2]
    assert server.metric('adstocrat_run_info{model_version="r1",month="2026-10",run_id="r1"}') == 1
    assert server.metric("adstocrat_rows") == len(KEYS) and server.metric("adstocrat_age_days") > 0
    assert server.metric('adstocrat_request_seconds_count{route="scores"}') == sum(
        server.metric(f'adstocrat_requests_total{{route="scores",status="{status}"}}') for status in (200, 304, 400, 404, 405)
    )


def test_the_client_asks_for_one_or_many(server: Server) -> None:
    with TypedClient(server.url) as client:
        for key in ODD_KEYS:
            found = client.get(key)
            assert found is not None and (found["key"], found["run_id"]) == (key, "r1")
        assert client.get("absent") is None and client.status()["rows"] == len(KEYS)
        keys = [f"ad{i}" for i in range(20_000)] + ["absent"]
        batch = client.lookup(keys)
        assert (batch.run_id, batch.month) == ("r1", "2026-10") and batch.scores[-1] is None
        assert [score and score["key"] for score in batch.scores[:-1]] == keys[:-1]
        assert client.lookup([]).scores == []
    with (
        TypedClient(server.url + "/elsewhere") as client,
        pytest.raises(ServiceError, match="404: There is no /elsewhere/v1/status") as caught,
    ):
        client.status()
    assert caught.value.status == 404


def test_the_client_tries_again() -> None:
    """Against a socket that closes, says 503, and then answers."""
    answer = b'{"rows": 1}'
    script = [
        b"",
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 0\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer),
    ]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        code = f"from serving.client import Client; print(dict(Client({url!r}).status()))"
        environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(command.__file__).parent.parent)}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for part in script:
            connection, _ = listener.accept()
            assert connection.recv(4096).startswith(b"GET /v1/status ")
            connection.sendall(part)
            connection.close()
        assert process.communicate(timeout=10)[0] == "{'rows': 1}\n"


# --- tokens -------------------------------------------------------------------------------------------------------------------------------


def test_only_who_has_a_token_is_answered(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS))
    file = tmp_path / "tokens"
    good, other = tokens.add(file, "reader"), tokens.add(file, "other")
    assert file.stat().st_mode & 0o777 == 0o600 and good.partition(".")[2] not in file.read_text()
    with serving(lake.uri, cache, "--tokens", str(file), "--host", "127.0.0.1") as server:
        eventually(server.ready)
        client = server.client()

        def status(token: str | None, path: str = "/v1/scores/plain", scheme: str = "Bearer") -> int:
            status, headers, body = client(path, **({} if token is None else {"Authorization": f"{scheme} {token}"}))
            assert (status == 401) == ("www-authenticate" in headers) and json.loads(body)
            return status

        for path in ("/v1/scores/plain", "/v1/scores/absent", "/v1/status", "/openapi.json", "/none"):
            expected = {"/v1/scores/plain": 200, "/v1/status": 200, "/openapi.json": 200}.get(path, 404)
            assert status(good, path) == status(other, path) == status(good, path, "bearer") == expected
            name, _, secret = good.partition(".")
            wrong = [
                "",
                name,
                f"{name}.",
                f"{name}.{secret}x",
                f"{name}.{secret[:-1]}",
                f"other.{secret}",
                f"none.{secret}",
                f".{secret}",
                "ü",
            ]
            assert {status(token, path) for token in (None, *wrong)} == {status(good, path, "Basic")} == {401}
        assert client("/v1/scores:lookup", "POST", b'{"keys": []}')[0] == 401
        document = json.loads(client("/openapi.json", Authorization=f"Bearer {good}")[2])
        assert document["security"] == [{"token": []}] and "401" in document["paths"]["/v1/status"]["get"]["responses"]
        assert [server.probe(path)[0] for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
        with TypedClient(server.url, token=other) as typed:
            assert typed.get("plain") is not None

        file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("reader:")))
        eventually(lambda: status(good) == 401)
        assert status(other) == 200
        file.write_text("not a token\n")
        eventually(lambda: "tokens:1 is no token" in server.log)
        assert status(other) == 200
        new = tokens.add(file.with_name("new"), "reader")
        os.replace(file.with_name("new"), file)
        eventually(lambda: status(new) == 200)
        assert status(other) == 401
        client.connection.close()


def test_without_tokens_nobody_else_is_let_in(lake: Folder, cache: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lake", lake.uri, "--cache", str(cache), "--port", "0", "--probes-port", "0"]
    with pytest.raises(SystemExit) as exit_:
        command.main([*flags, "--host", "0.0.0.0"])
    assert exit_.value.code == 2 and "name a file of --tokens, or say --insecure" in capsys.readouterr().err
    with serving(lake.uri, cache, "--host", "0.0.0.0", "--insecure") as server:
        assert server.probe("/healthz")[0] == 200


@pytest.mark.parametrize(
    ("line", "message"), [("a:b:c", "tokens:1 is no token"), ("x" * 32, "tokens:1 is no token"), (None, "No such file")]
)
def test_a_token_file_that_is_none_is_told(
    line: str | None, message: str, lake: Folder, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if line:
        (tmp_path / "tokens").write_text(line)
    with pytest.raises(SystemExit):
        command.main(["--lake", lake.uri, "--port", "0", "--probes-port", "0", "--tokens", str(tmp_path / "tokens")])
    assert message in capsys.readouterr().err


def test_a_token_is_made_once(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens.main([str(tmp_path / "tokens"), "reader"])
    assert tokens.Tokens(tmp_path / "tokens").allows(b"Bearer " + capsys.readouterr().out.strip().encode())
    for name, message in (("reader", "is taken"), ("a b", "is not made of letters")):
        with pytest.raises(SystemExit):
            tokens.main([str(tmp_path / "tokens"), name])
        assert message in capsys.readouterr().err


# --- runs ---------------------------------------------------------------------------------------------------------------------------------


def test_nothing_published_is_not_ready(lake: Folder, cache: pathlib.Path) -> None:
    with serving(lake.uri, cache) as server:
        eventually(lambda: b"published yet" in server.probe("/readyz")[1])
        assert server.probe("/readyz")[0] == 503 and server.probe("/healthz")[0] == 200
        client = server.client()
        for path in ("/v1/scores/plain", "/v1/status"):
            values, headers = client.problem(path)
            detail = "No lookup table is published yet; the first published month will be served without a restart."
            assert (values["detail"], headers["retry-after"]) == (detail, "1")
        assert client.problem("/v1/scores:lookup", "POST", b'{"keys": []}')[0]["status"] == 503
        client.connection.close()


def test_a_new_run_is_served_and_a_corrupt_one_is_not(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def run_id() -> str:
        status, _, body = client("/v1/scores/plain")
        values = json.loads(body)
        # Row and run always belong together.
        assert (status, values["p_click"]) == (200, {"r1": 0.1, "r2": 0.2, "r4": 0.4}[values["run_id"]])
        return values["run_id"]  # type: ignore[no-any-return]

    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS, p_click=0.1))
    with serving(lake.uri, cache, "--workers", "2") as server:
        eventually(server.ready)
        client = server.client()
        assert run_id() == "r1"
        move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-11", "r2", [*ODD_KEYS, "new"], shards=5, p_click=0.2))
        eventually(lambda: run_id() == "r2")
        assert json.loads(client("/v1/scores/new")[2])["month"] == "2026-11"

        corrupt = publish(lake, tmp_path, "2026-12", "r3", ODD_KEYS)
        FAULTS["flipped bit"][0](lake, corrupt)
        move_pointer(lake, CURRENT, corrupt)
        eventually(lambda: "Refused run r3 of 2026-12, still serving run r2 of 2026-11: " in server.log)
        assert server.metric("adstocrat_refused_swaps_total") >= 1 and server.metric("adstocrat_swaps_total") == 1
        assert run_id() == "r2" and server.ready()

        move_pointer(lake, CURRENT, publish(lake, tmp_path, "2027-01", "r4", ODD_KEYS, p_click=0.4))
        eventually(lambda: run_id() == "r4")
        pathlib.Path(lake.uri, CURRENT).write_bytes(b"no pointer")
        eventually(lambda: "Cannot read lookup/CURRENT, still serving run r4" in server.log)
        assert server.log.count("Cannot read") == 1 and run_id() == "r4"
        # Rolling back is moving the pointer to an earlier run, which needs no shard of the lake.
        for path in pathlib.Path(lake.uri, "lookup/2026-11/r2").glob("shard-*"):
            path.unlink()
        pathlib.Path(lake.uri, CURRENT).write_text('{"month": "2026-11", "run": "r2"}')
        eventually(lambda: run_id() == "r2")
        assert {path.name for path in cache.iterdir()} == {".lock", "2026-11.r2", "2027-01.r4"}

        # A worker that dies is replaced, and serves what the others do.
        victim = server.workers()[0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: "is started again" in server.log and victim not in server.workers() and server.ready())
        client.connection.close()
        assert run_id() == "r2"
        client.connection.close()


def test_a_first_run_that_is_corrupt_is_tried_again(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    path = next(pathlib.Path(lake.uri, "lookup/2026-10/r1").glob("shard-00001-*"))
    data = path.read_bytes()
    FAULTS["truncated"][0](lake, current)
    move_pointer(lake, CURRENT, current)
    with serving(lake.uri, cache) as server:
        eventually(lambda: b"cannot be loaded" in server.probe("/readyz")[1])
        client = server.client()
        assert client.problem("/v1/scores/plain")[0]["status"] == 503
        path.write_bytes(data)
        eventually(lambda: client("/v1/scores/plain")[0] == 200)
        client.connection.close()


# --- command ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_requests_end(number: signal.Signals, lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    move_pointer(lake, CURRENT, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS))
    with serving(lake.uri, cache) as server:
        eventually(server.ready)
        body = b'{"keys": ["plain"]}'
        with socket.create_connection(("127.0.0.1", server.port)) as under_way:
            under_way.sendall(b"POST /v1/scores:lookup HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body[:5]))
            time.sleep(0.3)
            server.process.send_signal(number)
            eventually(lambda: server.probe("/readyz") == (503, b'{"status":"stopping"}'))
            time.sleep(0.5)
            assert server.process.poll() is None
            under_way.sendall(body[5:])
            answer = http.client.HTTPResponse(under_way)
            answer.begin()
            assert answer.status == 200 and json.loads(answer.read())["scores"] == [json.loads(row("plain"))]
            assert under_way.recv(1) == b""
        assert server.process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lake", "/nowhere/lake"], "there is no lake at /nowhere/lake"),
        (["--lake", "s3://bucket"], "unknown scheme"),
        (["--lake", "."], "cannot listen on 127.0.0.1 port"),
        (["--lake", ".", "--port", "70000"], "port is 70000; expected 0 to 65535"),
        (["--lake", ".", "--workers", "0"], "workers is 0; expected 1 to 256"),
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
    for modules, heavy in (
        (
            "serving.worker",
            {"apache_beam", "numpy", "pyarrow", "tensorflow", "keras", "google.cloud.storage", "requests", "prometheus_client"},
        ),
        ("serving.supervisor", {"apache_beam", "numpy", "pyarrow", "tensorflow", "keras", "google.cloud.storage", "requests"}),
        ("serving.__main__", {"uvicorn", "numpy"}),
        ("serving.client", {"uvicorn", "numpy"}),
    ):
        code = f"import sys, {modules}; print(*sys.modules)"
        loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
        assert not loaded & heavy
