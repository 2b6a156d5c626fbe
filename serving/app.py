"""The REST service as an ASGI application: scores by key, one or many, and what is served.

`GET /v1/scores/{key}` is answered from the mapped table without a router, a request object or JSON parsing: those cost more than the
lookup. Starlette serves the other routes. All errors are problem details (RFC 9457).
"""

import asyncio
import http
import json
import time
from email.utils import format_datetime
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from serving.counters import BYTES, ROUTES, Counters
from serving.openapi import document
from serving.store import Table
from serving.tokens import Tokens

MAX_KEYS = 10_000
# Of as many of the longest keys, with every character of two bytes or more escaped as \uXXXX.
MAX_BODY_BYTES = 16 << 20
# A batch lets other requests in after so many of its keys.
SLICE_KEYS = 1_000

SCORES = b"/v1/scores/"
_JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", b"application/problem+json")
_PATHS = {"/v1/scores:lookup": 1, "/v1/status": 2, "/openapi.json": 3}

Headers = list[tuple[bytes, bytes]]
Answer = tuple[int, Headers, bytes]


class Service:
    """Answers from one table at a time, which `serve` changes between two requests.

    Attributes:
        waiting: why there is no table yet, a sentence.
        table, before: what is served, and what was before it.
    """

    def __init__(self, counters: Counters | None = None, tokens: Tokens | None = None) -> None:
        """`counters` are this worker's; without `tokens` everybody may ask."""
        self.counters, self.tokens = counters or Counters(bytearray(BYTES)), tokens
        self.waiting = "The lookup table is being loaded; try again soon."
        self.table: Table | None = None
        self.before: Table | None = None
        self._suffix = self._etag = b""
        self._headers: Headers = []
        self._document = document(MAX_KEYS, MAX_BODY_BYTES, tokens is not None)
        routes = [
            Route("/v1/scores:lookup", self._lookup, methods=["POST"]),
            Route("/v1/status", self._status),
            Route("/openapi.json", self._openapi),
        ]
        handlers = {HTTPException: _http_problem, ClientDisconnect: _gone, Exception: _server_problem}
        self._rest = Starlette(routes=routes, exception_handlers=handlers)
        self._rest.router.redirect_slashes = False

    def serve(self, table: Table) -> None:
        """Answer from `table` from now on; the one before is closed when the last batch that reads it is done."""
        # On the event loop, as `_score` is, so no GET is between its lookup and its answer.
        self.before, self.table = self.table, table
        self._etag = b'"%s"' % table.run.encode()
        modified = format_datetime(table.created, usegmt=True).encode()
        # What a cache holds is asked for again each time, at the price of a 304: or a roll-back would not reach everybody.
        validators = [(b"etag", b"W/" + self._etag), (b"last-modified", modified), (b"cache-control", b"no-cache")]
        self._headers = [_JSON, *validators]
        self.tick()
        if self.before is not None:
            self.before.close()

    def tick(self) -> None:
        """What changes by itself: to be called every second or so."""
        if self.table:
            self._suffix = b"," + _dumps(_run(self.table))[1:]
        if self.tokens:
            self.tokens.poll()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter_ns()
        # The raw path, since in `path` an encoded slash of a key can no longer be told from one that parts the path.
        path, headers = scope["raw_path"], dict(scope["headers"])
        token, known = headers.get(b"authorization", b""), headers.get(b"if-none-match")
        if path.startswith(SCORES):
            status, fields, body = self.score(scope["method"], path, token, known, began)
        elif self.tokens is not None and not self.tokens.allows(token):
            status, fields, body = _unauthorized()
            self.counters.request(_route(scope), status, began)
        else:
            await self._count_rest(_route(scope), began, scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": [*fields, (b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    def score(self, method: str, path: bytes, token: bytes, known: bytes | None, began: int) -> Answer:
        """Answer a request for `/v1/scores/{key}`, and count it.

        Args:
            method: of HTTP.
            path: as it came, percent-encoded.
            token: the header Authorization, or nothing.
            known: the header If-None-Match.
            began: what `time.perf_counter_ns` said when the request came.
        """
        if self.tokens is not None and not self.tokens.allows(token):
            answer = _unauthorized()
        else:
            answer = self._score(method, path[len(SCORES) :], known)
        self.counters.request(0, answer[0], began)
        return answer

    def _score(self, method: str, key: bytes, known: bytes | None) -> Answer:
        table = self.table
        if b"%" in key:
            key = unquote_to_bytes(key)
            try:
                key.decode()
            except UnicodeDecodeError:
                return _problem(400, "The key in the path is not UTF-8 once its percent-encoding is undone; encode its UTF-8 bytes.")
        if table is None:
            return self._unready()
        row = table.get(key)
        if row is None or method != "GET":
            if method not in ("GET", "HEAD"):
                return _problem(405, f"A score is read with GET, not {method}.", (b"allow", b"GET, HEAD"))
            if not key:
                return _problem(400, "The path has no key; expected /v1/scores/{key}.")
            if row is None:
                return _problem(404, f"Month {table.month} has no score under the key {_shown(key)}.")
        if known is not None and (self._etag in known or known.strip() == b"*"):
            return 304, self._headers[1:], b""
        # The members that are the same for all rows are not stored with each: they go in before the closing brace.
        return 200, self._headers, row[:-1] + self._suffix

    def _unready(self) -> Answer:
        return _problem(503, self.waiting, (b"retry-after", b"1"))

    async def _count_rest(self, route: int, began: int, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._rest(scope, receive, watched)
        finally:
            self.counters.request(route, status, began)

    async def _lookup(self, request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                # The rest is on its way and would be read for nothing.
                return _response(
                    _problem(413, f"A body has at most {MAX_BODY_BYTES:,} bytes; ask for fewer keys.", (b"connection", b"close"))
                )
        try:
            keys = _keys(body)
        except ValueError as error:
            return _response(_problem(400, str(error)))
        table = self.table
        if table is None:
            return _response(self._unready())
        rows: list[bytes] = []
        # Other requests are answered, and another run may be swapped in, between two slices; this batch goes on with its own.
        with table:
            head = _dumps(_run(table))[:-1] + b',"scores":['
            for start in range(0, len(keys), SLICE_KEYS):
                rows += table.get_many(keys[start : start + SLICE_KEYS])
                await asyncio.sleep(0)
        self.counters.batch(len(rows), rows.count(b"null"))
        return Response(b"".join((head, b",".join(rows), b"]}")), media_type="application/json")

    async def _status(self, request: Request) -> Response:
        table = self.table
        return _response(self._unready()) if table is None else JSONResponse({**_run(table), "rows": table.rows})

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)


def _route(scope: Scope) -> int:
    return _PATHS.get(scope["path"], len(ROUTES) - 1)


def _keys(body: bytearray) -> list[bytes]:
    expected = 'expected {"keys": [strings]}'
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:  # Not JSON, not UTF-8, or a very long number; nested very deep.
        raise ValueError(f"The body is no JSON: {expected}.") from error
    if not isinstance(values, dict) or list(values) != ["keys"] or not isinstance(values["keys"], list):
        raise ValueError(f"The body is JSON of another form: {expected}.")
    keys = values["keys"]
    if len(keys) > MAX_KEYS:
        raise ValueError(f"There are {len(keys):,} keys; expected at most {MAX_KEYS:,} in a batch.")
    try:
        return [key.encode() for key in keys]
    except AttributeError as error:
        raise ValueError(f"A key is no string: {expected}.") from error
    except UnicodeEncodeError as error:
        raise ValueError("A key has half of a surrogate pair, which is no character.") from error


def _run(table: Table) -> dict[str, Any]:
    """What is said of every row of a run: kept once, and added to each answer."""
    versions = {"encoder_version": table.encoder_version, "model_version": table.model_version}
    return {"month": table.month, "run_id": table.run, **versions, "age_days": table.age_days}


def _dumps(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def problem_body(status: int, detail: str) -> bytes:
    """Problem details as JSON."""
    return _dumps({"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": detail})


def _problem(status: int, detail: str, *headers: tuple[bytes, bytes]) -> Answer:
    return status, [_PROBLEM, *headers], problem_body(status, detail)


def _unauthorized() -> Answer:
    return _problem(401, "Expected `Authorization: Bearer ID.SECRET` with a token of this service.", (b"www-authenticate", b"Bearer"))


def _response(answer: Answer) -> Response:
    status, headers, body = answer
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    headers = dict(error.headers or {})
    if error.status_code == 404:
        detail = f"There is no {request.url.path} here; there are /v1/scores/{{key}}, /v1/scores:lookup, /v1/status and /openapi.json."
    elif error.status_code == 405:
        detail = f"{request.url.path} does not take {request.method}, but {headers['Allow']}."
    response = _response(_problem(error.status_code, detail))
    response.headers.update(headers)
    return response


def _server_problem(request: Request, error: Exception) -> Response:
    return _response(_problem(500, "The service failed on this request; its log says why."))


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # Which nobody reads.


def _shown(key: bytes) -> str:
    text = key.decode()
    return repr(text if len(text) <= 100 else text[:100] + "…")
