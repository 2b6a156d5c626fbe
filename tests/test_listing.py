"""However names are spread, all are listed, each once, by many requests at a time."""

import bisect
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_handler import JsonHandler

from schemas import storage
from schemas.listing import between, list_all
from schemas.storage import Entry, open_storage

PAGE = 100


class Names:
    """A sorted name space that answers in pages, and notes how many requests were under way at a time."""

    def __init__(self, names: list[str], seconds: float = 0.0):
        self.names, self.seconds = sorted(names, key=str.encode), seconds
        self.requests = self.at_once = self.most = 0
        self.lock = threading.Lock()

    def page(self, after: str | None, end: str | None) -> tuple[list[str], str | None]:
        with self.lock:
            self.requests, self.at_once = self.requests + 1, self.at_once + 1
            self.most = max(self.most, self.at_once)
        time.sleep(self.seconds)
        keys = [name.encode() for name in self.names]
        low = bisect.bisect_left(keys, (after or "").encode())
        high = bisect.bisect_left(keys, end.encode()) if end is not None else len(keys)
        found = self.names[low : min(low + PAGE, high)]
        with self.lock:
            self.at_once -= 1
        return [name for name in found if name != after], found[-1] if low + PAGE < high else None


SPREADS = {
    "nothing": [],
    "one": ["p/a"],
    "counted": [f"p/cr{i:08d}.jpg" for i in range(20_000)],
    "digests": [f"p/{random.Random(i).getrandbits(128):032x}" for i in range(20_000)],
    "folders": [f"p/{i % 3}/2026/{i:06d}" for i in range(20_000)],
    "letters beyond ASCII": [f"p/é{chr(0x4E00 + i)}" for i in range(5_000)] + [f"p/a{i}" for i in range(500)],
    "all tildes": ["p/" + "~" * i for i in range(1, 300)],
}


@pytest.mark.parametrize("spread", SPREADS)
def test_every_name_is_listed_once(spread: str) -> None:
    names = Names(SPREADS[spread])
    assert sorted(list_all(names.page, "p/"), key=str.encode) == names.names


@pytest.mark.parametrize("spread", ["counted", "digests", "folders"])
def test_many_requests_are_under_way_and_few_are_wasted(spread: str) -> None:
    names = Names(SPREADS[spread], 0.005)
    list(list_all(names.page, "p/", threads=8))
    assert names.most == 8 and names.requests < 2.5 * len(names.names) / PAGE


@given(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x24F), max_size=6),
    st.text(st.characters(max_codepoint=0x7F, min_codepoint=0x20)),
)
def test_what_is_between_is_between(low: str, more: str) -> None:
    high = low + more + "\x7f"
    middle = between(low, high)
    assert middle is None or low < middle < high


class _Handler(JsonHandler):
    """Cloud Storage's listing: pages, and names from `startOffset` up to `endOffset`."""

    def do_GET(self) -> None:
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query))
        names = [f"lake/raw/{i:06d}.jpg" for i in range(3000)] + ["lake/raw/.hidden", "lake/rawer"]
        low, high = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        wanted = sorted(name for name in names if name.startswith(query["prefix"]) and low <= name < high)
        items = [{"name": name, "size": "7", "crc32c": "AAAAAA==", "updated": "2026-10-01T00:00:00Z"} for name in wanted[:PAGE]]
        answer = {"items": items} | ({"nextPageToken": "more"} if len(wanted) > PAGE else {})
        self.answer(answer)


@pytest.fixture
def bucket(cloud: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[storage.Storage]:
    """A bucket whose listing has pages, which the emulator's has not."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    storage._client.cache_clear()
    yield open_storage("gs://bucket/lake")
    storage._client.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_bucket_is_listed_in_ranges_of_names(bucket: storage.Storage) -> None:
    names = [f"raw/{i:06d}.jpg" for i in range(3000)]
    assert bucket.names("raw/") == names
    assert bucket.entries("raw/") == [Entry(name, 7, "AAAAAA==") for name in names]
    assert bucket.last_change("raw/") == 1790812800.0 and bucket.names("raw") == [*names, "rawer"]
