"""The local cloud's storage server: gcp-storage-emulator, made quick and strict enough to stand in for a bucket.

    python -m beam_jobs.local_storage PORT FOLDER PARENT      # `beam_jobs.local_cloud` starts it so

Five things differ from the emulator as it comes. Its index is written about once a second instead of at each put, and always before
the process ends. Connections are kept alive, each on a thread of its own. `ifGenerationMatch` is enforced, since create-once and
compare-and-swap rest on it. A range of a file is read without the rest of it. And `POST /token` hands out a token, so that default
credentials work and nobody asks Google for one.
"""

import io
import json
import mmap
import os
import pathlib
import signal
import sys
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router, _read_raw_data
from gcp_storage_emulator.storage import Storage

from beam_jobs.local_cloud import BUCKET, die_with

FLUSH_SECONDS = 1.0
FLUSH_SHARE = 0.05


class PreconditionFailed(Exception):
    """The object's generation is not the one that the request asked for."""


class Index(Storage):
    """The emulator's storage with a deferred index and checked generations; every method is called with `lock` held.

    Attributes:
        lock: what the request threads and the flush take turns by; the emulator itself expects a single thread.
        expected: the generation that the request in hand insists on, 0 for an absent object, None for any.
        reading: whether that request is a GET.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.lock = threading.Lock()
        self.expected: int | None = None
        self.reading = False
        self._dirty = False
        self._meta = folder / ".meta"
        super().__init__(data_dir=str(folder.parent))

    def flush(self) -> None:
        """Write the index if it changed: whole, or not at all."""
        if self._dirty:
            parts = ("buckets", "objects", "resumable", "bucket_iam_policies", "soft_deleted")
            temporary = self._meta.with_suffix(".new")
            temporary.write_text(json.dumps({part: getattr(self, part) for part in parts}))
            os.replace(temporary, self._meta)
            self._dirty = False

    def _write_config_to_file(self) -> None:
        self._dirty = True

    def _bucket_soft_delete_retention_seconds(self, bucket_name: str) -> int:
        return 0  # The emulator would keep a copy of every deleted object for a week.

    def create_file(self, bucket_name: str, file_name: str, content: bytes, file_obj: dict[str, Any], file_id: str | None = None) -> None:
        self._check(bucket_name, file_name)
        # The link holds the port of the moment, which another start may not get again; without it clients build their own.
        file_obj.pop("mediaLink", None)
        super().create_file(bucket_name, file_name, content, file_obj, file_id)

    def delete_file(self, bucket_name: str, file_name: str) -> None:
        self._check(bucket_name, file_name)
        super().delete_file(bucket_name, file_name)

    def get_file(self, bucket_name: str, file_name: str, show_error: bool = True) -> Any:
        path = self._store._disk_path(self._object_path(bucket_name, file_name))
        if not (self.reading and path.is_file() and path.stat().st_size):
            return super().get_file(bucket_name, file_name, show_error)
        # The emulator takes a range out of the file; mapped, a part of a big one does not cost all of it.
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def get_file_obj(self, bucket_name: str, file_name: str) -> Any:
        # A copy reads its source here too, but its condition is about the destination.
        found = super().get_file_obj(bucket_name, file_name)
        if self.reading:
            self._check(bucket_name, file_name)
        return found

    def _check(self, bucket_name: str, file_name: str) -> None:
        generation = int(self.objects.get(bucket_name, {}).get(file_name, {}).get("generation", 0))
        if self.expected not in (None, generation):
            raise PreconditionFailed(f"{bucket_name}/{file_name} has generation {generation}, expected {self.expected}")


class Handler(RequestHandler):
    """One connection: bodies are read and answers sent outside the index's lock, so a slow client holds nobody up."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rfile: Any
    wfile: Any

    def do_GET(self) -> None:
        body = _read_raw_data(self) or b""
        for header in ("Transfer-Encoding", "Content-Length"):
            del self.headers[header]
        self.headers["Content-Length"] = str(len(body))
        url = urlsplit(self.path)
        if (self.command, url.path) == ("POST", "/token"):
            self._send_json(200, {"access_token": "local", "token_type": "Bearer", "expires_in": 3600})
            return
        condition = parse_qs(url.query).get("ifGenerationMatch")
        answer = io.BytesIO()
        socket_in, socket_out = self.rfile, self.wfile
        self.rfile, self.wfile = io.BytesIO(body), answer
        try:
            with self.storage.lock:
                self.storage.expected = int(condition[0]) if condition else None
                self.storage.reading = self.command == "GET"
                Router(self).handle(self.command)
        except PreconditionFailed as error:
            self._send_json(412, {"error": {"code": 412, "message": str(error)}})
        except OSError as error:
            # Such as a name that is a folder of other names here. A connection that just broke off would be retried for two minutes.
            self._send_json(400, {"error": {"code": 400, "message": str(error)}})
        finally:
            self.rfile, self.wfile = socket_in, socket_out
        self.wfile.write(answer.getvalue())

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _send_json(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A listener with room for as many clients at once as a fetching pool has threads."""

    request_queue_size = 256


def serve(port: int, folder: pathlib.Path) -> None:
    """Serve `folder` on loopback until SIGTERM or SIGINT; on return all that was acknowledged is on disk."""
    stopped: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: stopped.append(number))
    index = Index(folder)
    buckets.create_bucket(BUCKET, index)
    server = Server(("127.0.0.1", port), partial(Handler, index))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pause, flushed = FLUSH_SECONDS, time.monotonic()
    while not stopped:
        time.sleep(0.05)
        if time.monotonic() - flushed > pause:
            began = time.monotonic()
            with index.lock:
                index.flush()
            flushed = time.monotonic()
            # The index grows with the bucket: writing it may take a fixed share of the time, however long it gets.
            pause = max(FLUSH_SECONDS, (flushed - began) / FLUSH_SHARE)
    server.shutdown()
    # Never released: a connection still open must not have anything acknowledged that this last flush misses.
    index.lock.acquire()
    index.flush()


if __name__ == "__main__":
    die_with(int(sys.argv[3]))
    serve(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
