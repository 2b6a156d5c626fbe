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
from typing import Any

import uvicorn
import uvloop

from serving.app import Service
from serving.counters import Counters
from serving.protocol import IDLE_SECONDS, Protocol
from serving.store import Table
from serving.tokens import Tokens

GRACE_SECONDS = 30  # For requests that are being answered when a worker has to end.

logger = logging.getLogger(__name__)


def uvicorn_config(app: Any, **settings: Any) -> uvicorn.Config:
    """Uvicorn without what an ingress does: no access log, no proxies' headers, no web sockets."""
    plain: dict[str, Any] = {"ws": "none", "lifespan": "off", "proxy_headers": False, "server_header": False}
    quiet: dict[str, Any] = {"log_config": None, "log_level": "error", "access_log": False}
    return uvicorn.Config(app, **{"http": "httptools", "timeout_keep_alive": IDLE_SECONDS, **plain, **quiet, **settings})


async def work(service: Service, listener: socket.socket, control: socket.socket, max_connections: int) -> None:
    """Serve until a signal or the end of `control`."""
    protocol = type("Limited", (Protocol,), {"max_connections": max_connections, "service": service})
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
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(service, listener, control, settings["connections"]))


if __name__ == "__main__":
    main()
