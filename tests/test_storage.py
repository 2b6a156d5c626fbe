"""A folder and a bucket keep the same promises: every test of the first part runs on both."""

import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from schemas.checksum import crc32c
from schemas.storage import Bucket, Entry, Folder, Storage, open_storage

OBJECTS = {
    "raw/ads/b.csv": b"12345",
    "raw/ads/a.csv": b"",
    "raw/ads2/c.csv": b"other",
    "raw/ads.txt": b"beside",
    "raw/ü ö%20?#+&.txt": "odd – 名".encode(),
    "top": bytes(range(256)),
}


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Storage:
    """An empty lake of either kind."""
    if request.param == "folder":
        return open_storage(str(tmp_path / "lake"))
    request.getfixturevalue("cloud")
    return open_storage(f"gs://adstocrat/{tmp_path.name}")


@pytest.fixture
def filled(storage: Storage) -> Storage:
    for name, data in OBJECTS.items():
        storage.write(name, data)
    return storage


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Folder:
    return Folder(str(tmp_path))


@pytest.mark.parametrize("prefix", ["", "raw", "raw/", "raw/ads", "raw/ads/", "raw/ads/b", "t", "top", "top/", "none/", "raw/none/x", "a"])
def test_names_are_those_that_start_with_the_prefix(filled: Storage, prefix: str) -> None:
    assert filled.names(prefix) == sorted(name for name in OBJECTS if name.startswith(prefix))


@pytest.mark.parametrize("prefix", ["", "raw/ads/", "none/"])
def test_entries_tell_size_and_checksum(filled: Storage, prefix: str) -> None:
    expected = [Entry(name, len(data), crc32c(data)) for name, data in sorted(OBJECTS.items()) if name.startswith(prefix)]
    assert filled.entries(prefix) == expected
    assert filled.entries(prefix) == expected


def test_the_checksum_is_that_of_cloud_storage() -> None:
    assert crc32c(b"123456789") == "4waSgw=="


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_written_is_read(filled: Storage, name: str) -> None:
    assert filled.read(name) == OBJECTS[name]
    with filled.open(name) as stream:
        assert stream.read() == OBJECTS[name]
    with filled.local(name) as path:
        assert path.read_bytes() == OBJECTS[name]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 5), (0, 0), (3, 0), (0, None), (9, None), (9, 20), (250, 6), (250, 50), (256, 4), (300, 4)]
)
def test_a_range_is_a_slice(filled: Storage, offset: int, length: int | None) -> None:
    assert filled.read("top", offset, length) == OBJECTS["top"][offset : None if length is None else offset + length]


def test_a_stream_is_read_piece_by_piece_and_from_anywhere(storage: Storage) -> None:
    data = os.urandom(3 << 20)
    storage.write("big", data)
    with storage.open("big") as stream:
        assert stream.read(10) == data[:10]
        stream.seek(2 << 20)
        assert stream.read(100_000) == data[2 << 20 :][:100_000]
        assert stream.tell() == (2 << 20) + 100_000
        assert stream.read() == data[(2 << 20) + 100_000 :]


@pytest.mark.parametrize("name", ["none", "raw/none", "raw/ads/b.csv.gz"])
def test_what_is_not_there_raises_file_not_found(filled: Storage, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        filled.read(name)
    with pytest.raises(FileNotFoundError, match=name):
        filled.read(name, 2, 3)
    with pytest.raises(FileNotFoundError, match=name):
        filled.open(name)
    with pytest.raises(FileNotFoundError, match=name), filled.local(name):
        pass
    assert filled.read_json(name) is None
    assert filled.read_versioned(name) == (None, None)


def test_write_replaces(storage: Storage) -> None:
    storage.write("a", b"first, and longer")
    storage.write("a", b"second")
    assert storage.read("a") == b"second"
    assert storage.names("") == ["a"]


def test_json_is_read_as_it_was_meant(storage: Storage) -> None:
    storage.write("a.json", b'{"rows": [1, null]}')
    assert storage.read_json("a.json") == {"rows": [1, None]}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff"])
def test_damaged_json_is_told_by_name(storage: Storage, data: bytes) -> None:
    storage.write("runs/inputs.json", data)
    with pytest.raises(ValueError, match=r"runs/inputs.json is damaged \(.*\), expected JSON; restore it"):
        storage.read_json("runs/inputs.json")


def test_create_is_once(storage: Storage) -> None:
    assert storage.create("deep/folder/a", b"first")
    assert not storage.create("deep/folder/a", b"second")
    assert storage.read("deep/folder/a") == b"first"
    assert storage.names("") == ["deep/folder/a"]


def test_of_many_that_create_at_once_one_wins(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.create("a", b"%d" % n), range(8)))
    assert won.count(True) == 1
    assert storage.read("a") == b"%d" % won.index(True)


def test_swap_moves_only_what_has_not_moved(storage: Storage) -> None:
    assert storage.swap("pointer", None, b"1")
    assert not storage.swap("pointer", None, b"2")
    data, version = storage.read_versioned("pointer")
    assert data == b"1"
    assert storage.swap("pointer", version, b"3")
    assert not storage.swap("pointer", version, b"4")
    assert storage.read("pointer") == b"3"
    assert storage.names("") == ["pointer"]


def test_swap_of_something_that_is_gone_is_refused(storage: Storage) -> None:
    storage.write("pointer", b"1")
    _, version = storage.read_versioned("pointer")
    storage.delete("pointer")
    assert not storage.swap("pointer", version, b"2")
    assert storage.names("") == []


@pytest.mark.parametrize("increments", [20])
def test_no_increment_is_lost_in_a_race(storage: Storage, increments: int) -> None:
    race(storage, 2, increments // 2)
    assert storage.read("counter") == b"%d" % increments


def test_upload_writes_a_local_file_whole(storage: Storage, tmp_path: pathlib.Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "local").write_bytes(data)
    storage.upload(tmp_path / "local", "deep/copy")
    storage.upload(tmp_path / "local", "deep/copy")
    assert storage.read("deep/copy") == data
    assert storage.names("") == ["deep/copy"]


def test_a_local_path_keeps_the_suffix_that_libraries_go_by(filled: Storage) -> None:
    with filled.local("raw/ads/b.csv") as path:
        assert path.suffix == ".csv"


def test_delete_removes_what_starts_with_the_prefix(filled: Storage) -> None:
    filled.delete("raw/ads")
    assert filled.names("") == ["raw/ü ö%20?#+&.txt", "top"]
    filled.delete("none/")
    filled.delete("")
    assert filled.names("") == []


def test_the_url_is_the_lake_and_the_name(storage: Storage) -> None:
    assert storage.url("raw/a") == f"{storage.uri}/raw/a"


def test_storage_travels_by_pickle(filled: Storage) -> None:
    travelled = pickle.loads(pickle.dumps(filled))
    assert travelled == filled
    assert travelled.read("raw/ads/b.csv") == b"12345"


def race(storage: Storage, threads: int, each: int) -> None:
    """Add one to `counter` threads × each times by compare-and-swap."""

    def add() -> None:
        for _ in range(each):
            while True:
                data, version = storage.read_versioned("counter")
                if storage.swap("counter", version, b"%d" % (int(data or 0) + 1)):
                    break

    workers = [threading.Thread(target=add) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def test_two_threads_lose_none_of_200_swaps_of_a_file(folder: Folder) -> None:
    race(folder, 2, 100)
    assert folder.read("counter") == b"200"


def test_prefixes_of_one_bucket_are_lakes_of_their_own(cloud: dict[str, str]) -> None:
    one, other, whole = (open_storage(uri) for uri in ("gs://adstocrat/one", "gs://adstocrat/one2", "gs://adstocrat"))
    one.write("a", b"1")
    other.write("a", b"2")
    assert (one.names(""), other.names("")) == (["a"], ["a"])
    assert {"one/a", "one2/a"} <= set(whole.names("one"))


def test_a_bucket_s_local_copy_is_removed_at_exit(cloud: dict[str, str]) -> None:
    storage = open_storage("gs://adstocrat/copies")
    storage.write("a", b"1")
    with storage.local("a") as path:
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("hidden", [".DS_Store", "raw/.DS_Store", "raw/.tmp/a.csv", ".git/config", "raw/ads/.b.csv.lock"])
def test_a_folder_s_dot_files_and_dot_folders_are_never_listed(folder: Folder, hidden: str) -> None:
    path = pathlib.Path(folder.uri) / hidden
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    folder.write("raw/ads/b.csv", b"1")
    for prefix in ("", "raw/", "raw/ads/"):
        assert folder.names(prefix) == ["raw/ads/b.csv"]
        assert [entry.name for entry in folder.entries(prefix)] == ["raw/ads/b.csv"]


def test_a_remembered_checksum_is_computed_again_when_the_file_changes(folder: Folder) -> None:
    folder.write("raw/a", b"1111")
    assert folder.entries("raw/") == [Entry("raw/a", 4, crc32c(b"1111"))]
    path = pathlib.Path(folder.uri, "raw/a")
    before = path.stat().st_mtime_ns
    path.write_bytes(b"2222")
    os.utime(path, ns=(before, before + 1))
    assert folder.entries("raw/") == [Entry("raw/a", 4, crc32c(b"2222"))]
    path.write_bytes(b"33333")
    os.utime(path, ns=(before, before + 1))
    assert folder.entries("raw/") == [Entry("raw/a", 5, crc32c(b"33333"))]
    path.unlink()
    assert folder.entries("raw/") == []


def test_damaged_remembered_checksums_are_told_and_never_crash(folder: Folder) -> None:
    for name in ("a", "b"):
        folder.write(f"raw/{name}", name.encode())
    found = folder.entries("raw/")
    (memory,) = pathlib.Path(folder.uri, ".checksums").iterdir()
    whole, rng = memory.read_bytes(), random.Random(0)
    damaged = [whole[:length] for length in range(1, len(whole), 7)]
    for _ in range(200):
        at = rng.randrange(8 * len(whole))
        damaged.append(whole[: at // 8] + bytes([whole[at // 8] ^ 1 << at % 8]) + whole[at // 8 + 1 :])
    for data in damaged:
        memory.write_bytes(data)
        with pytest.raises(ValueError, match=r"\.checksums/\w+\.lines is damaged .*, expected remembered checksums; remove it"):
            folder.entries("raw/")
    memory.unlink()
    assert folder.entries("raw/") == found


def test_an_unchanged_file_is_not_read_again_for_its_checksum(folder: Folder) -> None:
    folder.write("raw/a", b"1111")
    first = folder.entries("raw/")
    path = pathlib.Path(folder.uri, "raw/a")
    stat = path.stat()
    path.write_bytes(b"2222")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder.entries("raw/") == first


def test_nothing_is_left_behind_by_what_was_refused(folder: Folder) -> None:
    folder.create("a", b"1")
    folder.create("a", b"2")
    folder.swap("a", "another version", b"3")
    assert sorted(os.listdir(folder.uri)) == [".a.lock", "a"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("gs://bucket", Bucket("gs://bucket")),
        ("gs://bucket/", Bucket("gs://bucket")),
        ("gs://bucket/some/prefix/", Bucket("gs://bucket/some/prefix")),
        ("/a/lake/", Folder("/a/lake")),
        ("lake", Folder(os.path.abspath("lake"))),
        ("~/lake", Folder(os.path.expanduser("~/lake"))),
    ],
)
def test_a_uri_names_a_store(uri: str, expected: Storage) -> None:
    assert open_storage(uri) == expected


@pytest.mark.parametrize("uri", ["gs://", "gs:///prefix", "gs://ab", "s3://bucket", "file:///lake", "http://host/lake"])
def test_another_uri_is_refused_by_name(uri: str) -> None:
    with pytest.raises(ValueError, match=uri):
        open_storage(uri)


REFUSED = r"may not be used: expected a user who may read and write there; grant it with chown or chmod, or name another --lake"
READING = ("names('')", "names('raw/ads/')", "entries('raw/')", "read('raw/ads/b')", "open('raw/ads/b')", "read_json('raw/ads/b')")
READING += ("local('raw/ads/b').__enter__()",)
WRITING = ("write('raw/ads/x', b'')", "create('raw/ads/x', b'')", "swap('raw/ads/x', None, b'')", "delete('raw/ads/b')")


@pytest.mark.parametrize(("mode", "asked"), [(0o000, READING + WRITING), (0o555, WRITING)])
def test_a_folder_that_is_forbidden_is_told_in_words(folder: Folder, mode: int, asked: tuple[str, ...]) -> None:
    """By a process without the rights of root, who may read and write everything."""
    folder.write("raw/ads/b", b"1")
    forbidden = pathlib.Path(folder.uri, "raw", "ads")
    for above in list(forbidden.parents)[:5]:
        above.chmod(above.stat().st_mode | 0o755)
    forbidden.chmod(mode)
    code = f"""
import os
from schemas.storage import Folder
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
for asked in {asked}:
    try:
        eval("Folder({folder.uri!r})." + asked)
        print(asked)
    except PermissionError as error:
        print(asked, error)
"""
    try:
        told = subprocess.run([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    finally:
        forbidden.chmod(0o755)
    assert len(told) == len(asked)
    for line in told:
        assert re.search(rf"{folder.uri}\S* {REFUSED}", line), line
