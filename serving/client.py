"""A client of the score service: connections that are kept, requests that are made again, and batches of any length.

with Client("http://127.0.0.1:8080") as client:
    client.get("ad-1")["p_click"]
    [row and row["p_click"] for row in client.lookup(["ad-1", "ad-2", "unknown"]).scores]
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import urllib3

MAX_KEYS = 10_000  # That the service takes at a time.
_PASSING = (502, 503, 504)

Score = Mapping[str, Any]


class ServiceError(Exception):
    """The service answered with a problem.

    Attributes:
        status: of the answer.
        detail: a sentence.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows under some keys, all of one run.

    Attributes:
        month, run_id, encoder_version, model_version, age_days: of the run.
        scores: in the order of the keys; None where the month has no such key.
    """

    month: str
    run_id: str
    encoder_version: str
    model_version: str
    age_days: float
    scores: Sequence[Score | None]


class Client:
    """Asks one service; safe to share among threads.

    Args:
        url: such as https://scores.example.com.
        token: `id.secret`, where the service wants one.
        timeout: seconds to connect, and to wait for the next bytes.
        retries: how often a request is made again that got no answer or 502, 503 or 504; after pauses that double, or as long as
            `Retry-After` says.
        connections: that are kept; more threads than that wait for one another.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 5.0, retries: int = 3, connections: int = 8) -> None:
        # Nothing that is asked changes anything, so a POST can be made again too.
        policy = urllib3.Retry(
            retries, redirect=False, status_forcelist=_PASSING, allowed_methods=None, backoff_factor=0.1, raise_on_status=False
        )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._url = url.rstrip("/")
        self._pool = urllib3.PoolManager(maxsize=connections, block=True, retries=policy, timeout=timeout, headers=headers)

    def get(self, key: str) -> Score | None:
        """The row under a key, with its run; None where the month has no such key.

        Raises:
            ServiceError: the service said so.
            urllib3.exceptions.HTTPError: no answer, after all retries.
        """
        if not key.strip("."):  # What a path would lose on its way.
            batch = self.lookup([key])
            run = {name: value for name, value in vars(batch).items() if name != "scores"}
            return {**batch.scores[0], **run} if batch.scores[0] else None
        try:
            return self._ask("GET", f"/v1/scores/{quote(key, safe='')}")
        except ServiceError as error:
            if error.status == 404:
                return None
            raise

    def lookup(self, keys: Sequence[str]) -> Batch:
        """The rows under any number of keys; asked for anew where the service changed to another run between two requests.

        Raises:
            ServiceError, urllib3.exceptions.HTTPError: as for `get`.
        """
        while True:
            parts = [keys[at : at + MAX_KEYS] for at in range(0, len(keys), MAX_KEYS)] or [[]]
            batches = [Batch(**self._ask("POST", "/v1/scores:lookup", {"keys": list(part)})) for part in parts]
            if len({batch.run_id for batch in batches}) == 1:
                return dataclasses.replace(batches[-1], scores=[score for batch in batches for score in batch.scores])

    def status(self) -> Mapping[str, Any]:
        """Month, run, rows, age and models of what is served; raises as `get` does."""
        return self._ask("GET", "/v1/status")

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        answer = self._pool.request(method, self._url + path, json=body)
        if answer.status == 200:
            return answer.json()
        try:
            detail = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):  # Not of the service, but of something in front of it.
            detail = json.dumps(answer.data[:200].decode(errors="replace"))
        raise ServiceError(answer.status, detail)
