"""HTTP/1.1 of a worker: uvicorn's, with limits, refusals that are problem details, and a straight way for what is asked most."""

import time
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.app import SCORES, Headers, Service, problem_body

MAX_HEADER_BYTES = 32 << 10
MAX_PIPELINED = 100
# Seconds: for a request to come in whole and its answer to be taken, for an idle connection, and to be read by who is refused.
REQUEST_SECONDS, IDLE_SECONDS, REFUSED_SECONDS = 5, 60, 1.0

_OF_BODIES = (b"content-length", b"transfer-encoding", b"expect")


class Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP, with limits on connections, headers and time, and refusals in problem details.

    Attributes:
        max_connections: beyond which one is refused.
        service: answers a plain GET of a score while its headers are read, without a task and messages of ASGI, which would cost more
            than all the rest; without a service everything goes to the ASGI application.
    """

    max_connections = 128
    service: Service | None = None
    # Connections beyond the cap whose clients have not read yet that they are.
    _lingering: ClassVar[set["Protocol"]] = set()
    _refused = False
    _header_bytes = 0
    _state: tuple[object, bool] = (None, False)
    _unchanged = 0
    # Seconds, and one, since the last request was answered at once; 0 if it was not, or if another has begun.
    _idle = 0
    # Of the bytes that came last: whether a request began in them, whether they went on with one, and whether they are few.
    _began = _progress = _small = False
    # The head of the last answer, which is that of most in its second, after what it was made of.
    _last: ClassVar[tuple[object, object, bytes]] = (None, None, b"")

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
        self._began = self._progress = False
        self._small = len(data) <= MAX_HEADER_BYTES
        super().data_received(data)
        # Of headers, or of what stands behind a body, that come in piece by piece.
        self._header_bytes = 0 if self._progress else self._header_bytes + len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()

    def on_message_begin(self) -> None:
        self._began, self._progress, self._idle = True, True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._progress = True
        # What began in a small piece has no long headers.
        if self._began and self._small:
            if self.service is not None and self._answer(self.service):
                return
        elif len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._refuse_headers()
        if len(self.pipeline) >= MAX_PIPELINED:
            self.refuse(503, f"More than {MAX_PIPELINED} requests wait for their answers to be taken.")
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress = True
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._progress = True
        if not self._idle and not self._refused:
            super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # To close would wait for a client that does not read.

    def _refuse_headers(self) -> None:
        self.refuse(431, f"The request line and headers have more than {MAX_HEADER_BYTES:,} bytes.")

    def _answer(self, service: Service) -> bool:
        """Answer at once, if nothing about the request is out of the ordinary."""
        began, url, parser, cycle, token, known = time.perf_counter_ns(), self.url, self.parser, self.cycle, b"", None
        if (
            url[: len(SCORES)] != SCORES
            or parser.get_method() != b"GET"
            or parser.get_http_version() != "1.1"
            or not parser.should_keep_alive()
            or parser.should_upgrade()
            or b"?" in url
            or b"#" in url
            or not url.isascii()
            or self.flow.write_paused  # The client does not take its answers.
            or not (cycle is None or cycle.response_complete)
        ):
            return False
        for name, value in self.headers:
            if name == b"authorization":
                token = value
            elif name == b"if-none-match":
                known = value
            elif name in _OF_BODIES:
                return False
        status, headers, body = service.score("GET", url, token, known, began)
        length = b"" if status == 304 else b"content-length: %d\r\n" % len(body)
        self.transport.write(b"".join((self._head(status, headers), length, b"\r\n", body)))
        self._idle = 1
        return True

    def _head(self, status: int, headers: Headers) -> bytes:
        """What comes before the length of an answer."""
        every = self.server_state.default_headers  # With the date: a new list every second.
        head = Protocol._last
        if head[0] is not headers or head[1] is not every:
            lines = b"".join(b"%b: %b\r\n" % header for header in (*every, *headers))
            head = Protocol._last = (headers, every, STATUS_LINE[status] + lines)
        return head[2]

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
        """Called every second: refuse a client that for too long neither finishes a request nor takes an answer, or is idle."""
        if self._idle:
            self._idle += 1
            if self._idle > (REQUEST_SECONDS if self.transport.get_write_buffer_size() else IDLE_SECONDS):
                self.transport.abort()
            return
        state = (self.cycle, self.cycle is not None and self.cycle.response_complete)
        if self.timeout_keep_alive_task is not None or state != self._state:
            self._state, self._unchanged = state, 0
            return
        self._unchanged += 1
        if self._unchanged > REQUEST_SECONDS:
            self.refuse(408, f"The request did not come whole, or its answer was not taken, within {REQUEST_SECONDS} s.")
