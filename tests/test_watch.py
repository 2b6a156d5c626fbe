"""A month that an alarm stops, and what the webhook is told of it and of one that is published."""

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_month import AUGUST, BID, CLICKED, DEVICE, KEY, SEPTEMBER, deliver, run

from beam_jobs import drift
from schemas import lake
from schemas.lake import Current
from schemas.storage import Folder


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[dict]]]:
    """A server that takes what is posted to it: its URL, and that."""
    told: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_alarm_stops_the_month_and_the_webhook_is_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, columns = Folder(str(tmp_path / "lake")), (KEY, DEVICE, BID, CLICKED)
    deliver(storage, AUGUST, images=0)
    deliver(storage, SEPTEMBER, images=0)
    name = lake.raw_ads(SEPTEMBER) + "ads.csv"
    header, *lines = storage.read(name).decode().split()
    rows = [line.split(",") for line in lines]
    # The bids are in cents now.
    storage.write(name, "\n".join([header, *(",".join([*row[:3], f"{100 * float(row[3]):.1f}", row[4]]) for row in rows)]).encode())
    with webhook() as (url, told):
        assert run(storage, tmp_path, AUGUST, *columns, flags=("--notify", url)) == 0
        assert run(storage, tmp_path, SEPTEMBER, *columns, flags=("--notify", url, "--monitor-stop", "bid")) == 4
        # Stopped it stays, and whoever lets it pass says so.
        assert run(storage, tmp_path, SEPTEMBER, *columns, flags=("--monitor-stop", "bid")) == 4
        current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
        assert current is not None and current.month == AUGUST and not storage.names(f"models/ranker/{SEPTEMBER}")
        assert run(storage, tmp_path, SEPTEMBER, *columns, flags=("--notify", "http://127.0.0.1:9/nobody")) == 0
    published, stopped = told
    assert (published["event"], published["month"], published["status"], published["why"], published["alarms"]) == (
        *("published", AUGUST, 0, None),
        [],
    )
    assert (stopped["event"], stopped["month"], stopped["status"], stopped["lake"]) == ("stopped", SEPTEMBER, 4, storage.uri)
    assert stopped["alarms"][0].startswith("ALARM drift bid: mean ") and "drift bid: mean " in stopped["why"]
    assert "stopped before anything is trained: drift bid" in capsys.readouterr().err
    assert "http://127.0.0.1:9/nobody was not told how 2026-09 ended" in caplog.text
    last = caplog.messages[-2] if "was not told" in caplog.messages[-1] else caplog.messages[-1]
    assert last.startswith("ALARM drift bid: mean ") and last.endswith("balanced")
    assert drift.headlines(storage, SEPTEMBER, stopped["run"])[0] == last.splitlines()[0]
