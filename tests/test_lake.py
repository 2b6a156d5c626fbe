"""Months, manifests, receipts and pointers: what is complete, what counts, and what may move."""

import itertools
import pathlib

import pytest

from schemas import lake
from schemas.lake import CHAMPION, CURRENT, Champion, Current, Manifest, Receipt
from schemas.storage import Folder, Storage, open_storage

RECEIPTS = (
    Receipt("file/a.csv", "", 0, {"read": 5, "rejected:unparsable": 2}),
    Receipt("shard/00000", "rows/x/shard_00000-1.parquet", 2, {"ingested": 2}, "AAAAAA=="),
    Receipt("shard/00001", "rows/x/shard_00001-2.parquet", 1, {"ingested": 1, "rejected:unparsable": 1}, "BBBBBB=="),
)


@pytest.fixture
def storage(tmp_path: pathlib.Path) -> Storage:
    return open_storage(str(tmp_path))


@pytest.mark.parametrize("month", ["2026-10", "1999-01", "2030-12"])
def test_a_month_is_itself(month: str) -> None:
    assert lake.check_month(month) == month


@pytest.mark.parametrize("month", ["2026-13", "2026-00", "2026-1", "202610", "2026-10-01", "26-10", "", "2026-10\n", " 2026-10", "latest"])
def test_what_is_no_month_is_refused_by_name(month: str) -> None:
    with pytest.raises(ValueError, match="expected YYYY-MM") as refused:
        lake.check_month(month)
    assert repr(month) in str(refused.value)


@pytest.mark.parametrize(
    ("month", "months", "expected"),
    [
        ("2026-10", 1, "2026-11"),
        ("2026-12", 1, "2027-01"),
        ("2026-01", -1, "2025-12"),
        ("2026-10", 0, "2026-10"),
        ("2026-10", 27, "2029-01"),
        ("2026-10", -34, "2023-12"),
    ],
)
def test_months_are_counted_over_years(month: str, months: int, expected: str) -> None:
    assert lake.month_after(month, months) == expected
    assert lake.month_after(expected, -months) == month


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [("2026-10", "2026-10", ["2026-10"]), ("2026-11", "2027-02", ["2026-11", "2026-12", "2027-01", "2027-02"])],
)
def test_months_between_include_both(first: str, last: str, expected: list[str]) -> None:
    assert lake.months_between(first, last) == expected


@pytest.mark.parametrize(("first", "last"), [("2026-11", "2026-10"), ("2026-1", "2026-10"), ("2026-10", "soon")])
def test_months_between_refuses_what_is_no_range(first: str, last: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        lake.months_between(first, last)


@pytest.mark.parametrize(("name", "shard"), [("shard/00003.000", 3), ("00012.017", 12), ("shard/7", 7)])
def test_the_shard_is_the_number_in_the_unit_s_name(name: str, shard: int) -> None:
    assert lake.shard_of_unit(name) == shard


def test_attempts_have_names_of_their_own() -> None:
    names = {lake.unique("rows/2026-10/r", "shard", ".parquet") for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("rows/2026-10/r/shard-") and name.endswith(".parquet") for name in names)


@pytest.mark.parametrize("info", [{}, {"shards": 3, "nested": {"a": [1, None, 0.5]}, "why": "Ünïcode"}])
@pytest.mark.parametrize("receipts", [(), RECEIPTS])
def test_a_manifest_comes_back_as_it_was_written(receipts: tuple[Receipt, ...], info: dict[str, object]) -> None:
    manifest = Manifest("ingest", receipts, info)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_manifest_sums_its_receipts() -> None:
    manifest = Manifest("ingest", RECEIPTS)
    assert manifest.rows == 3
    assert manifest.files == ["rows/x/shard_00000-1.parquet", "rows/x/shard_00001-2.parquet"]
    assert (manifest.count("ingested"), manifest.count("read"), manifest.count("none")) == (3, 5, 0)
    assert manifest.counts("rejected:") == {"unparsable": 3}


def test_a_stage_is_complete_once_its_manifest_is_there(storage: Storage) -> None:
    folder = lake.stage_folder("rows", "2026-10", "r")
    storage.write(f"{folder}/part.parquet", b"")
    assert lake.read_manifest(storage, folder) is None
    manifest = Manifest("ingest", RECEIPTS)
    assert lake.commit(storage, folder, manifest) == manifest
    assert lake.read_manifest(storage, folder) == manifest


def test_a_finaliser_that_comes_second_adopts_the_first_manifest(storage: Storage) -> None:
    first, second = Manifest("ingest", RECEIPTS[:1]), Manifest("ingest", RECEIPTS)
    assert lake.commit(storage, "rows/2026-10/r", first) == first
    assert lake.commit(storage, "rows/2026-10/r", second) == first
    assert lake.read_manifest(storage, "rows/2026-10/r") == first


def test_the_receipt_that_counts_is_the_same_in_any_order() -> None:
    attempts = [Receipt(unit, f"rows/{unit}-{name}.parquet", 3) for unit, name in ("ub", "ua", "tc", "ud", "tb")]
    counts = [Receipt("t", "rows/t-b.parquet", 3), Receipt("u", "rows/u-a.parquet", 3)]
    assert all(lake.one_receipt_each(order) == counts for order in itertools.permutations(attempts))


def test_there_is_no_pointer_at_first(storage: Storage) -> None:
    assert lake.read_pointer(storage, CURRENT, Current) == (None, None)


@pytest.mark.parametrize(
    ("there", "value", "moved"),
    [
        (None, Current("2026-10", "a"), True),
        (Current("2026-10", "a"), Current("2026-11", "b"), True),
        (Current("2026-10", "a"), Current("2026-10", "b"), True),
        (Current("2026-10", "a"), Current("2026-10", "a"), True),
        (Current("2026-10", "a"), Current("2026-09", "b"), False),
        (Current("2027-01", "a"), Current("2026-12", "b"), False),
    ],
)
def test_a_pointer_moves_forward_or_within_its_month_and_never_back(
    storage: Storage, there: Current | None, value: Current, moved: bool
) -> None:
    if there:
        lake.move_pointer(storage, CURRENT, there)
    assert lake.move_pointer(storage, CURRENT, value) is moved
    assert lake.read_pointer(storage, CURRENT, Current)[0] == (value if moved else there)


def test_the_champion_is_a_pair(storage: Storage) -> None:
    champion = Champion("e1", "r1", "2026-10", "run")
    assert lake.move_pointer(storage, CHAMPION, champion)
    found, version = lake.read_pointer(storage, CHAMPION, Champion)
    assert found == champion
    assert version is not None


class Overtaken(Folder):
    """A lake in which another run moves the pointer just before this one's first swap."""

    def swap(self, name: str, version: str | None, data: bytes) -> bool:
        lake.move_pointer(open_storage(self.uri), name, Current("2026-11", "other"))
        return super().swap(name, version, data)


@pytest.mark.parametrize(("month", "moved"), [("2026-10", False), ("2026-12", True)])
def test_a_concurrent_move_is_looked_at_again(tmp_path: pathlib.Path, month: str, moved: bool) -> None:
    storage = Overtaken(str(tmp_path))
    value = Current(month, "mine")
    assert lake.move_pointer(storage, CURRENT, value) is moved
    assert lake.read_pointer(storage, CURRENT, Current)[0] == (value if moved else Current("2026-11", "other"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"receipts": [{"file": 1}], "stage": "s"}', b"\xff"])
def test_a_damaged_manifest_is_told_by_name(tmp_path: pathlib.Path, data: bytes) -> None:
    storage = Folder(str(tmp_path))
    storage.write("rows/manifest.json", data)
    with pytest.raises(ValueError, match=r"rows/manifest.json is damaged \(.*\), expected what its stage wrote; restore it, or remove"):
        lake.read_manifest(storage, "rows")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"null", b'{"month": "2026-10", "other": 1}', b"\xff"])
def test_a_damaged_pointer_or_note_is_told_by_name(tmp_path: pathlib.Path, data: bytes) -> None:
    storage = Folder(str(tmp_path))
    for name in (CURRENT, "publish/2026-10/a.json"):
        storage.write(name, data)
    with pytest.raises(ValueError, match=r"lookup/CURRENT is damaged \(.*\), expected JSON of month, run; restore it"):
        lake.read_pointer(storage, CURRENT, Current)
    with pytest.raises(ValueError, match=r"publish/2026-10/a.json is damaged \(.*\), expected JSON of published, month, run, contract, "):
        lake.publications(storage, "2026-10")
