"""An HTTP proxy in front of the storage emulator that records what it passes on, and breaks what a plan tells it to."""

import contextlib
import dataclasses
import http.client
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# What a plan may say of a request; "" is to pass it on untouched. `lost` is done by the server and its answer thrown away,
# `truncated` ends in the middle, `cut` too but says that it is whole.
FAULTS = ("", "503", "429", "403", "reset", "lost", "truncated", "cut", "stall")
STALL_SECONDS = 10.0
# (method, how many requests of its kind, reads or writes, came before) → fault
Plan = Callable[[str, int], str]


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request that came by.

    Attributes:
        name: of the object, where the path names one.
        media: whether it asked for the object's bytes.
        expected: the generation that it insisted on.
        status: what the server answered, 0 where it was not asked or stalled.
        generation: of the object in that answer.
        body: what was sent.
        fault: what was done to it.
    """

    method: str
    name: str
    media: bool
    expected: str | None
    status: int
    generation: str | None
    body: bytes
    fault: str


def untouched(method: str, before: int) -> str:
    """The plan without a fault."""
    return ""


def first(fault: str) -> Plan:
    """That fault for the first read and the first write."""
    return lambda method, before: fault if before == 0 else ""


def per_hundred(seed: int, reads: Mapping[str, int], writes: Mapping[str, int] | None = None, stall: int | None = None) -> Plan:
    """So many of each fault in every hundred reads and writes, at places drawn from the seed; and one stall, of the read of that number."""

    def plan(method: str, before: int) -> str:
        reading = method == "GET"
        if reading and before == stall:
            return "stall"
        faults = list(Counter(reads if reading else writes or {}).elements())
        faults += [""] * (100 - len(faults))
        random.Random(f"{seed} {reading} {before // 100}").shuffle(faults)
        return faults[before % 100]

    return plan


class Proxy(ThreadingHTTPServer):
    """Serves on loopback what `target` does, but for what `plan` breaks.

    Attributes:
        plan: may be set at any time.
        seen: all requests so far, in the order of their answers.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, target: str, handler: "type[Handler] | None" = None):
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.target = urlsplit(target).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[Seen] = []
        self.plan = untouched
        self._lock = threading.Lock()
        self._counts = Counter[bool]()

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan, self._counts = plan, Counter()

    def next_fault(self, method: str) -> str:
        with self._lock:
            before = self._counts[method == "GET"]
            self._counts[method == "GET"] += 1
        fault = self.plan(method, before)
        assert fault in FAULTS, fault
        return fault

    @property
    def faults(self) -> Counter[str]:
        """How many of each fault there were."""
        return Counter(seen.fault for seen in self.seen if seen.fault)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none of ours to report."""


@contextlib.contextmanager
def running(target: str, kind: type[Proxy] = Proxy) -> Iterator[Any]:
    """A proxy that serves until the end of the block."""
    proxy = kind(target)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one of its own to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(self.server.target)

    def finish(self) -> None:
        self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault(self.command)
        if fault == "stall":
            # Told now: the client may be gone when the time is over.
            self._note(body, fault)
            time.sleep(STALL_SECONDS)
        if fault == "reset":
            self._note(body, fault)
            self._reset()
            return
        if fault.isdigit():
            self._note(body, fault)
            self._answer(int(fault), {"error": {"code": int(fault), "message": f"a {fault} by plan"}})
            return
        self._upstream.request(self.command, self.path, body, dict(self.headers))
        answer = self._upstream.getresponse()
        content = answer.read()
        if fault != "stall":
            self._note(body, fault, answer.status, content)
        # Half of an error's body would be error enough.
        if fault == "lost" or (fault in ("truncated", "cut") and (answer.status >= 300 or len(content) < 2)):
            self._reset()
            return
        headers = {name: value for name, value in answer.getheaders() if name not in ("Content-Length", "Connection", "Transfer-Encoding")}
        if fault in ("truncated", "cut"):
            half = content[: len(content) // 2]
            self._send(answer.status, headers, half, len(content) if fault == "truncated" else len(half))
            self.close_connection = True
        else:
            self._send(answer.status, headers, content, len(content))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def _answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self._send(status, {"Content-Type": "application/json"}, content, len(content))

    def _send(self, status: int, headers: Mapping[str, str], content: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _reset(self) -> None:
        """End the connection as a crashed peer does, with an RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _note(self, body: bytes, fault: str, status: int = 0, content: bytes = b"") -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        generation = None
        if self.command != "GET" and status == 200:
            with contextlib.suppress(ValueError):
                generation = json.loads(content).get("generation")
        name = unquote(url.path.partition("/o/")[2]) or query.get("name", "")
        # An upload names its object in the JSON that comes first.
        if not name and (found := re.search(rb'"name": *("[^"]*")', body[:2000])):
            name = json.loads(found[1])
        media = self.command == "GET" and query.get("alt") == "media"
        self.server.seen.append(Seen(self.command, name, media, query.get("ifGenerationMatch"), status, generation, body, fault))
