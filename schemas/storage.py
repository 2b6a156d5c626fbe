"""Where a lake lies: a Google Cloud Storage bucket or a plain folder, behind one small interface.

Names are relative to the lake, with `/` between their parts. Objects are immutable once written, but for the few pointer files that
`swap` moves. Every backend is a frozen dataclass of its URI alone, so it travels to workers by pickle; clients are made where they
are used, once a process.
"""

import abc
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from schemas import remembered
from schemas.listing import Entry, list_all
from schemas.retries import READ_TIMEOUT, again, ask, told
from schemas.retries import client as _client

STREAM_CHUNK = 8 << 20
# Metadata of what is written on a condition: which write it is.
WRITE = "adstocrat-write"
BYTES = "application/octet-stream"
_UPLOAD = {"content_type": BYTES, "checksum": "crc32c", "retry": None}
_LISTED = "items(name,size,crc32c,updated),nextPageToken"
T = TypeVar("T")


def parsed(url: str, data: bytes, make: Callable[[bytes], T] = json.loads, expected: str = "JSON; restore it") -> T:
    """What `make` makes of an object's JSON.

    Raises:
        ValueError: it is damaged; says where, what was expected and how to mend it.
    """
    try:
        return make(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url} is damaged ({error!r}), expected {expected}") from error


class Storage(abc.ABC):
    """A flat name → bytes store with create-once and compare-and-swap."""

    uri: str

    @abc.abstractmethod
    def names(self, prefix: str) -> list[str]:
        """Sorted names that start with `prefix`; nothing is read."""

    @abc.abstractmethod
    def scan(self, prefix: str) -> Iterator[Entry]:
        """Entries under `prefix` with their checksums, in no order and a page at a time; a folder's files are read for them, once."""

    def entries(self, prefix: str) -> list[Entry]:
        """All that `scan` finds, sorted."""
        return sorted(self.scan(prefix))

    @abc.abstractmethod
    def last_change(self, prefix: str) -> float | None:
        """When anything under `prefix` was last written, in seconds since 1970; None where nothing is."""

    @abc.abstractmethod
    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The object's bytes, or a range of them. Raises FileNotFoundError."""

    @abc.abstractmethod
    def open(self, name: str, chunk: int = STREAM_CHUNK) -> BinaryIO:
        """A stream over the object that fetches and holds `chunk` bytes of it at a time. Raises FileNotFoundError."""

    @abc.abstractmethod
    def write(self, name: str, *parts: bytes) -> None:
        """Write the parts as one, whole, never half; the name should be unique to the attempt."""

    @abc.abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write only if there is no such object yet; False if there is."""

    @abc.abstractmethod
    def swap(self, name: str, version: str | None, data: bytes) -> bool:
        """Write only if the object's version is still `version` (None: absent); False if it moved."""

    @abc.abstractmethod
    def read_versioned(self, name: str) -> tuple[bytes, str] | tuple[None, None]:
        """Bytes and version for a later `swap`, or (None, None) if absent."""

    @abc.abstractmethod
    def upload(self, path: pathlib.Path, name: str) -> None:
        """Write a local file under `name`, whole; nobody may write to it from then on."""

    @abc.abstractmethod
    def local(self, name: str) -> contextlib.AbstractContextManager[pathlib.Path]:
        """A local path with the object's content, for libraries that want files; a bucket's copy is removed at exit."""

    @abc.abstractmethod
    def delete(self, prefix: str) -> None:
        """Remove every object whose name starts with `prefix`; none is no error."""

    def url(self, name: str) -> str:
        """What a person or another service calls the object."""
        return f"{self.uri}/{name}"

    def read_json(self, name: str) -> Any:
        """The object as JSON, or None if absent. Raises ValueError where it is damaged."""
        try:
            return parsed(self.url(name), self.read(name))
        except FileNotFoundError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write what `read_json` reads."""
        self.write(name, json.dumps(value, indent=1).encode())


def open_storage(uri: str) -> Storage:
    """The store behind `gs://bucket[/prefix]` or a folder path.

    Raises:
        ValueError: another scheme, or a bucket without a name.
    """
    if uri.startswith("gs://"):
        bucket, _, prefix = uri[5:].rstrip("/").partition("/")
        if len(bucket) < 3:
            raise ValueError(f"{uri!r} names no bucket; expected gs://bucket[/prefix] with a bucket name of at least 3 characters")
        return Bucket(f"gs://{bucket}/{prefix}" if prefix else f"gs://{bucket}")
    if "://" in uri:
        raise ValueError(f"{uri!r} has an unknown scheme; expected gs://bucket[/prefix] or a folder")
    return Folder(os.path.abspath(os.path.expanduser(uri)))


def read_text(file: str) -> str:
    """A file of text in UTF-8, at a path or at gs://bucket/path.

    Raises:
        FileNotFoundError, UnicodeDecodeError: there is none, or it is not UTF-8.
        ValueError, OSError: as `open_storage`, and where the bucket cannot be read.
    """
    if "://" not in file:
        return pathlib.Path(file).read_text("utf-8")
    folder, _, name = file.rpartition("/")
    try:
        return open_storage(folder).read(name).decode("utf-8")
    except (PermissionError, TimeoutError) as error:
        raise type(error)(f"{file} cannot be read: {error}") from error


def _linked(path: pathlib.Path, name: pathlib.Path) -> bool:
    """Give a file a second name instead of copying it; false where that cannot be, as on another disk."""
    try:
        os.link(path.resolve(), name)
    except OSError:
        return False
    return True


def _not_there(error: OSError) -> None:
    """A folder that is not there holds nothing; of one that cannot be read that is not known."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@dataclasses.dataclass(frozen=True)
class Folder(Storage):
    """A lake in a local folder: hard links create, a lock and a rename swap."""

    uri: str

    @property
    def _root(self) -> pathlib.Path:
        return pathlib.Path(self.uri)

    @told()
    def names(self, prefix: str) -> list[str]:
        top = self._root / prefix.rpartition("/")[0]
        found = []
        for folder, folders, files in os.walk(top, onerror=_not_there):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = os.path.relpath(folder, self._root).replace(os.sep, "/")
            found += [file if relative == "." else f"{relative}/{file}" for file in files if not file.startswith(".")]
        return sorted(name for name in found if name.startswith(prefix))

    @told()
    def scan(self, prefix: str) -> Iterator[Entry]:
        place = f".checksums/{hashlib.sha256(prefix.encode()).hexdigest()[:16]}.lines"
        there = (self._root / place).exists()
        before = parsed(self.url(place), self.read(place) if there else b"", remembered.read, "remembered checksums; remove it")
        found, now = remembered.entries(self._root, self.names(prefix), before)
        if now:
            self.write(place, now)
        return found

    def last_change(self, prefix: str) -> float | None:
        return max((os.path.getmtime(self._root / name) for name in self.names(prefix)), default=None)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self.open(name) as stream:
            stream.seek(offset)
            return stream.read(-1 if length is None else length)

    @told()
    def open(self, name: str, chunk: int = STREAM_CHUNK) -> BinaryIO:
        return open(self._root / name, "rb")

    def write(self, name: str, *parts: bytes) -> None:
        path = self._root / name
        os.replace(self._temporary(path, *parts), path)

    def create(self, name: str, data: bytes) -> bool:
        path = self._root / name
        temporary = self._temporary(path, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    @told()
    def swap(self, name: str, version: str | None, data: bytes) -> bool:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / f".{path.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read_versioned(name)[1] != version:
                return False
            self.write(name, data)
        return True

    def read_versioned(self, name: str) -> tuple[bytes, str] | tuple[None, None]:
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None, None
        return data, hashlib.sha256(data).hexdigest()

    def upload(self, path: pathlib.Path, name: str) -> None:
        target = self._root / name
        temporary = self._temporary(target)
        may_link = path.stat().st_gid == temporary.stat().st_gid  # A lake that several share may give its files a group.
        temporary.unlink()
        if not (may_link and _linked(path, temporary)):
            shutil.copyfile(path, temporary)
        os.replace(temporary, target)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[pathlib.Path]:
        self.open(name).close()
        yield self._root / name

    @told()
    def delete(self, prefix: str) -> None:
        for name in self.names(prefix):
            (self._root / name).unlink(missing_ok=True)
        if prefix.endswith("/"):
            shutil.rmtree(self._root / prefix, ignore_errors=True)

    @told()
    def _temporary(self, path: pathlib.Path, *parts: bytes) -> pathlib.Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        with temporary.open("wb") as stream:
            stream.writelines(parts)
        return temporary


@dataclasses.dataclass(frozen=True)
class Bucket(Storage):
    """A lake in a bucket, or under a prefix of one: generations create and swap."""

    uri: str

    @property
    def _bucket(self) -> Any:
        return _client().bucket(self.uri[5:].partition("/")[0])

    @property
    def _prefix(self) -> str:
        prefix = self.uri[5:].partition("/")[2]
        return prefix + "/" if prefix else ""

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)

    def _all(self, prefix: str, read: Callable[[Any], T]) -> Iterator[T]:
        """What `read` makes of each object under `prefix`, in no order."""
        prefix = self._prefix + prefix

        def page(after: str | None, end: str | None) -> tuple[list[T], str | None]:
            options = {"prefix": prefix, "start_offset": after, "end_offset": end, "fields": _LISTED, "retry": None}
            blobs = _client().list_blobs(self._bucket, **options)
            found = list(next(blobs.pages, ()))
            # As in a folder, what begins with a dot is nobody's data.
            wanted = [blob for blob in found if blob.name != after and "/." not in "/" + self._name(blob)]
            return [read(blob) for blob in wanted], found[-1].name if blobs.next_page_token else None

        return list_all(lambda after, end: ask(functools.partial(page, after, end), self.uri), prefix)

    def _name(self, blob: Any) -> str:
        return blob.name[len(self._prefix) :]

    def names(self, prefix: str) -> list[str]:
        return sorted(self._all(prefix, self._name))

    def scan(self, prefix: str) -> Iterator[Entry]:
        return self._all(prefix, lambda blob: Entry(self._name(blob), blob.size, blob.crc32c))

    def last_change(self, prefix: str) -> float | None:
        return max(self._all(prefix, lambda blob: blob.updated.timestamp()), default=None)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        span = {} if not offset and length is None else {"start": offset, "end": None if length is None else offset + length - 1}

        def ranged() -> bytes:
            data: bytes = self._blob(name).download_as_bytes(**span, retry=None, timeout=READ_TIMEOUT)
            # A range has no checksum that would tell that it was cut.
            if len(data) < (length or 0) and offset + len(data) < self._found(name).size:
                raise ConnectionError(f"{len(data):,} bytes of {length:,} came")
            return data

        return ask(ranged, self.uri, name)

    def open(self, name: str, chunk: int = STREAM_CHUNK) -> BinaryIO:
        # A piece that comes short is no end: the reader goes on from where it ended.
        reader = self._found(name).open("rb", chunk_size=chunk, retry=again, timeout=READ_TIMEOUT)
        return io.BufferedReader(reader, chunk)

    def write(self, name: str, *parts: bytes) -> None:
        data = b"".join(parts)
        ask(lambda: self._blob(name).upload_from_string(data, **_UPLOAD), self.uri)

    def create(self, name: str, data: bytes) -> bool:
        return self.swap(name, None, data)

    def swap(self, name: str, version: str | None, data: bytes) -> bool:
        from google.api_core.exceptions import PreconditionFailed

        write = uuid.uuid4().hex

        def put() -> None:
            blob = self._blob(name)
            blob.metadata = {WRITE: write}
            blob.upload_from_string(data, if_generation_match=int(version or 0), **_UPLOAD)

        try:
            ask(put, self.uri)
        except PreconditionFailed:
            # Refused, or done by a try whose answer was lost: then it is this very write that lies there.
            with contextlib.suppress(FileNotFoundError):
                return (self._found(name).metadata or {}).get(WRITE) == write
            return False
        return True

    def read_versioned(self, name: str) -> tuple[bytes, str] | tuple[None, None]:
        from google.api_core.exceptions import PreconditionFailed

        while True:
            try:
                blob = self._found(name)
            except FileNotFoundError:
                return None, None
            # Taken before the download, which sets the blob's own generation from a header that not every server sends.
            generation = blob.generation
            options = {"if_generation_match": generation, "retry": None, "timeout": READ_TIMEOUT}
            # The object moved between the two requests: look again.
            with contextlib.suppress(FileNotFoundError, PreconditionFailed):
                return ask(functools.partial(blob.download_as_bytes, **options), self.uri, name), str(generation)

    def upload(self, path: pathlib.Path, name: str) -> None:
        ask(lambda: self._blob(name).upload_from_filename(str(path), **_UPLOAD), self.uri)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[pathlib.Path]:
        with tempfile.TemporaryDirectory(prefix="adstocrat-") as folder:
            path = pathlib.Path(folder) / pathlib.PurePosixPath(name).name
            ask(lambda: self._blob(name).download_to_filename(str(path), retry=None, timeout=READ_TIMEOUT), self.uri, name)
            yield path

    def delete(self, prefix: str) -> None:
        for name in list(self._all(prefix, self._name)):
            with contextlib.suppress(FileNotFoundError):
                ask(functools.partial(self._blob(name).delete, retry=None), self.uri)

    def _found(self, name: str) -> Any:
        """The object with what is known of it."""
        blob = self._blob(name)
        ask(lambda: blob.reload(retry=None, timeout=READ_TIMEOUT), self.uri, name)
        return blob
