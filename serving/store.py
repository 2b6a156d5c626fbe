"""The lookup table: shards that a monthly job writes once and the REST service reads.

A run's table lies in the lake under `lookup/<month>/<run>/`. Its manifest has one receipt a shard (unit `shard-00000-of-00004`, the
shard's file, its rows and its CRC32C) and in `info` month, run, shards, encoder_version, model_version and created (ISO 8601, UTC).
The value under a key is the row as ready JSON, so that a reader parses and builds nothing.

The service reads a copy in a local cache. Each shard is checked against its receipt before it is opened, and a run's folder in the cache
gets its name only when all of its shards are there.
"""

import contextlib
import datetime
import fcntl
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

from schemas.lake import MANIFEST, Current, Manifest, Receipt, read_manifest, stage_folder
from schemas.storage import Folder, Storage
from serving.shard import END, KEY_END, Shard, shard_name, shard_of

STAGE = "lookup"
RUNS_KEPT = 2  # The served one, and the one that a rollback goes back to.

_CHUNK_BYTES = 8 << 20
_FETCHERS = 8


class TableRefused(Exception):
    """A run's lookup table is corrupt or incomplete; the message is a sentence that names what is wrong."""


class Table:
    """The lookup table of one run, opened from a folder of the cache. Not for use by several threads at once.

    `with table:` makes the block a reader, which `close` waits for: a table that is replaced is closed when its last reader is done.

    Attributes:
        folder: where its shards lie.
        month: the scored month.
        run: the run's id.
        rows: keys in the table.
        created: when the table was built, UTC.
        model_version: the ranker that scored it.
        encoder_version: the encoder whose embeddings the ranker used.
    """

    def __init__(self, folder: pathlib.Path, verified: bool = False) -> None:
        """Check each shard against its receipt, then open it; a file that was checked before and has not changed is not read again.

        Args:
            folder: of the cache.
            verified: another process has just checked the shards, so they are only opened.

        Raises:
            TableRefused: a shard is missing or differs from its receipt.
        """
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
        self.folder = folder
        self.month: str = manifest.info["month"]
        self.run: str = manifest.info["run"]
        self.rows = manifest.rows
        self.created = datetime.datetime.fromisoformat(manifest.info["created"])
        self.model_version: str = manifest.info["model_version"]
        self.encoder_version: str = manifest.info["encoder_version"]
        self._shards = int(manifest.info["shards"])
        self._readers, self._closing = 0, False
        receipts = sorted(manifest.receipts, key=lambda receipt: receipt.unit)
        if not verified:
            _check_files(folder, receipts)
        with contextlib.ExitStack() as opened:  # Closed again if one of them is refused.
            self._files = [self._open_shard(receipt, number, opened) for number, receipt in enumerate(receipts)]
            self._parts = [(shard.data, shard.starts, shard.buckets) for shard in self._files]
            self._open = opened.pop_all()

    @property
    def age_days(self) -> float:
        """Days since the table was built."""
        return round((datetime.datetime.now(datetime.UTC) - self.created).total_seconds() / 86400, 2)

    def get(self, key: bytes) -> bytes | None:
        """The row under a key, UTF-8, as JSON, or None if the month has no such key."""
        number = crc32(key)
        # As in `shard_of`, without the call.
        data, starts, buckets = self._parts[number % self._shards]
        bucket = number // self._shards % buckets
        records = data[starts[bucket] - 1 : starts[bucket + 1]]  # With the end of what comes before, which all keys stand behind.
        return records.partition(END + key + KEY_END)[2].partition(END)[0] or None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        """The row under each key as JSON, `null` where the month has no such key."""
        get = self.get
        return [get(key) or b"null" for key in keys]

    def populate(self) -> None:
        """Map all pages of the shards, where memory has room; safe beside `get` in another thread, while a reader holds the table."""
        if 2 * sum(len(shard.data) for shard in self._files) > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            return
        for shard in self._files:
            shard.populate(lambda: self._closing)

    def close(self) -> None:
        """Unmap the shards once nobody reads; `get` raises from then on. Their files may be gone already."""
        self._closing = True
        if not self._readers:
            self._open.close()

    def __enter__(self) -> "Table":
        self._readers += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._readers -= 1
        if self._closing:
            self.close()

    def _open_shard(self, receipt: Receipt, number: int, opened: contextlib.ExitStack) -> Shard:
        try:
            shard = Shard(self.folder / receipt.unit)
        except (OSError, ValueError) as error:
            raise TableRefused(f"{receipt.unit} of run {self.run} cannot be opened: {error}") from error
        opened.callback(shard.close)
        if shard.rows != receipt.rows:
            raise TableRefused(f"{receipt.unit} of run {self.run} has {shard.rows} keys, but its receipt says {receipt.rows}")
        key = shard.first_key()
        if key is not None and shard_of(key, self._shards) != number:
            raise TableRefused(f"{receipt.unit} of run {self.run} has the key {key!r} of shard {shard_of(key, self._shards)}")
        return shard


def fetch(storage: Storage, current: Current, cache: pathlib.Path, stop: Callable[[], bool] = lambda: False) -> Table:
    """Open the table that the pointer names, after copying it into the cache unless it is there.

    Args:
        storage: the lake.
        current: the run to open.
        cache: a folder that belongs to this lake; processes may share it, and one fetches at a time.
        stop: asked now and then while waiting and copying; true gives up.

    Raises:
        TableRefused: the run's table is corrupt or incomplete; the cache is left as it was.
        InterruptedError: `stop` said so.
    """
    manifest = _read(storage, current)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / ".lock", stop):
        for leftover in cache.glob("incoming-*"):  # Of a process that died; a living one would hold the lock.
            shutil.rmtree(leftover)
        folder = cache / f"{current.month}.{current.run}"
        table = _cached(folder, manifest) or _copied(storage, manifest, folder, stop)
        os.utime(folder)
        runs = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
        for old in runs[:-RUNS_KEPT]:  # A process that still reads one keeps its mapping until it closes it.
            shutil.rmtree(old, ignore_errors=True)
    return table


def _read(storage: Storage, current: Current) -> Manifest:
    """The manifest of the run's table, after checking that it can be one."""
    folder = stage_folder(STAGE, current.month, current.run)
    if not all(re.fullmatch(r"[\w-][\w.-]*", part) for part in (current.month, current.run)):
        raise TableRefused(f"the pointer names {folder}, which is not the folder of a run")
    try:
        manifest = read_manifest(storage, folder)
        if manifest is None:
            raise TableRefused(f"{folder} has no {MANIFEST}: its stage is not complete, or was removed")
        info = manifest.info
        if (manifest.stage, info["month"], info["run"]) != (STAGE, current.month, current.run):
            raise TableRefused(f"the manifest in {folder} belongs to {manifest.stage}/{info['month']}/{info['run']}")
        if datetime.datetime.fromisoformat(info["created"]).tzinfo is None:
            raise ValueError(f"created {info['created']!r} has no time zone")
        if not (isinstance(info["model_version"], str) and isinstance(info["encoder_version"], str)):
            raise TypeError("model_version and encoder_version must be strings")
        shards, units = int(info["shards"]), [receipt.unit for receipt in manifest.receipts if receipt.file and receipt.crc32c]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableRefused(f"the manifest in {folder} is damaged: {type(error).__name__}: {error}") from error
    expected = [shard_name(shard, shards) for shard in range(shards)]
    if not expected or sorted(units) != expected:
        wrong = ", ".join(sorted(set(expected) ^ set(units))[:3]) or "repeated ones"
        raise TableRefused(f"the manifest in {folder} should list {shards} shards with their files, and lists {len(units)}: see {wrong}")
    return manifest


def _check_files(folder: pathlib.Path, receipts: Sequence[Receipt]) -> None:
    # The folder remembers the checksum of a file with the size and time it had, which is what marks it as verified for a restart.
    there = {entry.name: entry for entry in Folder(str(folder)).entries("shard-")}
    for receipt in receipts:
        entry = there.get(receipt.unit)
        if entry is None:
            raise TableRefused(f"{receipt.unit} is missing in {folder}")
        if entry.crc32c != receipt.crc32c:
            found = f"{entry.size} bytes with CRC32C {entry.crc32c}"
            raise TableRefused(f"{receipt.file} is corrupt: {found}, but its receipt says {receipt.crc32c}")


def _cached(folder: pathlib.Path, manifest: Manifest) -> Table | None:
    try:
        if (folder / MANIFEST).read_bytes() == manifest.to_json():
            return Table(folder)
    except (FileNotFoundError, TableRefused):
        pass  # Something in the cache changed since; a fresh copy tells whether the lake's is good.
    return None


def _copied(storage: Storage, manifest: Manifest, folder: pathlib.Path, stop: Callable[[], bool]) -> Table:
    incoming = folder.with_name(f"incoming-{uuid.uuid4().hex}")
    incoming.mkdir()

    def copy(receipt: Receipt) -> None:
        try:
            source = storage.open(receipt.file)
        except FileNotFoundError as error:
            raise TableRefused(f"{receipt.unit} is missing: the lake has no {receipt.file}") from error
        with source, (incoming / receipt.unit).open("xb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                if stop():
                    raise InterruptedError(f"stopped while copying {receipt.file}")
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())

    try:
        (incoming / MANIFEST).write_bytes(manifest.to_json())
        with ThreadPoolExecutor(_FETCHERS) as pool:
            list(pool.map(copy, manifest.receipts))
        table = Table(incoming)
        if folder.exists():
            shutil.rmtree(folder)
        incoming.rename(folder)
        table.folder = folder
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    return table


@contextlib.contextmanager
def _locked(path: pathlib.Path, stop: Callable[[], bool]) -> Iterator[None]:
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop():
                    raise InterruptedError(f"stopped while waiting for {path}") from None
                time.sleep(0.1)
        yield
