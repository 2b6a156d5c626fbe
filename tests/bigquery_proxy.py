"""An HTTP proxy in front of the BigQuery emulator: it records the jobs that come by, refuses ids that were used, and breaks a call."""

import dataclasses
import json
import re
import threading
from collections.abc import Callable
from typing import Any

from proxy import Handler, Proxy

# What may be done to one call. `aborted` is what a transaction ends with that another one overtook; `lost` is done, and its answer thrown
# away; the two others have the command killed before the call or behind it.
FAULTS = ("503", "409", "aborted", "lost", "killed before", "killed behind")
_WRITES = r"\b(INSERT|DELETE|UPDATE|MERGE|TRUNCATE|CREATE|DROP|ALTER)\b[^;]*?`[^`]*\.{}`"


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: its method and path, the job it asks for (`configuration`, empty for none), and whether that was done by the server."""

    method: str
    path: str
    job: dict[str, Any]
    done: bool

    @property
    def text(self) -> str:
        return self.job.get("query", {}).get("query", "")

    @property
    def stage(self) -> str:
        return self.job.get("labels", {}).get("adstocrat_stage", "")

    def writes(self, table: str) -> bool:
        """Whether the job changes rows of the table."""
        into = {**self.job.get("load", {}), **self.job.get("query", {})}.get("destinationTable", {}).get("tableId")
        return into == table or bool(re.search(_WRITES.format(table), self.text))


Where = Callable[[list[Call], Call], bool]


def nowhere(before: list[Call], call: Call) -> bool:
    return False


class BigQueryProxy(Proxy):
    """Serves what the emulator does, but for the one call that is broken.

    Attributes:
        calls: all so far.
        fault, where: what is done to the first call for which that holds, given those before it, and whose job's id is not taken.
        kill: ends the command.
    """

    def __init__(self, target: str):
        super().__init__(target, _Handler)
        self.calls: list[Call] = []
        self.used: set[str] = set()
        self.failed: dict[str, Any] = {}
        self.turn = threading.Lock()
        self.kill: Callable[[], None] = lambda: None
        self.fault, self.where = "", nowhere

    def will(self, fault: str, where: "Where") -> None:
        """Break a call from now on, and forget those so far."""
        assert fault in FAULTS
        self.fault, self.where, self.calls = fault, where, []

    def changed(self, table: str) -> list[Call]:
        return [call for call in self.calls if call.done and call.writes(table)]

    def check_one_job(self) -> None:
        """`scores` was changed in exactly one job, whose text is one transaction."""
        changed = self.changed("scores")
        assert len(changed) == 1, f"scores was changed in {len(changed)} jobs"
        call = changed[0]
        assert re.fullmatch(r"BEGIN TRANSACTION;(?:(?!TRANSACTION).)*COMMIT TRANSACTION;?", call.text, re.DOTALL), call.text


class _Handler(Handler):
    server: BigQueryProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy, sent = self.server, json.loads(body) if body else {}
        job = sent.get("configuration", {}) if self.path.partition("?")[0].endswith("/jobs") else {}
        id = sent["jobReference"]["jobId"] if job else self.path.partition("?")[0].rpartition("/")[2]
        with proxy.turn:
            call = Call(self.command, self.path, job, False)
            taken = bool(job) and id in proxy.used
            broken = proxy.fault if proxy.fault and not taken and proxy.where(proxy.calls, call) else ""
            proxy.fault = "" if broken else proxy.fault
            done = broken not in ("503", "409", "aborted", "killed before") and not taken
            proxy.calls.append(dataclasses.replace(call, done=done))
            if job and (done or broken == "aborted"):
                proxy.used.add(id)
        if broken == "killed before":
            proxy.kill()
            self._reset()
        elif broken in ("503", "409"):
            self._answer(int(broken), {"error": {"code": int(broken), "message": f"a {broken} by plan"}})
        elif broken == "aborted":
            error = {"reason": "invalidQuery", "message": "Transaction is aborted due to concurrent update against table p:d.scores."}
            proxy.failed[id] = {**sent, "status": {"state": "DONE", "errorResult": error, "errors": [error]}}
            self._answer(200, proxy.failed[id])
        elif taken:
            self._answer(409, {"error": {"code": 409, "message": f"Already Exists: Job {id}", "errors": [{"reason": "duplicate"}]}})
        elif id in proxy.failed:
            self._answer(200, proxy.failed[id])
        else:
            self._upstream.request(self.command, self.path, body, dict(self.headers))
            answer = self._upstream.getresponse()
            content = answer.read()
            if broken == "killed behind":
                proxy.kill()
            if broken in ("lost", "killed behind"):
                self._reset()
                return
            headers = {
                name: value for name, value in answer.getheaders() if name not in ("Content-Length", "Connection", "Transfer-Encoding")
            }
            self._send(answer.status, headers, content, len(content))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on
