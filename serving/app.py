"""The REST service as an ASGI application: scores by key, one or many, and what is served.

`GET /v1/scores/{key}` is answered from the mapped table without a router, a request object or JSON parsing: those cost more than the
lookup. All errors are problem details (RFC 9457).
"""

import asyncio
import datetime
import http
import json
import logging
import time
from collections.abc import Awaitable, Callable
from email.utils import format_datetime
from typing import Any
from urllib.parse import unquote_to_bytes

from serving.counters import ROUTES, Counters
from serving.openapi import document
from serving.store import Table
from serving.tokens import Tokens

MAX_KEYS = 10_000
# Of as many of the longest keys, with every character of two bytes or more escaped as \uXXXX.
MAX_BODY_BYTES = 16 << 20
# A batch lets other requests in after so many of its keys.
SLICE_KEYS = 1_000

SCORES = b"/v1/scores/"
JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", b"application/problem+json")
_PATHS = {"/v1/scores:lookup": 1, "/v1/status": 2, "/openapi.json": 3}
_LOOKUP = 1

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
Answer = tuple[int, Headers, bytes]
# As ASGI has them.
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Service:
    """Answers from one table at a time, which `serve` changes between two requests.

    Attributes:
        waiting: why there is no table yet, a sentence.
        table: what is served.
    """

    def __init__(self, counters: Counters, tokens: Tokens | None) -> None:
        """`counters` are this worker's; without `tokens` everybody may ask."""
        self.counters, self.tokens = counters, tokens
        self.waiting = "The lookup table is being loaded; try again soon."
        self.table: Table | None = None
        self._suffix = self._etag = b""
        self._headers: Headers = []
        self._document = dumps(document(MAX_KEYS, MAX_BODY_BYTES, tokens is not None))

    def serve(self, table: Table) -> None:
        """Answer from `table` from now on; the one before is closed when the last batch that reads it is done."""
        # On the event loop, as `_score` is, so no GET is between its lookup and its answer.
        modified = format_datetime(table.created.astimezone(datetime.UTC), usegmt=True).encode()
        before, self.table = self.table, table
        self._etag = b'"%s"' % table.run.encode()
        # What a cache holds is asked for again each time, at the price of a 304: or a roll-back would not reach everybody.
        validators = [(b"etag", b"W/" + self._etag), (b"last-modified", modified), (b"cache-control", b"no-cache")]
        self._headers = [JSON, *validators]
        self.tick()
        if before is not None:
            before.close()

    def tick(self) -> None:
        """What changes by itself: to be called every second or so."""
        if self.table:
            self._suffix = b"," + dumps(_run(self.table))[1:]
        if self.tokens:
            self.tokens.poll()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter_ns()
        # The raw path, since in `path` an encoded slash of a key can no longer be told from one that parts the path.
        path, headers = scope["raw_path"], dict(scope["headers"])
        token, known = headers.get(b"authorization", b""), headers.get(b"if-none-match")
        if path.startswith(SCORES):
            answer = self.score(scope["method"], path, token, known, began)
        else:
            route = _PATHS.get(scope["path"], len(ROUTES) - 1)
            answer = await self._other(route, scope, receive) if self.tokens is None or self.tokens.allows(token) else _unauthorized()
            self.counters.request(route, answer[0], began)
        await reply(send, *answer)

    def score(self, method: str, path: bytes, token: bytes, known: bytes | None, began: int) -> Answer:
        """Answer a request for `/v1/scores/{key}`, and count it.

        Args:
            method: of HTTP.
            path: as it came, percent-encoded.
            token: the header Authorization, or nothing.
            known: the header If-None-Match.
            began: what `time.perf_counter_ns` said when the request came.
        """
        try:
            allowed = self.tokens is None or self.tokens.allows(token)
            answer = self._score(method, path[len(SCORES) :], known) if allowed else _unauthorized()
        except Exception:  # noqa: BLE001  Whatever it is, whoever asks gets an answer of the documented form.
            answer = _failed(method, path.decode(errors="replace"))
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

    async def _other(self, route: int, scope: Scope, receive: Receive) -> Answer:
        path, method, wanted = scope["path"], scope["method"], ("POST",) if route == _LOOKUP else ("GET", "HEAD")
        if path not in _PATHS:
            return _problem(404, f"There is no {path} here; there are /v1/scores/{{key}}, {', '.join(_PATHS)}.")
        if method not in wanted:
            allowed = ", ".join(wanted)
            return _problem(405, f"{path} does not take {method}, but {allowed}.", (b"allow", allowed.encode()))
        try:
            if route == _LOOKUP:
                return await self._lookup(receive)
            if path == "/openapi.json":
                return 200, [JSON], self._document
            return (200, [JSON], dumps({**_run(self.table), "rows": self.table.rows})) if self.table else self._unready()
        except Exception:  # noqa: BLE001  As above.
            return _failed(method, path)

    async def _lookup(self, receive: Receive) -> Answer:
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")  # None where the client is gone, to whom nothing is sent.
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                # The rest is on its way and would be read for nothing.
                return _problem(413, f"A body has at most {MAX_BODY_BYTES:,} bytes; ask for fewer keys.", (b"connection", b"close"))
        try:
            keys = _keys(body)
        except ValueError as error:
            return _problem(400, str(error))
        table = self.table
        if table is None:
            return self._unready()
        rows: list[bytes] = []
        # Other requests are answered, and another run may be swapped in, between two slices; this batch goes on with its own.
        with table:
            head = dumps(_run(table))[:-1] + b',"scores":['
            for start in range(0, len(keys), SLICE_KEYS):
                rows += table.get_many(keys[start : start + SLICE_KEYS])
                await asyncio.sleep(0)
        self.counters.batch(len(rows), rows.count(b"null"))
        return 200, [JSON], b"".join((head, b",".join(rows), b"]}"))


async def reply(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """An answer as ASGI's messages."""
    length = [] if status == 304 else [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})


def _failed(method: str, path: str) -> Answer:
    logger.exception("%s %s failed", method, path)
    return _problem(500, "The service failed on this request; its log says why.")


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


def dumps(values: dict[str, Any]) -> bytes:
    """JSON as it is sent: short, in UTF-8."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def problem_body(status: int, detail: str) -> bytes:
    """Problem details as JSON."""
    return dumps({"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": detail})


def _problem(status: int, detail: str, *headers: tuple[bytes, bytes]) -> Answer:
    return status, [_PROBLEM, *headers], problem_body(status, detail)


def _unauthorized() -> Answer:
    return _problem(401, "Expected `Authorization: Bearer ID.SECRET` with a token of this service.", (b"www-authenticate", b"Bearer"))


def _shown(key: bytes) -> str:
    text = key.decode()
    return repr(text if len(text) <= 100 else text[:100] + "…")
