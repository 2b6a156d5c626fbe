"""Tell whoever wants to know how a month ended: one POST of JSON to the setting `notify` (docs/runbook.md)."""

import http.client
import json
import logging
import urllib.parse
import urllib.request
from typing import Any

from beam_jobs import drift
from beam_jobs.report import PUBLISHED, STOPPED
from beam_jobs.run import MonthRun, stage_error

log = logging.getLogger("adstocrat")

_SECONDS = 10.0


def payload(run: MonthRun, error: BaseException | None) -> dict[str, Any]:
    """What is sent: `event` (`published` or `stopped`), `month`, `run`, `lake`, `why` it stopped, exit `status`, and `alarms`."""
    known = stage_error(error)
    status = 0 if error is None else known.status if known else 2 if isinstance(error, ValueError | OSError) else 1
    return {
        "event": STOPPED if error else PUBLISHED,
        "month": run.month,
        "run": run.id,
        "lake": run.storage.uri,
        "status": status,
        "why": str(known or error) if error else None,
        "alarms": drift.headlines(run),
    }


def notify(run: MonthRun, error: BaseException | None) -> None:
    """Send it, if a URL is set. That it cannot be sent is logged: the month is what it is."""
    if not run.config.notify:
        return
    # Behind the host there may be a secret.
    host = urllib.parse.urlsplit(run.config.notify).hostname
    try:
        data = json.dumps(payload(run, error)).encode()
        request = urllib.request.Request(run.config.notify, data, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as failed:
        log.warning("%s was not told how %s ended: %s", host, run.month, type(failed).__name__)
