"""A worker: one process that answers on the shared port, with what the supervisor hands it over a socket.

Over that socket come lines of JSON, `{"folder": ...}` with a run that was verified, or `{"waiting": ...}` with why there is none; each is
answered by a line, `{"run": ...}` with what is served now or `{"error": ...}`. When the socket ends, so does the worker.
"""

import asyncio
import contextlib
import gc
import json
import logging
import mmap
import pathlib
import socket
import sys
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.app import Service, problem_body
from serving.counters import Counters
from serving.store import Table
from serving.tokens import Tokens

MAX_HEADER_BYTES = 32 << 10
# Seconds: for a request to come in whole and its answer to be taken, for an idle connection, to be read by who is refused, and to end.
REQUEST_SECONDS, IDLE_SECONDS, REFUSED_SECONDS, GRACE_SECONDS = 5, 60, 1.0, 30

logger = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP, with limits on connections, headers and time, and refusals in problem details."""

    max_connections = 128
    # Connections beyond the cap whose clients have not read yet that they are.
    _lingering: ClassVar[set["Protocol"]] = set()
    _refused = False
    _header_bytes = 0
    _state: tuple[object, bool] = (None, False)
    _unchanged = 0

    def connection_made(self, transport: Any) -> None:
        if len(self.connections) < self.max_connections:
            super().connection_made(transport)
            return
        self.transport = transport
        self.refuse(503, "All connections of this worker are taken; try again soon.", b"retry-after: 1\r\n")
        if len(self._lingering) >= self.max_connections:
            transport.close()
        self._lingering.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingering.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        HttpToolsProtocol.data_received(self, data)
        cycle = self.cycle
        # While the headers of a request come in, its scope is none of a request that is being answered.
        if cycle is None or cycle.scope is not self.scope:
            self._header_bytes += len(data)
        elif len(data) > MAX_HEADER_BYTES or self._header_bytes:
            self._header_bytes = sum(len(name) + len(value) for name, value in cycle.scope["headers"]) + len(self.url)
        else:
            return
        if self._header_bytes > MAX_HEADER_BYTES:
            self.refuse(431, f"The request line and headers have more than {MAX_HEADER_BYTES:,} bytes.")
        elif cycle is not None and cycle.scope is self.scope:
            self._header_bytes = 0

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "The request is not HTTP/1.1 as it should be.")

    def refuse(self, status: int, detail: str, headers: bytes = b"") -> None:
        """Answer with a problem whatever was asked, and close, once the client has had time to read it."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.config.loaded_app.counters.refused(status)
        if self.pipeline or (self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete):
            self.pipeline.clear()  # Another answer is on its way, and cannot be followed by this one.
            self.transport.abort()
            return
        body = problem_body(status, detail)
        head = b"content-type: application/problem+json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(b"".join((STATUS_LINE[status], headers, head, b"\r\n", body)))
        if self.cycle is not None:
            self.cycle.disconnected = True  # What is still being answered has nobody to go to.
            self.cycle.message_event.set()
        # Closed at once, with bytes of the request unread, the client's system would drop the answer before it is read.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(REFUSED_SECONDS, self.transport.abort)

    def check_time(self) -> None:
        """Called every second: refuse a client that for too long neither finishes a request nor takes an answer."""
        state = (self.cycle, self.cycle is not None and self.cycle.response_complete)
        if self.timeout_keep_alive_task is not None or state != self._state:
            self._state, self._unchanged = state, 0
            return
        self._unchanged += 1
        if self._unchanged > REQUEST_SECONDS:
            self.refuse(408, f"The request did not come whole, or its answer was not taken, within {REQUEST_SECONDS} s.")


def uvicorn_config(app: Any, **settings: Any) -> uvicorn.Config:
    """Uvicorn without what an ingress does: no access log, no proxies' headers, no web sockets."""
    plain: dict[str, Any] = {"ws": "none", "lifespan": "off", "proxy_headers": False, "server_header": False}
    quiet: dict[str, Any] = {"log_config": None, "log_level": "error", "access_log": False}
    return uvicorn.Config(app, **{"http": "httptools", "timeout_keep_alive": IDLE_SECONDS, **plain, **quiet, **settings})


async def work(service: Service, listener: socket.socket, control: socket.socket, max_connections: int) -> None:
    """Serve until a signal or the end of `control`."""
    protocol = type("Limited", (Protocol,), {"max_connections": max_connections})
    server = uvicorn.Server(uvicorn_config(service, http=protocol, timeout_graceful_shutdown=GRACE_SECONDS))
    reader, writer = await asyncio.open_connection(sock=control)

    async def follow() -> None:
        while line := await reader.readline():
            before = service.table
            writer.write(json.dumps(await _do(service, json.loads(line))).encode() + b"\n")
            if service.table is not None and service.table is not before:
                tasks[2:] = [asyncio.create_task(_populate(service.table))]
        server.should_exit = True

    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            service.tick()
            for connection in list(server.server_state.connections):
                connection.check_time()  # type: ignore[union-attr]

    tasks = [asyncio.create_task(follow()), asyncio.create_task(tick())]
    gc.freeze()  # What is imported stays; to look through it again and again would hold requests up.
    await server.serve([listener])
    for task in tasks:
        task.cancel()
    writer.close()


async def _do(service: Service, message: dict[str, str]) -> dict[str, str]:
    if "waiting" in message:
        service.waiting = message["waiting"]
        return {}
    folder, table = pathlib.Path(message["folder"]), service.table
    try:
        if table is None or table.folder != folder:
            while service.before is not None and not service.before.closed:  # LMDB maps a file once; it may be the one that comes back.
                await asyncio.sleep(0.01)
            # In a thread, since mapping the files of a large month takes a while.
            service.serve(await asyncio.to_thread(Table, folder, verified=True))
    except Exception as error:  # noqa: BLE001  Whatever is wrong with it, the table that is served stays.
        return {"error": f"{type(error).__name__}: {error}"}
    assert service.table is not None
    return {"run": service.table.run}


async def _populate(table: Table) -> None:
    with table:
        await asyncio.to_thread(table.populate)


def main() -> None:
    """`python -m serving.worker` with its settings as JSON, as the supervisor starts it."""
    settings = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    memory = mmap.mmap(settings["counters"], 0)
    tokens = Tokens(pathlib.Path(settings["tokens"])) if settings["tokens"] else None
    service = Service(Counters(memory, settings["worker"]), tokens)
    listener, control = (socket.socket(fileno=settings[name]) for name in ("listener", "control"))
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=_loop()) as runner:
        runner.run(work(service, listener, control, settings["connections"]))


def _loop() -> Any:
    import uvloop

    return uvloop.new_event_loop


if __name__ == "__main__":
    main()
