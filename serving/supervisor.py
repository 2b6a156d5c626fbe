"""The one process that follows the pointer, fetches and verifies runs, keeps the workers alive, and answers probes on a port of its own.

The workers only map what was verified here. They share one listening socket, so a worker that ends takes no waiting connection with it.
"""

import dataclasses
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from mmap import mmap
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from schemas.lake import CURRENT, Current, differs, read_pointer
from schemas.storage import Storage
from serving.app import JSON, Receive, Scope, Send, dumps, reply
from serving.counters import BYTES, Counters
from serving.metrics import Served
from serving.store import TableRefused, fetch
from serving.worker import GRACE_SECONDS, uvicorn_config

_LONGEST_PAUSE = 300.0
# Between two looks at the workers; and for a worker to map a run, before it counts as dead.
_RESTART_SECONDS, _ANSWER_SECONDS = 0.5, 30.0

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        cache: a folder for copies of this lake's tables.
        workers: processes that answer.
        connections: that a worker takes; beyond them it answers 503 and closes.
        poll_seconds: how often to look whether `lookup/CURRENT` moved.
        tokens: a file of bearer tokens; None lets everybody ask.
    """

    cache: pathlib.Path
    workers: int
    connections: int
    poll_seconds: float
    tokens: pathlib.Path | None


class Supervisor:
    """`run` serves a lake on two sockets until `stop` is set."""

    def __init__(self, storage: Storage, options: Options, listener: socket.socket, probes: socket.socket) -> None:
        self.stop = threading.Event()
        self._storage, self._options, self._listener, self._probes = storage, options, listener, probes
        self._counts = tempfile.TemporaryFile()  # noqa: SIM115  For as long as the process lives.
        self._counts.truncate(BYTES * options.workers)
        memory = mmap(self._counts.fileno(), 0)
        self.served = Served([Counters(memory, worker) for worker in range(options.workers)])
        self._message = {"waiting": "The lookup table is being loaded; try again soon."}
        # Guards the workers, which one thread hands a run to and another replaces when they die.
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._failed: Current | None = None
        self._pause = self._retry_at = 0.0
        self._logged = ""

    def run(self) -> None:
        """Serve; returns when all requests that were under way at the stop are answered."""
        self._workers = [self._start(worker) for worker in range(self._options.workers)]
        probes = uvicorn.Server(uvicorn_config(self._probe, interface="asgi3"))
        threads = [threading.Thread(target=probes.run, args=([self._probes],)), threading.Thread(target=self._watch)]
        for thread in threads:
            thread.start()
        while not self.stop.wait(_RESTART_SECONDS):
            for number, worker in enumerate(self._workers):
                if worker.process.poll() is not None:
                    logger.error("Worker %d ended with status %d and is started again.", number, worker.process.returncode)
                    self._replace(number)
        # From here on /readyz fails; connections that still come would wait for nobody.
        self._listener.close()
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.end(GRACE_SECONDS + 5)
        probes.should_exit = True
        for thread in threads:
            thread.join()
        if self.served.table:
            self.served.table.close()

    def _start(self, number: int) -> "_Worker":
        options = self._options
        ours, theirs = socket.socketpair()
        fds = {"listener": self._listener.fileno(), "control": theirs.fileno(), "counters": self._counts.fileno()}
        settings = {**fds, "worker": number, "tokens": str(options.tokens or ""), "connections": options.connections}
        command = [sys.executable, "-m", "serving.worker", json.dumps(settings)]
        path = os.pathsep.join(filter(None, [str(pathlib.Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
        # What a batch took is there again for the next: given back to the system, it would cost a page fault every 4 KiB.
        memory = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
        process = subprocess.Popen(command, pass_fds=list(fds.values()), env={**memory, **os.environ, "PYTHONPATH": path})
        theirs.close()
        return _Worker(process, ours)

    def _replace(self, number: int) -> None:
        with self._lock:
            self._workers[number].end(0)
            self._workers[number] = worker = self._start(number)
            worker.tell(self._message)

    def _tell(self, message: dict[str, str]) -> list[str]:
        """Hand all workers the same, and return what went wrong."""
        with self._lock:
            self._message = message
            answers = [worker.tell(message) for worker in self._workers]
        return [answer["error"] for answer in answers if "error" in answer]

    def _watch(self) -> None:
        while not self.stop.is_set():
            self._look()
            self.stop.wait(self._options.poll_seconds)

    def _look(self) -> None:
        """Follow the pointer once. Whatever goes wrong is logged, and what is served stays."""
        current: Current | None = None
        table = self.served.table
        try:
            current, _ = read_pointer(self._storage, CURRENT, Current)
            if current is None:
                self._log(logging.WARNING, f"Nothing to serve yet: {self._storage.uri} has no {CURRENT}; a month will be once published.")
                self._wait("No lookup table is published yet; the first published month will be served without a restart.")
                return
            self.served.differs = self._storage.read_versioned(differs(current.month))[0] is not None
            if table is not None and current == Current(table.month, table.run):
                self._failed = None
            elif current != self._failed or time.monotonic() >= self._retry_at:
                self._swap(current)
        except Exception as error:  # noqa: BLE001  A lake may fail in any way, and the service must outlive all of them.
            if self.stop.is_set():
                return
            refused = isinstance(error, TableRefused)
            self.served.refused += refused
            if current is None:
                tried = f"Cannot read {CURRENT}"
            else:
                # A table is large: it is not fetched again at every look, though once more soon, since a copy can fail on its way.
                again = current == self._failed
                self._pause = min(2 * self._pause, _LONGEST_PAUSE) if again else self._options.poll_seconds
                self._failed, self._retry_at = current, time.monotonic() + self._pause
                tried = f"{'Refused' if refused else 'Cannot load'} run {current.run} of {current.month}"
            still = f"still serving run {table.run} of {table.month}" if table else "nothing is served"
            self._log(logging.ERROR, f"{tried}, {still}: {error if refused else f'{type(error).__name__}: {error}'}")
            self._wait("The published lookup table cannot be loaded; the service's log says why.")

    def _swap(self, current: Current) -> None:
        old, table = self.served.table, fetch(self._storage, current, self._options.cache, self.stop.is_set)
        errors = self._tell({"folder": str(table.folder)})
        if errors:
            # A worker that could not follow comes back on what was served before, as all others do: never two runs side by side.
            if old is not None:
                self._tell({"folder": str(old.folder)})
            table.close()
            raise TableRefused(f"a worker could not open it: {errors[0]}")
        self.served.table, self._failed = table, None
        if old is not None:
            old.close()
            self.served.swaps += 1
        self._log(logging.INFO, f"Serving run {table.run} of {table.month}: {table.rows:,} rows.")

    def _wait(self, why: str) -> None:
        if self.served.table is None and self._message != {"waiting": why}:
            self._tell({"waiting": why})

    def _log(self, level: int, message: str) -> None:
        # Once, not at every look.
        if message != self._logged:
            logger.log(level, message)
            self._logged = message

    async def _probe(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            await reply(send, 200, [(b"content-type", CONTENT_TYPE_LATEST.encode())], generate_latest(self.served))
            return
        status, text = 404, "there are /healthz, /readyz and /metrics"
        if scope["path"] == "/healthz":
            status, text = 200, "ok"
        elif scope["path"] == "/readyz":
            why = "stopping" if self.stop.is_set() else self._message.get("waiting", "starting")
            status, text = (200, "ready") if all(worker.run for worker in self._workers) and not self.stop.is_set() else (503, why)
        await reply(send, status, [JSON], dumps({"status": text}))


class _Worker:
    """A worker process and the socket that it takes orders from.

    Attributes:
        run: what it serves, None before the first.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process, self.run = process, None
        self._control = control
        control.settimeout(_ANSWER_SECONDS)
        self._lines: Any = control.makefile("rb")

    def tell(self, message: dict[str, str]) -> dict[str, str]:
        """Send an order and wait for its answer; a worker that died meanwhile will hear it from its successor's start."""
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
            line = self._lines.readline()
        except OSError:
            self.process.kill()
            return {}
        answer = json.loads(line) if line else {}
        self.run = answer.get("run", self.run)
        return answer

    def end(self, seconds: float) -> None:
        """Wait for its end, and force it after so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._lines.close()
        self._control.close()
