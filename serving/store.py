"""The lookup table: LMDB shards that a monthly job writes once and the REST service reads.

A run's table lies in the lake under `lookup/<month>/<run>/`. Its manifest has one receipt a shard (unit `shard-00000-of-00004`, the
shard's file, its rows and its CRC32C) and in `info` month, run, shards, encoder_version, model_version and created (ISO 8601, UTC).
A key's shard follows from the key's CRC-32, the one hash that costs a reader next to nothing; the value under a key is the row as ready
JSON, so that a reader parses and builds nothing.

The service reads a copy in a local cache. LMDB maps a file into memory and trusts it: a file that is too short kills the process with
SIGBUS at some later read. So each shard is checked against its receipt before it is opened, and a run's folder in the cache gets its
name only when all of its shards are there.
"""

import contextlib
import ctypes
import datetime
import fcntl
import operator
import os
import pathlib
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

import lmdb

from schemas.lake import MANIFEST, Current, Manifest, Receipt, read_manifest, stage_folder
from schemas.storage import Folder, Storage

STAGE = "lookup"
MAX_KEY_BYTES = 500  # LMDB's own limit is 511.
RUNS_KEPT = 2  # The served one, and the one that a rollback goes back to.

_CHUNK_BYTES = 8 << 20
_FETCHERS = 8
_SMALLEST_MAP = 16 << 20
_POPULATE_READ = 22  # Of <sys/mman.h>; a kernel before 5.14 says that it does not know it.


class TableRefused(Exception):
    """A run's lookup table is corrupt or incomplete; the message is a sentence that names what is wrong."""


def shard_of(key: bytes, shards: int) -> int:
    """The shard that holds a key, for the writer and the reader alike."""
    return crc32(key) % shards


def shard_name(shard: int, shards: int) -> str:
    """The unit of a shard in the manifest and its file name in a cache: `shard-00000-of-00004`."""
    return f"shard-{shard:05d}-of-{shards:05d}"


def write_shard(path: pathlib.Path, chunks: Iterable[tuple[Sequence[bytes], Sequence[bytes]]], size_hint: int) -> int:
    """Write one shard as a compact LMDB file, which appears under `path` only when it is whole.

    Args:
        path: the file to write, on a local disk; twice the shard's size is needed beside it for a while.
        chunks: keys and values, a list of each at a time, in ascending order of the keys' bytes; a value is a JSON object with at least
            one member and no space around it, for the service adds members before the closing brace without looking at the rest.
        size_hint: bytes of all keys and values, roughly; a wrong guess costs time, not correctness.

    Returns:
        Entries written.

    Raises:
        ValueError: a key is empty, too long, repeated or out of order; names the key.
    """
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    compact = work.with_name(work.name + ".compact")
    map_size = max(_SMALLEST_MAP, 2 * size_hint)
    rows, previous = 0, b""
    try:
        with lmdb.open(str(work), subdir=False, map_size=map_size, lock=False, sync=False) as environment:
            for keys, values in chunks:
                _check_keys(previous, keys)
                while True:
                    try:
                        with environment.begin(write=True) as transaction:
                            transaction.cursor().putmulti(zip(keys, values, strict=True), append=True)
                        break
                    except lmdb.MapFullError:  # The transaction was aborted whole, so the chunk can be put again.
                        map_size *= 2
                        environment.set_mapsize(map_size)
                rows += len(keys)
                previous = keys[-1]
            # The copy leaves out the pages that each commit freed, and has no map larger than its content.
            environment.copy(str(compact), compact=True)
        with compact.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(compact, path)
    finally:
        work.unlink(missing_ok=True)
        compact.unlink(missing_ok=True)
    return rows


def _check_keys(previous: bytes, keys: Sequence[bytes]) -> None:
    """`previous` is the last key before these, empty where they are the first."""
    for key in (min(keys, key=len), max(keys, key=len)):
        if not 0 < len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"key {key!r} has {len(key)} bytes; expected 1 to {MAX_KEY_BYTES}")
    before = [previous, *keys[:-1]]
    if not all(map(operator.lt, before, keys)):
        one, other = next((one, other) for one, other in zip(before, keys, strict=True) if one >= other)
        if one == other:
            raise ValueError(f"key {one!r} repeats; expected keys that are unique in a month")
        raise ValueError(f"key {other!r} comes after {one!r}; expected keys in ascending order of their bytes")


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
        closed: whether its shards are unmapped.
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
        self._readers, self._closing, self.closed = 0, False, False
        self._open = contextlib.ExitStack()
        receipts = sorted(manifest.receipts, key=lambda receipt: receipt.unit)
        if not verified:
            _check_files(folder, receipts)
        with contextlib.ExitStack() as undo:
            undo.callback(self._open.close)
            # Files never change, so one read transaction a shard serves all requests.
            self._gets = [self._open_shard(folder, receipt, shard).get for shard, receipt in enumerate(receipts)]
            undo.pop_all()

    @property
    def age_days(self) -> float:
        """Days since the table was built."""
        return round((datetime.datetime.now(datetime.UTC) - self.created).total_seconds() / 86400, 2)

    def get(self, key: bytes) -> bytes | None:
        """The row under a key as JSON, or None if the month has no such key."""
        if not 0 < len(key) <= MAX_KEY_BYTES:
            return None
        return self._gets[crc32(key) % self._shards](key)  # type: ignore[return-value]  # Bytes, unless buffers are asked for.

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        """The row under each key as JSON, `null` where the month has no such key."""
        gets, shards = self._gets, self._shards
        try:
            return [gets[crc32(key) % shards](key, b"null") for key in keys]  # type: ignore[misc]
        except lmdb.BadValsizeError:  # A key is empty, or longer than any.
            return [self.get(key) or b"null" for key in keys]

    def populate(self) -> None:
        """Map all pages of the shards at once, or each would cost the first request that meets it a page fault; on Linux, where they fit.

        Takes long when the files are not in the system's cache; safe beside `get` in another thread, while a reader holds the table.
        """
        sizes = {str(path): path.stat().st_size for path in self.folder.glob("shard-*")}
        if not sys.platform.startswith("linux") or 2 * sum(sizes.values()) > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            return
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
            addresses, *_, path = line.split(maxsplit=5)
            if path in sizes and not self._closing:
                advise(int(addresses.partition("-")[0], 16), sizes[path], _POPULATE_READ)

    def close(self) -> None:
        """Unmap the shards once nobody reads; `get` raises from then on. Their files may be gone already."""
        self._closing = True
        if not self._readers:
            self.closed = True
            self._open.close()

    def __enter__(self) -> "Table":
        self._readers += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._readers -= 1
        if self._closing:
            self.close()

    def _open_shard(self, folder: pathlib.Path, receipt: Receipt, shard: int) -> lmdb.Transaction:
        try:
            # Lookups are random, so reading ahead would only evict pages that are needed.
            environment = lmdb.open(str(folder / receipt.unit), subdir=False, readonly=True, lock=False, readahead=False)
            self._open.callback(environment.close)
            transaction = environment.begin()
            self._open.callback(transaction.abort)
            entries = environment.stat()["entries"]
        except lmdb.Error as error:
            raise TableRefused(f"{receipt.unit} of run {self.run} cannot be opened: {error}") from error
        if entries != receipt.rows:
            raise TableRefused(f"{receipt.unit} of run {self.run} has {entries} keys, but its receipt says {receipt.rows}")
        with transaction.cursor() as cursor:
            for key in [cursor.key() for moved in (cursor.first(), cursor.last()) if moved]:
                if shard_of(key, self._shards) != shard:
                    raise TableRefused(f"{receipt.unit} of run {self.run} has the key {key!r} of shard {shard_of(key, self._shards)}")
        return transaction


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
