"""Months in a lake to serve, ways to spoil them, and the service as a process."""

import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from beam_jobs.shard import key_numbers, write_file
from schemas.checksum import crc32c
from schemas.lake import Current, Manifest, Receipt, commit, read_manifest
from schemas.storage import Folder, Storage
from serving.shard import END, KEY_END, shard_name, shard_of

ODD_KEYS = [
    "plain",
    "two words",
    "a/b//c",
    "100%",
    "%2F",
    "a+b",
    "Ünïcode – 広告 😀",
    "x" * 500,
    '"quoted"\\',
    "tab\tnew\nline",
    "..",
    ".",
    "?q#f",
]
CREATED = "2026-10-03T12:00:00+00:00"

SAME_FOR_ALL = {"month": "2026-10", "run_id": "r1", "encoder_version": "e1", "model_version": "r1"}


def row(key: str, p_click: float = 0.0123) -> bytes:
    values = {"key": key, "p_click": p_click, "creative": None, "image_status": "no_image", "score_status": "no_image"}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(path: pathlib.Path, keys: list[str], values: list[bytes], shards: int = 1) -> int:
    records = [key.encode() + KEY_END + value + END for key, value in zip(keys, values, strict=True)]
    rows, checksum = write_file(path, [(key_numbers(pa.array(keys, pa.string())), pa.array(records, pa.binary()))], shards)
    assert checksum == crc32c(path.read_bytes())
    return rows


def publish(
    lake: Storage, tmp_path: pathlib.Path, month: str, run: str, keys: list[str], shards: int = 3, p_click: float = 0.0123
) -> Current:
    """Write a run's table as the lookup job does; the pointer is not moved."""
    folder = f"lookup/{month}/{run}"
    receipts = []
    for shard in range(shards):
        mine = [key for key in keys if shard_of(key.encode(), shards) == shard]
        path = tmp_path / f"{run}-{shard}"
        assert write_shard(path, mine, [row(key, p_click) for key in mine], shards) == len(mine)
        name = f"{folder}/{shard_name(shard, shards)}-attempt.shard"
        lake.upload(path, name)
        receipts.append(Receipt(shard_name(shard, shards), name, len(mine), crc32c=crc32c(path.read_bytes())))
    info = {"month": month, "run": run, "shards": shards, "encoder_version": "e1", "model_version": "r1", "created": CREATED}
    commit(lake, folder, Manifest("lookup", tuple(receipts), info))
    return Current(month, run)


def rewrite(lake: Folder, current: Current, change: Callable[[Manifest], Manifest]) -> None:
    folder = f"lookup/{current.month}/{current.run}"
    manifest = read_manifest(lake, folder)
    assert manifest is not None
    lake.write(f"{folder}/manifest.json", change(manifest).to_json())


def with_receipt(number: int, **values: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        receipts = list(manifest.receipts)
        receipts[number] = dataclasses.replace(receipts[number], **values)
        return dataclasses.replace(manifest, receipts=tuple(receipts))

    return change


def with_info(**values: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(manifest, info={**manifest.info, **values})


def first_file(lake: Folder, current: Current) -> pathlib.Path:
    return min(pathlib.Path(lake.uri, "lookup", current.month, current.run).glob("shard-00001-*"))


def truncate(lake: Folder, current: Current) -> None:
    path = first_file(lake, current)
    path.write_bytes(path.read_bytes()[:-4096])


def flip(lake: Folder, current: Current) -> None:
    path = first_file(lake, current)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap_shards(lake: Folder, current: Current) -> None:
    def change(manifest: Manifest) -> Manifest:
        first, second, *others = manifest.receipts
        units = (dataclasses.replace(second, unit=first.unit), dataclasses.replace(first, unit=second.unit))
        return dataclasses.replace(manifest, receipts=(*units, *others))

    rewrite(lake, current, change)


def no_table(lake: Folder, current: Current) -> None:
    first_file(lake, current).write_bytes(b"no table")
    rewrite(lake, current, with_receipt(1, crc32c=crc32c(b"no table")))


FAULTS: dict[str, tuple[Callable[[Folder, Current], Any], str]] = {
    "truncated": (truncate, r"shard-00001-of-00003-attempt.shard is corrupt: \d+ bytes with CRC32C \S+, but its receipt says"),
    "empty": (lambda lake, current: first_file(lake, current).write_bytes(b""), "is corrupt: 0 bytes"),
    "flipped bit": (flip, "shard-00001-of-00003-attempt.shard is corrupt"),
    "no table": (no_table, "shard-00001-of-00003 of run r2 cannot be opened"),
    "missing file": (lambda lake, current: first_file(lake, current).unlink(), "shard-00001-of-00003 is missing: the lake has no lookup/"),
    "wrong count": (
        lambda lake, current: rewrite(lake, current, with_receipt(1, rows=77)),
        r"shard-00001-of-00003 of run r2 has \d+ keys, but its receipt says 77",
    ),
    "other shard": (swap_shards, r"shard-0000\d-of-00003 of run r2 has the key b'.*' of shard \d"),
    "missing shard": (
        lambda lake, current: rewrite(lake, current, lambda manifest: dataclasses.replace(manifest, receipts=manifest.receipts[:2])),
        "should list 3 shards with their files, and lists 2: see shard-00002-of-00003",
    ),
    "no file": (lambda lake, current: rewrite(lake, current, with_receipt(0, file="")), "and lists 2: see shard-00000-of-00003"),
    "repeated shard": (lambda lake, current: rewrite(lake, current, with_receipt(1, unit=shard_name(0, 3))), "lists 3: see shard-00001"),
    "no shards": (lambda lake, current: rewrite(lake, current, with_info(shards=0)), "should list 0 shards"),
    "other run": (lambda lake, current: rewrite(lake, current, with_info(run="r9")), "belongs to lookup/2026-11/r9"),
    "no date": (lambda lake, current: rewrite(lake, current, with_info(created="today")), "is damaged: ValueError"),
    "naive date": (lambda lake, current: rewrite(lake, current, with_info(created="2026-10-03T12:00:00")), "has no time zone"),
    "no version": (
        lambda lake, current: rewrite(lake, current, with_info(model_version=None)),
        "model_version and encoder_version must be strings",
    ),
    "half a manifest": (
        lambda lake, current: lake.write("lookup/2026-11/r2/manifest.json", b'{"stage": "loo'),
        r"is damaged \(JSONDecodeError",
    ),
    "list as manifest": (lambda lake, current: lake.write("lookup/2026-11/r2/manifest.json", b"[]"), "is damaged: "),
    "no manifest": (
        lambda lake, current: pathlib.Path(lake.uri, "lookup", current.month, current.run, "manifest.json").unlink(),
        "lookup/2026-11/r2 has no manifest.json: its stage is not complete",
    ),
}


class Client:
    """A connection that sends paths as they are."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def __call__(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        self.connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = self.connection.getresponse()
        return response.status, response.headers, response.read()

    def problem(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[dict[str, Any], http.client.HTTPMessage]:
        status, headers, answer = self(path, method, body)
        assert headers["content-type"] == "application/problem+json"
        values = json.loads(answer)
        assert list(values) == ["type", "title", "status", "detail"]
        assert values["status"] == status
        return values, headers


def eventually(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Server:
    """The service as a process, with its log.

    Attributes:
        port, probes_port: where it listens.
        process: the supervisor.
    """

    def __init__(self, process: subprocess.Popen[str], log: pathlib.Path, ports: tuple[int, int]) -> None:
        self.process, self._log = process, log
        self.port, self.probes_port = ports

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Client:
        return Client(self.port)

    def probe(self, path: str) -> tuple[int, bytes]:
        client = Client(self.probes_port)
        status, _, body = client(path)
        client.connection.close()
        return status, body

    def metric(self, name: str) -> float:
        """A metric's value, with its labels as they are written."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.probe("/metrics")[1].decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def ready(self) -> bool:
        return self.probe("/readyz")[0] == 200

    def workers(self) -> list[int]:
        return [int(pid) for pid in pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def anonymous_bytes(self) -> list[int]:
        """Of each worker."""
        texts = [pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.workers()]
        return [int(re.findall(r"^Anonymous: +(\d+) kB", text, re.MULTILINE)[0]) << 10 for text in texts]


@contextlib.contextmanager
def serving(lake: str, cache: pathlib.Path, *flags: str, python: str = sys.executable, poll: float = 0.05) -> Iterator[Server]:
    """A server on free ports, which is stopped at the end, and must end well."""
    arguments = ["--lake", lake, "--cache", str(cache), "--port", "0", "--probes-port", "0", "--poll-seconds", str(poll), *flags]
    log = cache.with_name(f"{cache.name}.log")
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    with log.open("w") as stream:
        process = subprocess.Popen([python, "-m", "serving", *arguments], stdout=subprocess.PIPE, stderr=stream, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"Adstocrat serves .* at http://\S+:(\d+), probes at http://\S+:(\d+) \(stop with Ctrl-C\)\n", line)
        assert found, (line, log.read_text())
        yield Server(process, log, (int(found[1]), int(found[2])))
        process.terminate()
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
