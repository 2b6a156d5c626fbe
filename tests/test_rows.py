"""CSV bytes to typed rows and rejects: a bad row costs one row, and every reject says where, which column and why."""

import csv
import gzip
import io
import random
from typing import Any

import pyarrow as pa
import pytest

from schemas import csv_records, rows
from schemas.contract import Column, Contract, ContractError
from schemas.rows import key_of, read_rows, row_schema

CONTRACT = Contract(
    (
        Column("id", "bytes", frozenset({"key"}), required=True),
        Column("hour", "int", minimum=0, maximum=23),
        Column("bid", "float", minimum=0.0),
        Column("photo", "bytes", frozenset({"image"})),
        Column("n", "int", frozenset({"impressions"})),
        Column("k", "int", frozenset({"clicks"})),
        Column("note", "bytes", frozenset({"ignore"})),
    )
)
CLICKED = Contract((CONTRACT.columns[0], Column("c", "int", frozenset({"clicked"}))))
TEXTS = Contract((CONTRACT.columns[0], Column("a", "bytes"), Column("b", "bytes")))
HEADER = b"id,hour,bid,photo,n,k,note\n"
GOOD = b"good,1,0.5,p.jpg,10,1,x\n"

Reject = tuple[int, str, str]


def read(data: bytes, contract: Contract = CONTRACT, file: str = "ads.csv") -> tuple[list[dict[str, Any]], list[Reject]]:
    """Accepted rows, and (row, column, reason) of the rejected."""
    accepted, rejected = [], []
    for block in read_rows(io.BytesIO(data), contract, file):
        assert block.rows.schema == row_schema(contract)
        assert block.rejects.schema == rows.REJECTS
        assert block.read == block.rows.num_rows + block.rejects.num_rows
        accepted += block.rows.to_pylist()
        rejected += [(reject["row"], reject["column"], reject["reason"]) for reject in block.rejects.to_pylist()]
    return accepted, rejected


def keys(accepted: list[dict[str, Any]]) -> list[str]:
    return [row["key"] for row in accepted]


def test_a_row_is_its_key_and_the_kept_columns_typed() -> None:
    accepted, rejected = read(HEADER + GOOD)
    assert accepted == [{"key": "good", "id": "good", "hour": 1, "bid": 0.5, "photo": "p.jpg", "n": 10, "k": 1}]
    assert rejected == []


def test_missing_values_of_optional_columns_are_null() -> None:
    accepted, rejected = read(HEADER + b'a,,,,,,\nb,"","","","","",""\n')
    assert rejected == []
    for row in accepted:
        assert [row[name] for name in ("hour", "bid", "photo", "n", "k")] == [None] * 5


@pytest.mark.parametrize(
    ("row", "column", "reason"),
    [
        (b"a,1,0.5,p.jpg,10", "", rows.FIELD_COUNT),
        (b"a,1,0.5,p.jpg,10,1,x,more", "", rows.FIELD_COUNT),
        (b"\xff,1,0.5,p.jpg,10,1,x", "id", rows.BAD_ENCODING),
        (b"a,1,0.5,p\xc3.jpg,10,1,x", "photo", rows.BAD_ENCODING),
        (b"a,\xff,0.5,p.jpg,10,1,x", "hour", rows.BAD_ENCODING),
        (b"a,one,0.5,p.jpg,10,1,x", "hour", rows.UNPARSABLE),
        (b"a,1.5,0.5,p.jpg,10,1,x", "hour", rows.UNPARSABLE),
        (b"a, 1,0.5,p.jpg,10,1,x", "hour", rows.UNPARSABLE),
        (b"a,0x10,0.5,p.jpg,10,1,x", "hour", rows.UNPARSABLE),
        (b"a,1,0X1p3,p.jpg,10,1,x", "bid", rows.UNPARSABLE),
        (b"a,1,much,p.jpg,10,1,x", "bid", rows.UNPARSABLE),
        (b'a,1,"0,5",p.jpg,10,1,x', "bid", rows.UNPARSABLE),
        (b"a,1,0.5,p.jpg,99999999999999999999,1,x", "n", rows.UNPARSABLE),
        (b",1,0.5,p.jpg,10,1,x", "id", rows.MISSING_REQUIRED),
        (b'"",1,0.5,p.jpg,10,1,x', "id", rows.MISSING_REQUIRED),
        (b"a,-1,0.5,p.jpg,10,1,x", "hour", rows.OUT_OF_DOMAIN),
        (b"a,24,0.5,p.jpg,10,1,x", "hour", rows.OUT_OF_DOMAIN),
        (b"a,1,-0.01,p.jpg,10,1,x", "bid", rows.OUT_OF_DOMAIN),
        (b"a,1,1e400,p.jpg,10,1,x", "bid", rows.OUT_OF_DOMAIN),
        (b"a,1,0.5,p.jpg,-10,,x", "n", rows.OUT_OF_DOMAIN),
        (b"a,1,0.5,p.jpg,10,-1,x", "k", rows.OUT_OF_DOMAIN),
        (b"a,1,0.5,p.jpg,10,11,x", "k", rows.CLICKS_OVER_IMPRESSIONS),
        (b"k" * 501 + b",1,0.5,p.jpg,10,1,x", "id", rows.KEY_TOO_LONG),
        ("ü".encode() * 251 + b",1,0.5,p.jpg,10,1,x", "id", rows.KEY_TOO_LONG),
        (b"a,1,0.5,../p.jpg,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
        (b"a,1,0.5,a/../../p.jpg,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
        (b"a,1,0.5,..,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
        (b"a,1,0.5,..\\p.jpg,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
        (b"a,1,0.5,/etc/passwd,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
        (b"a,1,0.5,\\\\host\\p.jpg,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
        (b"a,1,0.5,http://host/p.jpg,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
        (b"a,1,0.5,C:\\p.jpg,10,1,x", "photo", rows.IMAGE_OUTSIDE_MONTH),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_row_costs_one_row_and_says_why(row: bytes, column: str, reason: str, first: bool) -> None:
    data, number = (row + b"\n" + GOOD, 1) if first else (GOOD + GOOD + row + b"\n" + GOOD, 3)
    accepted, rejected = read(HEADER + data)
    assert rejected == [(number, column, reason)]
    assert keys(accepted) == ["good"] * data.count(b"good")


def test_several_sorts_of_bad_values_of_one_column_stand_side_by_side() -> None:
    values = [b"\xff", b"one", b"7", b"7\xff", b"99", b"", b"9" * 20, b"8", b"0X1f"]
    accepted, rejected = read(HEADER + b"".join(b"a%d,%b,,,,,\n" % (number, value) for number, value in enumerate(values)))
    assert [row["hour"] for row in accepted] == [7, None, 8]
    reasons = {1: rows.BAD_ENCODING, 4: rows.BAD_ENCODING, 5: rows.OUT_OF_DOMAIN, **dict.fromkeys((2, 7, 9), rows.UNPARSABLE)}
    assert rejected == [(row, "hour", reason) for row, reason in sorted(reasons.items())]


@pytest.mark.parametrize("row", [b"\xff", b"\xff,1", b'"a\n\xff",1,x,x,x,x,x,x,x', b"a,1,0.5,p.jpg,10,1,\xff,x", b'19" \xff,"1"'])
def test_a_row_of_bad_text_with_another_number_of_fields_costs_one_row(row: bytes) -> None:
    accepted, rejected = read(HEADER + GOOD + row + b"\n" + GOOD + b"short\n" + GOOD)
    assert rejected == [(2, "", rows.FIELD_COUNT), (4, "", rows.FIELD_COUNT)]
    assert len(accepted) == 3


@pytest.mark.parametrize("photo", [b"a/b.jpg", b"a..b.jpg", b"...jpg", b"..a/b", b"a b.jpg", "名.jpg".encode(), b"c/d:e.jpg", b"7"])
def test_a_name_inside_the_month_is_accepted(photo: bytes) -> None:
    accepted, rejected = read(HEADER + b"a,1,0.5," + photo + b",10,1,x\n")
    assert (accepted[0]["photo"], rejected) == (photo.decode(), [])


@pytest.mark.parametrize(
    ("field", "value"),
    [("hour", 0), ("hour", 23), ("bid", 0.0), ("n", 0), ("n", None), ("k", None), ("bid", 1e-300), ("n", 9223372036854775807)],
)
def test_bounds_are_inclusive_and_outcomes_may_be_missing(field: str, value: float | None) -> None:
    row = {"id": "a", "hour": 1, "bid": 0.5, "photo": "", "n": 0, "k": 0, "note": "", field: value}
    text = ",".join("" if value is None else str(value) for value in row.values())
    accepted, rejected = read(HEADER + text.encode() + b"\n")
    assert (accepted[0][field], rejected) == (value, [])


@pytest.mark.parametrize(
    ("value", "reason"),
    [(b"0", None), (b"1", None), (b"", None), (b"2", rows.OUT_OF_DOMAIN), (b"-1", rows.OUT_OF_DOMAIN), (b"0.5", rows.UNPARSABLE)],
)
def test_an_impression_was_clicked_or_not(value: bytes, reason: str | None) -> None:
    _, rejected = read(b"id,c\na," + value + b"\n", CLICKED)
    assert rejected == ([(1, "c", reason)] if reason else [])


def test_the_longest_key_is_500_bytes() -> None:
    accepted, rejected = read(HEADER + b"k" * 500 + b",1,0.5,p.jpg,10,1,x\n")
    assert (len(accepted), rejected) == (1, [])


def test_a_row_with_several_faults_is_rejected_once() -> None:
    _, rejected = read(HEADER + b",99,-1,../p,1,2,x\n")
    assert rejected == [(1, "id", rows.MISSING_REQUIRED)]


def test_a_reject_names_its_file_and_shows_its_value() -> None:
    data = HEADER + b"a,\xffzz,0.5,p,10,1,x\nb,1\n" + b"c,1,0.5,/" + b"p" * 2000 + b",10,1,x\n"
    (block,) = read_rows(io.BytesIO(data), CONTRACT, "raw/ads.csv")
    assert block.rejects["file"].to_pylist() == ["raw/ads.csv"] * 3
    assert block.rejects["value"].to_pylist() == ["\\xffzz", "b,1", "/" + "p" * 999]
    assert block.rejects["line"].to_pylist() == ["a,\\xffzz,0.5,p,10,1,x", "b,1", "c,1,0.5,/" + "p" * 2000 + ",10,1,x"]


def test_accepted_rows_have_their_numbers_in_the_file() -> None:
    (block,) = read_rows(io.BytesIO(HEADER + GOOD + b"short\n\n" + GOOD + b"a,one,,,,,\n" + GOOD), CONTRACT, "ads.csv")
    assert (block.numbers.tolist(), block.rejects["row"].to_pylist()) == ([1, 3, 5], [2, 4])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n", []),
        (b"id,a,b", []),
        (b"id,a,b\n", []),
        (b"id,a,b\r\n", []),
        (b"\xef\xbb\xbfid,a,b\n1,2,3\n", [("1", "2", "3")]),
        (b"id,a,b\r\n1,2,3\r\n4,5,6\r\n", [("1", "2", "3"), ("4", "5", "6")]),
        (b"id,a,b\n1,2,3", [("1", "2", "3")]),
        (b"id,a,b\n\n1,2,3\n\n", [("1", "2", "3")]),
        (b"b,id,a\n3,1,2\n", [("1", "2", "3")]),
        (b"x,id,y,a,b,z\n.,1,.,2,3,.\n", [("1", "2", "3")]),
        (b'"id","a","b"\n"1","2","3"\n', [("1", "2", "3")]),
        (b'id,a,b\n"1\n2","a,b","say ""hi"""\n', [("1\n2", "a,b", 'say "hi"')]),
        (b'id,a,b\r\n"1\r\n2",",",""""\r\n', [("1\r\n2", ",", '"')]),
        (b'id,a,b\n1,mid"quote, spaced \n', [("1", 'mid"quote', " spaced ")]),
        ("id,a,b\nÜ,名,😀\n".encode(), [("Ü", "名", "😀")]),
    ],
)
@pytest.mark.parametrize("file", ["ads.csv", "ads.csv.gz", "ADS.CSV.GZ"])
def test_well_formed_files_are_read_as_they_are(data: bytes, expected: list[tuple[str, ...]], file: str) -> None:
    accepted, rejected = read(gzip.compress(data) if file != "ads.csv" else data, TEXTS, file)
    assert [(row["id"], row["a"], row["b"]) for row in accepted] == expected
    assert rejected == []


@pytest.mark.parametrize("block_bytes", [1 << 10, 8 << 20])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_well_formed_files_are_read_as_python_s_csv_module_reads_them(
    monkeypatch: pytest.MonkeyPatch, ending: str, block_bytes: int
) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", block_bytes)
    source = random.Random(3)
    pieces = ["a", "Ü", ",", '"', "\n", ending, " ", "7", "'", "\\", ";", "\t"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=ending)
    writer.writerow(["id", "a", "b"])
    for number in range(2_000):
        writer.writerow([f"{number}", *("".join(source.choices(pieces, k=source.randrange(6))) for _ in range(2))])
    expected = [[value or None for value in row] for row in list(csv.reader(io.StringIO(text.getvalue(), newline="")))[1:]]
    accepted, rejected = read(text.getvalue().encode(), TEXTS)
    assert [[row["id"], row["a"], row["b"]] for row in accepted] == expected
    assert rejected == []


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"id,a\n", r"raw/ads.csv lacks a column of the contract: .*'b'.*; add it to the export or drop it from the contract"),
        (b"id,a,B\n", "lacks a column of the contract"),
        (b"id;a;b\n", "lacks a column of the contract"),
    ],
)
def test_a_header_without_a_contract_column_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        read(header + header, TEXTS, "raw/ads.csv")


def test_a_header_may_lack_an_ignored_column() -> None:
    accepted, rejected = read(b"id,hour,bid,photo,n,k\na,1,0.5,,,\n")
    assert (keys(accepted), rejected) == (["a"], [])


@pytest.mark.parametrize("block_bytes", [200, 1 << 10, 1 << 14, 8 << 20])
def test_row_numbers_are_right_when_bad_rows_of_every_sort_stand_between(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", block_bytes)
    source = random.Random(5)
    lines, expected, good = [], [], []
    for number in range(1, 3_001):
        kind = source.choice(["good", "good", "short", "long", "unparsable", "line break", "blank"])
        if kind == "short":
            lines.append(b"s%d,1" % number)
            expected.append((number, "", rows.FIELD_COUNT))
        elif kind == "long":
            lines.append(b'l%d,"1\n1",0.5,p,10,1,x,x' % number)
            expected.append((number, "", rows.FIELD_COUNT))
        elif kind == "unparsable":
            lines.append(b"u%d,one,0.5,p,10,1,x" % number)
            expected.append((number, "hour", rows.UNPARSABLE))
        else:
            key = b'"g\n%d"' % number if kind == "line break" else b"g%d" % number
            # A blank line is no row and has no number.
            lines.append((b"\n" if kind == "blank" else b"") + key + b",1,0.5,p,10,1,x")
            good.append(key.strip(b'"').decode())
    accepted, rejected = read(HEADER + b"\n".join(lines) + b"\n")
    assert sorted(rejected) == expected
    assert keys(accepted) == good


def test_a_file_may_be_bad_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 200)
    accepted, rejected = read(HEADER + b"short\n" * 500)
    assert accepted == []
    assert rejected == [(number, "", rows.FIELD_COUNT) for number in range(1, 501)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([["a|b", "a\\"]], ["a|b", "a\\"]),
        ([["a|b", "a", "a\\", "\\|"], ["c", "b|c", "|c", ""]], ["a\\|b|c", "a|b\\|c", "a\\\\|\\|c", "\\\\\\||"]),
        ([["a"], [7], [0.5]], ["a|7|0.5"]),
    ],
)
def test_a_key_of_several_columns_is_joined_and_escaped(columns: list[list[object]], expected: list[str]) -> None:
    assert key_of([pa.array(column) for column in columns]).to_pylist() == expected


def test_different_columns_never_make_the_same_key() -> None:
    texts = ["", "a", "|", "\\", "a|", "|a", "\\|", "|\\", "\\\\", "||", "a\\|b"]
    pairs = [(one, other) for one in texts for other in texts]
    joined = key_of([pa.array([one for one, _ in pairs]), pa.array([other for _, other in pairs])]).to_pylist()
    assert len(set(joined)) == len(pairs)


def test_a_key_of_several_columns_is_that_of_the_row() -> None:
    contract = Contract((TEXTS.columns[0], Column("market", "int", frozenset({"key"}), required=True)))
    accepted, rejected = read(b"id,market\na|b,7\nc,\n,8\n", contract)
    assert [(row["key"], row["id"], row["market"]) for row in accepted] == [("a\\|b|7", "a|b", 7)]
    assert rejected == [(2, "market", rows.MISSING_REQUIRED), (3, "id", rows.MISSING_REQUIRED)]


@pytest.mark.parametrize("value", [b"5", b"-5", b"007", b"0x10", b"1234567890123456789", b"+5", b" 5", b"1_000", b"5.0", b"", b"9" * 20])
def test_whether_a_whole_number_is_one_does_not_depend_on_other_rows(value: bytes) -> None:
    contract = Contract((TEXTS.columns[0], Column("a", "int")))
    assert verdict(value, b"no number", contract) == verdict(value, b"1", contract)


@pytest.mark.parametrize(
    "value", [b"5", b".5", b"5.", b"-5e-3", b"1E+0005", b"+5", b"nan", b"inf", b"-Infinity", b"1e400", b"0x10", b" 5", b""]
)
def test_whether_a_number_is_one_does_not_depend_on_other_rows(value: bytes) -> None:
    contract = Contract((TEXTS.columns[0], Column("a", "float")))
    assert verdict(value, b"no number", contract) == verdict(value, b"1", contract)


def verdict(value: bytes, neighbour: bytes, contract: Contract) -> tuple[list[Any], list[Reject]]:
    """What becomes of a value in the same block as another."""
    accepted, rejected = read(b"id,a\nx," + value + b"\ny," + neighbour + b"\n", contract)
    return [row["a"] for row in accepted if row["key"] == "x"], [reject for reject in rejected if reject[0] == 1]


@pytest.mark.parametrize("rows_before", [0, 500])
def test_a_quote_that_is_never_closed_costs_its_row(monkeypatch: pytest.MonkeyPatch, rows_before: int) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1 << 10)
    accepted, rejected = read(b"id,a,b\n" + b"1,2,3\n" * rows_before + b'"open,2,3\n' + b"1,2,3\n" * 1_000, TEXTS)
    assert len(accepted) == rows_before + 1_000
    assert rejected == [(rows_before + 1, "", csv_records.UNCLOSED_QUOTE)]


@pytest.mark.parametrize("data", [b"id,a,b\n1,2,3\n", gzip.compress(b"id,a,b\n" + b"1,2,3\n" * 5_000)[:-12]], ids=["plain", "cut off"])
def test_a_gz_file_that_is_none_is_told_with_its_name(data: bytes) -> None:
    with pytest.raises(ContractError, match=r"raw/ads\.csv\.gz cannot be"):
        read(data, TEXTS, "raw/ads.csv.gz")
