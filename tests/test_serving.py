"""The lookup table's shards, and what a cache refuses."""

import datetime
import fcntl
import os
import pathlib
import zlib

import lmdb
import pytest
from served import FAULTS, ODD_KEYS, publish, rewrite, row, with_info

from schemas.lake import Current
from schemas.storage import Folder, open_storage
from serving.store import Table, TableRefused, fetch, shard_name, shard_of, write_shard


@pytest.fixture
def lake(tmp_path: pathlib.Path) -> Folder:
    (tmp_path / "lake").mkdir()
    return Folder(str(tmp_path / "lake"))


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "cache"


# --- shards -------------------------------------------------------------------------------------------------------------------------------


def test_routing_is_the_hash_of_the_key() -> None:
    for shards in (1, 3, 1000):
        for key in ODD_KEYS:
            assert shard_of(key.encode(), shards) == zlib.crc32(key.encode()) % shards


def test_a_shard_grows_past_its_hint_and_is_compact(tmp_path: pathlib.Path) -> None:
    items = [(b"%08d" % i, b'{"x":"%s"}' % (b"y" * 900)) for i in range(25_000)]
    keys, values = zip(*items, strict=True)
    chunks = [(keys[at : at + 4000], values[at : at + 4000]) for at in range(0, len(items), 4000)]
    assert write_shard(tmp_path / "shard", iter(chunks), 0) == len(items)
    assert os.listdir(tmp_path) == ["shard"]
    with lmdb.open(str(tmp_path / "shard"), subdir=False, readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert list(transaction.cursor()) == items
        size = (tmp_path / "shard").stat().st_size
        assert size == (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        assert size < 1.2 * sum(len(key) + len(value) for key, value in items)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([b"a", b"c", b"b"], "b'b' comes after b'c'"),
        ([b"a", b"a"], "b'a' repeats"),
        ([b"", b"a"], "b'' has 0 bytes"),
        ([b"a", b"x" * 501], "x' has 501 bytes; expected 1 to 500"),
    ],
)
def test_a_shard_refuses_bad_keys_and_leaves_nothing(tmp_path: pathlib.Path, keys: list[bytes], message: str) -> None:
    # At the start, and behind another chunk's border.
    for before in ([], [b"%05d" % i for i in range(1000)]):
        chunks = [(chunk, [b'{"k":1}'] * len(chunk)) for chunk in (before, keys) if chunk]
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path / "shard", chunks, 100)
    with pytest.raises(ValueError, match="b'a' repeats"):
        write_shard(tmp_path / "shard", [([b"a"], [b'{"k":1}'])] * 2, 100)
    assert os.listdir(tmp_path) == []


def test_an_odd_key_is_found_and_others_are_not(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS), cache)
    assert {key: table.get(key.encode()) for key in ODD_KEYS} == {key: row(key) for key in ODD_KEYS}
    assert [table.get(key) for key in (b"", b"absent", b"x" * 499, b"x" * 501, b"x" * 600, b"\xff")] == [None] * 6
    assert (table.rows, table.month, table.run, table.model_version, table.encoder_version) == (13, "2026-10", "r1", "r1", "e1")
    assert table.created == datetime.datetime(2026, 10, 3, 12, tzinfo=datetime.UTC)
    assert table.get_many([b"absent", b"plain", b"a/b//c", b"plain"]) == [b"null", row("plain"), row("a/b//c"), row("plain")]
    assert table.get_many([b"", b"plain", b"x" * 600]) == [b"null", row("plain"), b"null"]
    with table, table:
        table.close()
        assert table.get(b"plain") == row("plain")  # Closed, but read.
    with pytest.raises(lmdb.Error):
        table.get(b"plain")


def test_empty_shards_are_fine(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ["one"], shards=12), cache)
    assert (table.rows, table.get(b"one"), table.get(b"two")) == (1, row("one"), None)
    table.close()


# --- cache --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_corrupt_run_is_refused_and_leaves_the_cache_alone(fault: str, lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS), cache).close()
    current = publish(lake, tmp_path, "2026-11", "r2", ODD_KEYS)
    spoil, message = FAULTS[fault]
    spoil(lake, current)
    with pytest.raises(TableRefused, match=message):
        fetch(lake, current, cache)
    assert {path.name for path in cache.iterdir()} == {".lock", "2026-10.r1"}


def test_a_pointer_cannot_lead_out_of_the_cache(lake: Folder, cache: pathlib.Path) -> None:
    with pytest.raises(TableRefused, match="not the folder of a run"):
        fetch(lake, Current("2026-10", "../../elsewhere"), cache)


def test_a_restart_copies_and_reads_nothing_again(
    lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    fetch(lake, current, cache).close()
    for path in pathlib.Path(lake.uri, "lookup/2026-10/r1").glob("shard-*"):
        path.unlink()
    monkeypatch.setattr("schemas.storage.crc32c_of_file", lambda path: pytest.fail(f"{path} was read again"))
    for opened in (lambda: fetch(lake, current, cache), lambda: Table(cache / "2026-10.r1", verified=True)):
        table = opened()
        assert table.get(b"plain") == row("plain")
        table.close()


@pytest.mark.parametrize("damage", ["shorter", "changed", "removed", "other manifest"])
def test_a_damaged_cache_is_copied_anew(damage: str, lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    fetch(lake, current, cache).close()
    path = cache / "2026-10.r1" / shard_name(1, 3)
    data = path.read_bytes()
    if damage == "shorter":
        os.truncate(path, 4096)
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "removed":
        path.unlink()
    else:
        rewrite(lake, current, with_info(model_version="r2"))
    table = fetch(lake, current, cache)
    assert [table.get(key.encode()) for key in ODD_KEYS] == [row(key) for key in ODD_KEYS]
    assert path.read_bytes() == data
    assert table.model_version == ("r2" if damage == "other manifest" else "r1")
    table.close()


def test_the_last_two_runs_are_kept_and_leftovers_go(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    runs = [publish(lake, tmp_path, f"2026-{month:02d}", f"r{month}", ODD_KEYS) for month in (8, 9, 10)]
    (cache / "incoming-dead").mkdir(parents=True)
    tables = [fetch(lake, current, cache) for current in runs]
    assert {path.name for path in cache.iterdir()} == {".lock", "2026-09.r9", "2026-10.r10"}
    assert tables[0].get(b"plain") == row("plain")  # Its files are gone; its mapping is not.
    tables[1].close()
    tables.append(fetch(lake, runs[1], cache))
    tables.append(fetch(lake, runs[0], cache))  # The run used last is kept, not the one of the later month.
    assert {path.name for path in cache.iterdir()} == {".lock", "2026-08.r8", "2026-09.r9"}
    for table in tables:
        table.close()


def test_a_bucket_takes_the_same_way(cloud: dict[str, str], cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lake = open_storage("gs://adstocrat/serving")
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS), cache)
    assert [table.get(key.encode()) for key in ODD_KEYS] == [row(key) for key in ODD_KEYS]
    table.close()
    current = publish(lake, tmp_path, "2026-11", "r2", ODD_KEYS)
    lake.delete("lookup/2026-11/r2/shard-00002")
    with pytest.raises(TableRefused, match="shard-00002-of-00003 is missing: the lake has no lookup/2026-11/r2/shard-00002"):
        fetch(lake, current, cache)


def test_a_fetch_can_be_stopped(lake: Folder, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    current = publish(lake, tmp_path, "2026-10", "r1", ODD_KEYS)
    with pytest.raises(InterruptedError, match="while copying"):
        fetch(lake, current, cache, lambda: True)
    with (cache / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InterruptedError, match="while waiting"):
            fetch(lake, current, cache, lambda: True)
    assert [path.name for path in cache.iterdir()] == [".lock"]
