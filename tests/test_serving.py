"""The lookup table's shards, and what a cache refuses."""

import datetime
import fcntl
import os
import pathlib
import zlib
from collections import Counter

import pytest
from served import FAULTS, ODD_KEYS, publish, rewrite, row, with_info, write_shard

from schemas.lake import Current
from schemas.storage import Folder, open_storage
from serving.shard import Shard, shard_name, shard_of
from serving.store import Table, TableRefused, fetch


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


@pytest.mark.parametrize("shards", [1, 7])
def test_each_row_is_found_by_two_reads(tmp_path: pathlib.Path, shards: int) -> None:
    """Sequential keys, as inventories have them, spread over the buckets; nothing else is in the file."""
    keys = [key for key in (f"ad{i:08d}" for i in range(60_000)) if shard_of(key.encode(), shards) == 0]
    values = [b'{"x":"%s"}' % (b"y" * (i % 90)) for i in range(len(keys))]
    path = tmp_path / "shard"
    assert write_shard(path, keys, values, shards) == len(keys)
    assert path.stat().st_size == sum(len(key) + len(value) + 2 for key, value in zip(keys, values, strict=True)) + 8 * (len(keys) + 1) + 33
    shard = Shard(path)
    assert (shard.rows, shard.buckets, shard.starts[0]) == (len(keys), len(keys), 33 + 8 * (len(keys) + 1))
    sizes = Counter()
    for key, value in zip(keys, values, strict=True):
        bucket = zlib.crc32(key.encode()) // shards % shard.buckets
        found = shard.data[shard.starts[bucket] : shard.starts[bucket + 1]].split(b"\xfe")
        assert key.encode() + b"\xff" + value in found
        sizes[len(found) - 1] += 1
    assert max(sizes) <= 12 and sizes[1] > 0.3 * len(keys)
    shard.close()
    with pytest.raises(ValueError):
        shard.data[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [(["a", "c", "b", "c"], "'c' repeats"), (["a", ""], "a key is empty"), (["plumless", "buckeroo", "plumless"], "'plumless'")],
)
def test_a_shard_refuses_bad_keys(tmp_path: pathlib.Path, keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "shard", keys, [b'{"k":1}'] * len(keys))


def test_keys_of_one_checksum_are_told_apart(tmp_path: pathlib.Path, lake: Folder, cache: pathlib.Path) -> None:
    keys = ["plumless", "buckeroo", "other"]
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", keys, shards=1), cache)
    assert [table.get(key.encode()) for key in keys] == [row(key) for key in keys]
    assert table.get(b"plumles") is None
    table.close()


def test_what_looks_like_a_record_is_no_key(tmp_path: pathlib.Path, lake: Folder, cache: pathlib.Path) -> None:
    keys = [f"ad{i}" for i in range(50)]
    table = fetch(lake, publish(lake, tmp_path, "2026-10", "r1", keys, shards=1), cache)
    assert [table.get(row(key)) for key in keys] == [None] * 50
    table.close()


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
    with pytest.raises(ValueError, match="released"):
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
    monkeypatch.setattr("schemas.remembered.crc32c_of_file", lambda path: pytest.fail(f"{path} was read again"))
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
