"""The REST service as an ASGI application: a score by key, and what is served.

`GET /v1/scores/{key}` is answered from the mapped table by raw ASGI, without a router, a request object or JSON parsing: those cost
more than the lookup. Starlette serves the routes that are called rarely. All errors are problem details (RFC 9457).
"""

import asyncio
import contextlib
import datetime
import json
import logging
import pathlib
import time
from collections.abc import AsyncIterator
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from schemas.lake import CURRENT, Current, read_pointer
from schemas.storage import Storage
from serving.store import Table, TableRefused, fetch

logger = logging.getLogger(__name__)

_SCORES = b"/v1/scores/"
_JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", b"application/problem+json")
_TITLES = {400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error", 503: "Service Unavailable"}
_LONGEST_PAUSE = 300.0

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]


def create_app(storage: Storage, cache: pathlib.Path, poll_seconds: float = 5.0) -> "Service":
    """The application, which begins to load the current table when its lifespan starts.

    Args:
        storage: the lake.
        cache: a local folder for copies of this lake's tables.
        poll_seconds: how often to look whether `lookup/CURRENT` moved.
    """
    return Service(storage, cache, poll_seconds)


class Service:
    """Answers from one table at a time, and changes it between two requests when the pointer moves."""

    def __init__(self, storage: Storage, cache: pathlib.Path, poll_seconds: float) -> None:
        self._storage, self._cache, self._poll_seconds = storage, cache, poll_seconds
        self._table: Table | None = None
        self._suffix = b""
        self._waiting = "The lookup table is being loaded; try again soon."
        self._closing = asyncio.Event()
        self._failed: Current | None = None
        self._pause = self._retry_at = 0.0
        self._logged = ""
        routes = [Route("/v1/status", self._status), Route("/healthz", self._healthz), Route("/readyz", self._readyz)]
        handlers = {HTTPException: _http_problem, Exception: _server_problem}
        self._rest = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self._rest.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The raw path, since in `path` an encoded slash of a key can no longer be told from one that parts the path.
        if scope["type"] != "http" or not scope["raw_path"].startswith(_SCORES):
            await self._rest(scope, receive, send)
            return
        status, headers, body = self._score(scope["method"], scope["raw_path"][len(_SCORES) :])
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _score(self, method: str, quoted: bytes) -> Answer:
        if method not in ("GET", "HEAD"):
            status, headers, body = _problem(405, f"A score is read with GET, not {method}.")
            return status, [*headers, (b"allow", b"GET, HEAD")], body
        key = unquote_to_bytes(quoted) if b"%" in quoted else quoted
        if not key.isascii():
            try:
                key.decode()
            except UnicodeDecodeError:
                return _problem(400, "The key in the path is not UTF-8 once its percent-encoding is undone; encode its UTF-8 bytes.")
        if not key:
            return _problem(400, "The path has no key; expected /v1/scores/{key}.")
        if self._table is None:
            return self._unready()
        row = self._table.get(key)
        if row is None:
            return _problem(404, f"Month {self._table.month} has no score under the key {_shown(key)}.")
        # The members that are the same for all rows are not stored with each: they go in before the closing brace.
        return 200, [_JSON], row[:-1] + self._suffix

    def _unready(self) -> Answer:
        status, headers, body = _problem(503, self._waiting)
        return status, [*headers, (b"retry-after", b"%d" % max(1, round(self._poll_seconds)))], body

    async def _status(self, request: Request) -> Response:
        table = self._table
        if table is None:
            return _response(self._unready())
        age = datetime.datetime.now(datetime.UTC) - table.created
        return JSONResponse({**_same_for_all(table), "rows": table.rows, "age_days": round(age.total_seconds() / 86400, 2)})

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        return JSONResponse({"status": "ready"}) if self._table is not None else _response(self._unready())

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        yield
        self._closing.set()
        await watching  # Not cancelled: a fetch in its thread would go on, and its table would never be closed.
        if self._table is not None:
            self._table.close()
            self._table = None

    async def _watch(self) -> None:
        while not self._closing.is_set():
            await self._look()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._poll_seconds)

    async def _look(self) -> None:
        """Follow the pointer once. Whatever goes wrong is logged, and what is served stays."""
        current: Current | None = None
        try:
            current, _ = await asyncio.to_thread(read_pointer, self._storage, CURRENT, Current)
            if current is None:
                self._log(logging.WARNING, f"Nothing to serve yet: {self._storage.uri} has no {CURRENT}.")
                self._waiting = "No lookup table is published yet; the first published month will be served without a restart."
                return
            if self._table is not None and (self._table.month, self._table.run) == (current.month, current.run):
                return
            if current == self._failed and time.monotonic() < self._retry_at:
                return
            self._serve(await asyncio.to_thread(fetch, self._storage, current, self._cache, self._closing.is_set))
        except Exception as error:  # noqa: BLE001  A lake may fail in any way, and the service must outlive all of them.
            if self._closing.is_set():
                return
            refused = isinstance(error, TableRefused)
            reason = str(error) if refused else f"{type(error).__name__}: {error}"
            if current is None:
                tried = f"Cannot read {CURRENT}"
            else:
                # A table is large: it is not fetched again at every look, though once more soon, since a copy can fail on its way.
                again = current == self._failed
                self._pause = min(2 * self._pause, _LONGEST_PAUSE) if again else self._poll_seconds
                self._failed, self._retry_at = current, time.monotonic() + self._pause
                tried = f"{'Refused' if refused else 'Cannot load'} run {current.run} of {current.month}"
            still = f"still serving run {self._table.run} of {self._table.month}" if self._table else "nothing is served"
            self._log(logging.ERROR, f"{tried}, {still}: {reason}")
            self._waiting = "The published lookup table cannot be loaded; the service's log says why."

    def _serve(self, table: Table) -> None:
        # Runs on the event loop, as `_score` does, so no request is between its lookup and its answer.
        old, self._table = self._table, table
        self._suffix = b"," + json.dumps(_same_for_all(table), separators=(",", ":")).encode()[1:]
        self._failed = None
        if old is not None:
            old.close()
        self._log(logging.INFO, f"Serving run {table.run} of {table.month}: {table.rows:,} rows.")

    def _log(self, level: int, message: str) -> None:
        # Once, not at every look.
        if message != self._logged:
            logger.log(level, message)
            self._logged = message


def _same_for_all(table: Table) -> dict[str, str]:
    """What is said of every row of a run: kept once, and added to each answer."""
    return {"month": table.month, "run_id": table.run, "encoder_version": table.encoder_version, "model_version": table.model_version}


def _problem(status: int, detail: str) -> Answer:
    problem = {"type": "about:blank", "title": _TITLES.get(status, "Error"), "status": status, "detail": detail}
    return status, [_PROBLEM], json.dumps(problem, ensure_ascii=False, separators=(",", ":")).encode()


def _response(answer: Answer) -> Response:
    status, headers, body = answer
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404:
        detail = f"There is no {request.url.path} here; there are /v1/scores/{{key}}, /v1/status, /healthz and /readyz."
    elif error.status_code == 405:
        detail = f"{request.url.path} is read with GET, not {request.method}."
    response = _response(_problem(error.status_code, detail))
    response.headers.update(error.headers or {})
    return response


def _server_problem(request: Request, error: Exception) -> Response:
    return _response(_problem(500, "The service failed on this request; its log says why."))


def _shown(key: bytes) -> str:
    text = key.decode()
    return repr(text if len(text) <= 100 else text[:100] + "…")
