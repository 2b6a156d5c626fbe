"""What becomes of each odd file: rows that are accepted, and rejects with their reasons; well-formed files as Python's csv reads them."""

import csv
import dataclasses
import gzip
import io
import os
from typing import BinaryIO

import pytest

from schemas import csv_records, rows
from schemas.contract import Column, Contract, ContractError
from schemas.csv_records import Layout
from schemas.rows import read_rows

CONTRACT = Contract((Column("id", "bytes", frozenset({"key"}), required=True), Column("a", "bytes"), Column("b", "bytes")))
ADS = Contract(
    (
        CONTRACT.columns[0],
        Column("hour", "int", minimum=0, maximum=23),
        Column("bid", "float", minimum=0.0),
        Column("image", "bytes", frozenset({"image"})),
        Column("n", "int", frozenset({"impressions"})),
        Column("k", "int", frozenset({"clicks"})),
    )
)
LINES = Layout(newlines_in_values=False)
MIB = 1 << 20
Row = tuple[str | None, ...]
Reject = tuple[int, str, str]


@dataclasses.dataclass(frozen=True)
class Case:
    """A file, and what is to become of it.

    Attributes:
        name: of the case.
        data: the file's bytes.
        accepted: fields of the rows that are accepted.
        rejects: (row, column, reason) of the others.
        layout: how it is written.
        same_by_line: whether reading it line by line gives the same.
    """

    name: str
    data: bytes
    accepted: list[Row]
    rejects: list[Reject] = dataclasses.field(default_factory=list)
    layout: Layout = dataclasses.field(default_factory=Layout)
    same_by_line: bool = True


def read(
    source: bytes | BinaryIO, contract: Contract = CONTRACT, layout: Layout = rows.AS_USUAL, file: str = "a.csv"
) -> tuple[list[Row], list[Reject], list[str]]:
    """Fields of accepted rows; (row, column, reason) of rejects; and their lines."""
    accepted: list[Row] = []
    rejects, lines, numbers = [], [], []
    for block in read_rows(io.BytesIO(source) if isinstance(source, bytes) else source, contract, file, layout):
        accepted += [tuple(row.values())[1:] for row in block.rows.to_pylist()]
        rejects += [(reject["row"], reject["column"], reject["reason"]) for reject in block.rejects.to_pylist()]
        lines += block.rejects["line"].to_pylist()
        numbers += block.numbers.tolist()
    # Every row has its number, and no two have the same.
    assert sorted([*numbers, *(row for row, _, _ in rejects)]) == list(range(1, len(accepted) + len(rejects) + 1))
    assert numbers == sorted(numbers)
    return accepted, rejects, lines


ONE, TWO = ("1", "x", "y"), ("2", "x", "y")
WELL_FORMED = {
    "plain": b"id,a,b\n1,x,y\n2,x,y\n",
    "no line end at the end": b"id,a,b\n1,x,y\n2,x,y",
    "CRLF": b"id,a,b\r\n1,x,y\r\n2,x,y\r\n",
    "CR": b"id,a,b\r1,x,y\r2,x,y\r",
    "mixed line ends": b"id,a,b\r\n1,x,y\n2,x,y\r3,x,y",
    "byte-order mark": b"\xef\xbb\xbfid,a,b\n1,x,y\n",
    "byte-order mark and quotes": b'\xef\xbb\xbf"id","a","b"\n"1","x","y"\n',
    "a byte-order mark at the start of the first row": b"id,a,b\n\xef\xbb\xbf1,x,y\n",
    "quoted header": b'"id","a","b"\n1,x,y\n',
    "a header's name over two lines": b'id,a,b,"more\nof it"\n1,x,y,z\n',
    "all quoted": b'"id","a","b"\r\n"1","x","y"\r\n"2","x","y"\r\n',
    "quoted comma": b'id,a,b\n1,"x,x",y\n2,",",","\n',
    "quoted line ends": b'id,a,b\n1,"x\nx",y\n2,"\n\n","\r\n\r"\n3,x,y\n',
    "quoted CRLF in a CRLF file": b'id,a,b\r\n1,"x\r\nx",y\r\n2,x,y\r\n',
    "a quoted key over lines": b'id,a,b\n"1\n1",x,y\n2,x,y\n',
    "doubled quotes": b'id,a,b\n1,"x ""x"" x",y\n2,"""","""x"""\n3,"""""",""","""\n',
    "doubled quotes at line ends": b'id,a,b\n1,"""\n""",y\n2,"x""\n,""y",y\n',
    "empty fields": b'id,a,b\n1,,\n2,"",""\n',
    "spaces are kept": b"id,a,b\n 1 , x,y \n2,\t,\xc2\xa0\n",
    "spaces before a quote": b'id,a,b\n1, "x",y\n2,x, "y"\n',
    "a quote inside an unquoted field": b'id,a,b\n1,19" monitor,y\n2,x"y"z,y"\n3,x,y\n',
    "other columns are left out": b"z,id,y,a,b,x\n,1,,x,y,\n.,2,.,x,y,.\n",
    "columns in another order": b"b,a,id\ny,x,1\n",
    "the same other column twice": b"id,note,a,note,b\n1,,x,,y\n",
    "a header alone": b"id,a,b\n",
    "a header alone, not ended": b"id,a,b",
    "blank lines": b"\n\nid,a,b\n\n\n1,x,y\n\r\n\n2,x,y\n\n",
    "blank lines between CRLF": b"id,a,b\r\n\r\n1,x,y\r\n\r\n\r\n2,x,y\r\n",
    "a field of a blank and a comma": b'id,a,b\n1," ",","\n',
    "many scripts": "id,a,b\nÜ,名,😀\n2,й,\u202e\n".encode(),
    "code and formulas are text": b"id,a,b\n=1+1,<script>alert(1)</script>,'; DROP TABLE ads;--\n@x,-1,+1\n",
    "nul": b"id,a,b\n1\0,\0,y\n",
    "a field longer than many blocks": b"id,a,b\n1,x,y\n2," + b"x" * 200_000 + b",y\n3,x,y\n",
    "a quoted field longer than many blocks": b'id,a,b\n1,x,y\n2,"' + b'x,\n""' * 40_000 + b'",y\n3,x,y\n',
    "a row that is as long as may be": b"id,a,b\n1,x,y\n2,x," + b"y" * (MIB - 4) + b"\n3,x,y\n",
    "a quoted row that is as long as may be": b'id,a,b\n1,x,y\n2,x,"' + b"\ny" * (MIB // 2 - 3) + b'"\n3,x,y\n',
}
# The same with line ends in values cannot be read line by line.
OVER_LINES = {
    *("a header's name over two lines", "quoted line ends", "quoted CRLF in a CRLF file", "a quoted key over lines"),
    *("doubled quotes at line ends", "a quoted field longer than many blocks", "a quoted row that is as long as may be"),
}


def well_formed() -> list[Case]:
    """The cases above with the answers of Python's csv module."""
    csv.field_size_limit(2 * MIB)
    cases = []
    for name, data in WELL_FORMED.items():
        text = data.decode().removeprefix("\ufeff")
        header, *records = [record for record in csv.reader(io.StringIO(text, newline="")) if record]
        accepted = [tuple(record[header.index(column)] or None for column in ("id", "a", "b")) for record in records]
        cases.append(Case(name, data, accepted, same_by_line=name not in OVER_LINES))
    return cases


def after_header(*lines: bytes) -> bytes:
    return b"\n".join([b"id,a,b", *lines, b""])


UNCLOSED, STRAY, LONG = csv_records.UNCLOSED_QUOTE, csv_records.STRAY_QUOTE, csv_records.ROW_TOO_LONG
COUNT, ENCODING, MISSING, KEY = rows.FIELD_COUNT, rows.BAD_ENCODING, rows.MISSING_REQUIRED, rows.KEY_TOO_LONG
# Answers written by hand.
MALFORMED = [
    Case("empty file", b"", []),
    Case("only blank lines", b"\n\r\n\n", []),
    Case("only a byte-order mark", b"\xef\xbb\xbf", []),
    Case("a field too few", after_header(b"1,x,y", b"2,x", b"3,x,y"), [ONE, ("3", "x", "y")], [(2, "", COUNT)]),
    Case("a field too many", after_header(b"1,x,y", b"2,x,y,z", b"3,x,y"), [ONE, ("3", "x", "y")], [(2, "", COUNT)]),
    Case("a line of one blank", after_header(b"1,x,y", b" ", b"2,x,y"), [ONE, TWO], [(2, "", COUNT)]),
    Case("a comma at the end of each line", after_header(b"1,x,y,", b"2,x,y,"), [], [(1, "", COUNT), (2, "", COUNT)]),
    Case("a footer", after_header(b"1,x,y", b"2 rows"), [ONE], [(2, "", COUNT)]),
    Case("cut off in the last row", b"id,a,b\n1,x,y\n2,x", [ONE], [(2, "", COUNT)]),
    Case("a quote that opens a field and is not closed", after_header(b"1,x,y", b'9,"x,y', b"2,x,y"), [ONE, TWO], [(2, "", UNCLOSED)]),
    Case("an open quote in the last field", after_header(b"1,x,y", b'9,x,"y', b"2,x,y"), [ONE, TWO], [(2, "", UNCLOSED)]),
    Case("an open quote in the key", after_header(b"1,x,y", b'"9,x,y', b"2,x,y"), [ONE, TWO], [(2, "", UNCLOSED)]),
    Case("an open quote at the end of the file", b'id,a,b\n1,x,y\n2,x,y\n9,x,"y', [ONE, TWO], [(3, "", UNCLOSED)]),
    Case("an open quote at the end, then a line end", b'id,a,b\n1,x,y\n2,x,y\n9,x,"y\r\n', [ONE, TWO], [(3, "", UNCLOSED)]),
    Case("a quote alone at the end", b'id,a,b\n1,x,y\n"', [ONE], [(2, "", UNCLOSED)]),
    Case("an open quote in the first row", after_header(b'9,"x,y', b"1,x,y", b"2,x,y"), [ONE, TWO], [(1, "", UNCLOSED)]),
    Case(
        "two open quotes apart", after_header(b'9,"x,y', b"1,x,y", b'9,"x,y', b"2,x,y"), [ONE, TWO], [(1, "", UNCLOSED), (3, "", UNCLOSED)]
    ),
    Case("an open quote before quoted rows", after_header(b'9,"x,y', b'"1","x","y"', b'2,"x",y'), [ONE, TWO], [(1, "", UNCLOSED)]),
    Case("an open quote before empty quotes", after_header(b'9,"x,y', b'1,"",y', b'2,"x",y'), [("1", None, "y"), TWO], [(1, "", UNCLOSED)]),
    Case(
        "an open quote before a quoted comma",
        after_header(b'9,"x,y', b'1,",x",y', b"2,x,y"),
        [("1", ",x", "y"), TWO],
        [(1, "", UNCLOSED)],
    ),
    Case(
        "an open quote before a quoted line end",
        after_header(b'9,"x,y', b'1,"x', b'x",y', b"2,x,y"),
        [("1", "x\nx", "y"), TWO],
        [(1, "", UNCLOSED)],
        same_by_line=False,
    ),
    Case("an open quote after a doubled one", after_header(b'9,"x"",y', b"1,x,y", b"2,x,y"), [ONE, TWO], [(1, "", UNCLOSED)]),
    Case("text after a closing quote", after_header(b"1,x,y", b'9,"x" x,y', b"2,x,y"), [ONE, TWO], [(2, "", STRAY)]),
    Case("a quote that is not doubled", after_header(b"1,x,y", b'9,"x "x" x",y', b"2,x,y"), [ONE, TWO], [(2, "", STRAY)]),
    Case("a blank after a closing quote", after_header(b'9,"x" ,y', b"2,x,y"), [TWO], [(1, "", STRAY)]),
    Case("a backslash does not escape", after_header(b'9,"x \\" x",y', b"2,x,y"), [TWO], [(1, "", STRAY)]),
    Case("quotes that close and open again", after_header(b'9,"x"y"z",y', b"2,x,y"), [TWO], [(1, "", STRAY)]),
    Case("a stray quote in a quoted row", after_header(b'"9","x"y","z"', b'"2","x","y"'), [TWO], [(1, "", STRAY)]),
    Case(
        "a quote inside a field, and line ends inside another",
        after_header(b'9,19" x,"y', b'z"', b"2,x,y"),
        [TWO],
        [(1, "", UNCLOSED), (2, "", COUNT)],
    ),
    Case(
        "a stray quote in CRLF",
        b'id,a,b\r\n1,x,y\r\n9,"x,y\r\n2,x,y\r\n',
        [ONE, TWO],
        [(2, "", UNCLOSED)],
    ),
    Case("bad UTF-8 in a field", after_header(b"1,x,y", b"9,x\xff,y", b"2,x,y"), [ONE, TWO], [(2, "a", ENCODING)]),
    Case("bad UTF-8 in the key", after_header(b"\xc3,x,y", b"2,x,y"), [TWO], [(1, "id", ENCODING)]),
    Case("bad UTF-8 in quotes", after_header(b'9,"\xe2\x82",y', b"2,x,y"), [TWO], [(1, "a", ENCODING)]),
    Case("a surrogate in UTF-8", after_header(b"9,\xed\xa0\x80,y", b"2,x,y"), [TWO], [(1, "a", ENCODING)]),
    Case("UTF-8 of more bytes than needed", after_header(b"9,\xc0\xaf,y", b"2,x,y"), [TWO], [(1, "a", ENCODING)]),
    Case("bad UTF-8 in a column that is left out", b"id,a,b,c\n1,x,y,\xff\n", [ONE]),
    Case("Latin-1 read as UTF-8", after_header("9,é,y".encode("latin-1"), b"2,x,y"), [TWO], [(1, "a", ENCODING)]),
    Case("no key", after_header(b",x,y", b'"",x,y', b"2,x,y"), [TWO], [(1, "id", MISSING), (2, "id", MISSING)]),
    Case("only commas", after_header(b",,", b"2,x,y"), [TWO], [(1, "id", MISSING)]),
    Case("a key that is too long", after_header(b"k" * 501 + b",x,y", b"2,x,y"), [TWO], [(1, "id", KEY)]),
    Case("a line that is too long", after_header(b"1,x,y", b"9,x," + b"y" * (MIB - 3), b"2,x,y"), [ONE, TWO], [(2, "", LONG)]),
    Case("a line of many MiB", after_header(b"1,x,y", b"9,x," + b"y" * (5 * MIB), b"2,x,y"), [ONE, TWO], [(2, "", LONG)]),
    Case("a quoted line that is too long", after_header(b"1,x,y", b'9,x,"' + b"y" * MIB + b'"', b"2,x,y"), [ONE, TWO], [(2, "", LONG)]),
    Case("a line that is too long is the last", b"id,a,b\n1,x,y\n" + b"y" * (2 * MIB), [ONE], [(2, "", LONG)]),
    Case(
        "an open quote more than a row before the end",
        after_header(b'9,"x,y', *[b"1,x,y"] * 200_000),
        [ONE] * 200_000,
        [(1, "", UNCLOSED)],
    ),
    Case(
        "a quoted value of many lines that is too long",
        after_header(b'9,x,"y', *[b"1,x,y"] * 200_000, b'"', b"2,x,y"),
        [ONE] * 200_000 + [TWO],
        [(1, "", UNCLOSED), (200_002, "", UNCLOSED)],
    ),
    Case("line by line: a quoted line end", after_header(b'9,"x', b'x",y', b"2,x,y"), [TWO], [(1, "", UNCLOSED), (2, "", COUNT)], LINES),
    Case(
        "line by line: doubled quotes over lines",
        after_header(b'9,x,""', b'"",x,y', b"2,x,y"),
        [("9", "x", None), TWO],
        [(2, "id", MISSING)],
    ),
    Case("Latin-1", "id,a,b\n1,é,ß\n".encode("latin-1"), [("1", "é", "ß")], [], Layout(encoding="latin-1")),
    Case("Latin-1 line by line", "id,a,b\n1,é,ß\n".encode("latin-1"), [("1", "é", "ß")], [], Layout(False, "ISO_8859-1")),
    Case("cp1252", "id,a,b\n1,€,„\n".encode("cp1252"), [("1", "€", "„")], [], Layout(encoding="cp1252")),
    Case("a byte that cp1252 lacks", b"id,a,b\n1,x,y\n9,\x81,y\n2,x,y\n", [ONE, TWO], [(2, "a", ENCODING)], Layout(encoding="cp1252")),
    Case("UTF-16", 'id,a,b\n1,名,"x\ny"\n'.encode("utf-16"), [("1", "名", "x\ny")], [], Layout(encoding="utf-16")),
    Case("UTF-16 without a mark", "id,a,b\r\n1,😀,\n".encode("utf-16-le"), [("1", "😀", None)], [], Layout(encoding="utf-16-le")),
    Case("UTF-16 cut off", "id,a,b\n1,x,y".encode("utf-16-le")[:-1], [], [(1, "b", ENCODING)], Layout(encoding="utf-16-le")),
    Case("Shift JIS", "id,a,b\n1,表,ソ\n".encode("shift_jis"), [("1", "表", "ソ")], [], Layout(encoding="shift_jis")),
    Case("UTF-8 with its mark by name", b"\xef\xbb\xbfid,a,b\n1,x,y\n", [ONE], [], Layout(encoding="utf-8-sig")),
]
CASES = well_formed() + MALFORMED


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("block_bytes", [1 << 12, rows.BLOCK_BYTES], ids=["small blocks", "whole"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_accepted_and_what_is_turned_away(case: Case, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", block_bytes)
    accepted, rejects, _ = read(case.data, layout=case.layout)
    assert accepted == case.accepted
    assert rejects == case.rejects


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_packed_file_and_one_read_by_line_give_the_same(case: Case) -> None:
    packed = gzip.compress(case.data[: len(case.data) // 2], 1) + gzip.compress(case.data[len(case.data) // 2 :], 1)
    assert read(packed, layout=case.layout, file="a.csv.gz")[:2] == (case.accepted, case.rejects)
    if case.same_by_line and case.layout == Layout():
        assert read(case.data, layout=LINES)[:2] == (case.accepted, case.rejects)


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7])
def test_blocks_of_a_few_bytes_give_the_same(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", block_bytes)
    for case in CASES:
        if len(case.data) < 1000:
            assert read(case.data, layout=case.layout)[:2] == (case.accepted, case.rejects), case.name


class Endless(io.RawIOBase):
    """A header, then the same lines over and over, with one line among them: a big file that no one holds."""

    def __init__(self, size: int, line: bytes, at: int):
        lines = b"1,x,y\n" * 174_762
        self._pieces = iter([b"id,a,b\n", *(line + lines if piece == at else lines for piece in range(size >> 20))])
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        self._left = self._left or next(self._pieces, b"")
        taken = len(target[: len(self._left)])
        target[:taken], self._left = self._left[:taken], self._left[taken:]
        return taken


@pytest.mark.parametrize("layout", [Layout(), LINES], ids=["newlines in values", "line by line"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'9,"x,y\n', UNCLOSED), (b'9,"x"y,z\n', STRAY), (b'9,x"y,z,\n', COUNT), (b"9," + b"x" * (20 * MIB) + b"\n", LONG)],
    ids=["unclosed", "stray", "inside", "long"],
)
def test_a_stray_quote_in_a_big_file_costs_its_row(line: bytes, reason: str, layout: Layout) -> None:
    size = (100 if os.environ.get("ADSTOCRAT_LONG") else 10) * MIB
    accepted, found = 0, []
    for block in read_rows(io.BufferedReader(Endless(size, line, 3)), CONTRACT, "big.csv", layout):
        accepted += block.rows.num_rows
        found += [(reject["row"], reject["reason"], reject["line"]) for reject in block.rejects.to_pylist()]
    assert accepted == (size >> 20) * 174_762
    assert found == [(3 * 174_762 + 1, reason, line[:4096].decode().rstrip("\n"))]


@pytest.mark.parametrize(
    ("image", "outside"),
    [
        *[(image, True) for image in ("../x", "a/../../x", "..", "../", "a/..", "..\\x", "a\\..\\x", "/etc/passwd", "\\\\host\\x", "\\x")],
        *[(image, True) for image in ("gs://other/x.jpg", "http://h/x", "HTTPS://h/x", "file:///x", "s3://b/x", "gs:/b/x", "C:\\x", "c:x")],
        *[(image, True) for image in (" ../x", "../ x", ".. /x", " /x", " http://h/x", "\t../x", "x\t", "a\nb", "x\r", "a\0b", "\x7fx")],
        *[(image, True) for image in ("%2e%2e/x", "%2E%2e%2Fx", "%252e%252e%252fx", "%2fetc", "%5c%5chost", "gs%3a//b/x", "x%00.jpg")],
        *[(image, True) for image in ("a/%2e%2e/x", ".%2e/x", "%2e./x", "x%0a", "%25252e%25252e/x", "..%5cx", "//host/x", "://x")],
        *[(image, False) for image in ("x.jpg", "a/b/x.jpg", "./x.jpg", "a//b.jpg", "a/./b.jpg", "a..b.jpg", "...", "..a/x", "a b.jpg")],
        *[
            (image, False)
            for image in ("50%.jpg", "a%20b.jpg", "a%2fb.jpg", "%zz", "2026:10.jpg", "c/d:e.jpg", " x.jpg ", "名/é.jpg", "~x")
        ],
        *[(image, False) for image in ("．．／x", "a\\b.jpg", "x.", ".x", "-rf", "$HOME", "<script>", "=1+1", "'; DROP TABLE ads;--")],
    ],
)
def test_no_image_leaves_its_month(image: str, outside: bool) -> None:
    quoted = '"' + image.replace('"', '""') + '"'
    accepted, rejects, _ = read(f"id,hour,bid,image,n,k\n1,,,{quoted},,\n2,,,x.jpg,,\n".encode(), ADS)
    assert rejects == ([(1, "image", rows.IMAGE_OUTSIDE_MONTH)] if outside else [])
    assert [row[3] for row in accepted] == ["x.jpg"] if outside else [image, "x.jpg"]


def test_a_reject_shows_its_line() -> None:
    lines = [b'1,7,x,"a\nb",1,0', b"2,99,0.5,\xff,1,0", b"3,1", b'4,"1,0.5,,,', b"5,x" + b"y" * 9000 + b",0.5,p,1,0", b'6,7,,"../x",1,0']
    data = b"id,hour,bid,image,n,k\r\n" + b"\r\n".join(lines)
    expected = [lines[0], b"2,99,0.5,\\xff,1,0", lines[2], lines[3], lines[4][:4096], lines[5]]
    _, rejects, shown = read(data, ADS)
    assert shown == [line.decode() for line in expected]
    reasons = [rows.UNPARSABLE, rows.BAD_ENCODING, COUNT, UNCLOSED, rows.UNPARSABLE, rows.IMAGE_OUTSIDE_MONTH]
    assert [reason for *_, reason in rejects] == reasons


def test_a_byte_that_the_encoding_lacks_is_shown_as_it_stands_in_the_file() -> None:
    assert read(b"id,a,b\n9,\x81\xe9,y\n", layout=Layout(encoding="cp1252"))[2] == ["9,\\x81é,y"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"id,A,b", "f.csv lacks a column of the contract: 'a'; its header is 'id', 'A', 'b', did you mean 'A'?; add it to the export or"),
        (b"ID,a,b", "'id'; its header is 'ID', 'a', 'b', did you mean 'ID'?"),
        (b" id,a,b", "did you mean ' id'?"),
        (b"i_d,a,b", "did you mean 'i_d'?"),
        (b"id,a", "lacks a column of the contract: 'b'; its header is 'id', 'a'; add it to the export or drop it from the contract"),
        (b"id;a;b", "its header is 'id;a;b'"),
        (b"id\ta\tb", "its header is 'id\\ta\\tb'"),
        (b"id,a,b,a", "f.csv has the column 'a' 2 times; keep one of them in the export"),
        (b'id,a,"b', "f.csv cannot be read as CSV: its header is none (unexpected end of data); deliver the file again"),
        (b"1,x,y", "lacks a column of the contract: 'id'; its header is '1', 'x', 'y'"),
        ("id,a,b".encode("utf-16"), "lacks a column of the contract: 'id'"),
        (b"x" * (3 * MIB), "f.csv cannot be read as CSV: its header does not end within 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("layout", [Layout(), LINES], ids=["newlines in values", "line by line"])
def test_a_header_that_cannot_be_used_is_told(header: bytes, message: str, layout: Layout) -> None:
    with pytest.raises(ContractError) as refused:
        read(header + b"\n1,x,y\n", layout=layout, file="f.csv")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "file", "can"),
    [
        (Layout(), "a.csv", False),
        (LINES, "a.csv", True),
        (LINES, "a.csv.gz", False),
        (LINES, "A.CSV.GZ", False),
        (Layout(False, "latin-1"), "a.csv", True),
        (Layout(False, "cp1250"), "a.csv", True),
        (Layout(False, "UTF8"), "a.csv", True),
        (Layout(False, "utf-16"), "a.csv", False),
        (Layout(False, "shift_jis"), "a.csv", False),
        (Layout(False, "utf-7"), "a.csv", False),
    ],
)
def test_only_a_file_whose_lines_are_known_by_their_bytes_can_be_split(layout: Layout, file: str, can: bool) -> None:
    assert layout.can_split(file) is can


def test_a_file_in_another_encoding_as_a_whole_is_told_with_its_name() -> None:
    with pytest.raises(ContractError, match=r"^a.csv cannot be read as CSV: it is not in utf-16 \(.*BOM\), see csv_encoding; deliver"):
        read("id\n1\n".encode("utf-16-le"), layout=Layout(encoding="utf-16"))


def test_a_row_may_be_a_mebibyte_long() -> None:
    assert csv_records.MAX_ROW_BYTES == MIB
