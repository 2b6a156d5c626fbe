"""However a file is cut into blocks and parts, the same rows with the same numbers come out of it."""

import csv
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas import csv_records, rows
from schemas.contract import Column, Contract
from schemas.csv_records import Layout
from schemas.rows import read_rows

CONTRACT = Contract((Column("id", "bytes", frozenset({"key"}), required=True), Column("a", "bytes"), Column("b", "int", maximum=99)))
HEADER = "b,x,id,a"
# In the ordinary run a tenth of what is due.
CASES = settings(
    max_examples=2_000 if os.environ.get("ADSTOCRAT_LONG") else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
Found = tuple[list[tuple[Any, ...]], list[dict[str, Any]]]


@pytest.fixture(autouse=True, scope="module")
def limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK_BYTES", rows.BLOCK_BYTES)
        patch.setattr(rows, "MAX_ROW_BYTES", rows.MAX_ROW_BYTES)
        yield


def read(data: bytes, layout: Layout, block_bytes: int, cuts: list[int] | None = None, max_row_bytes: int = 1 << 20) -> Found:
    """Rows with their numbers, and rejects; of the parts that the file is cut into, numbered on from the parts before."""
    rows.BLOCK_BYTES, rows.MAX_ROW_BYTES = block_bytes, max_row_bytes
    accepted: list[tuple[Any, ...]] = []
    rejects: list[dict[str, Any]] = []
    edges = [0, *sorted(cuts), len(data)] if cuts is not None else []
    before = 0
    for span in itertools.pairwise(edges) if edges else [None]:
        read = 0
        for block in read_rows(io.BytesIO(data), CONTRACT, "a.csv", layout, span):
            numbers = (block.numbers + before).tolist()
            accepted += [(number, *row.values()) for number, row in zip(numbers, block.rows.to_pylist(), strict=True)]
            rejects += [{**reject, "row": reject["row"] + before} for reject in block.rejects.to_pylist()]
            for reject in rejects:
                if reject["reason"] == csv_records.ROW_TOO_LONG:
                    # How much of such a line is shown depends on the blocks where a row may be shorter than what is shown of it.
                    reject["line"] = reject["value"] = ""
            read += block.read
        before += read
    numbers = sorted([*(row[0] for row in accepted), *(reject["row"] for reject in rejects)])
    assert numbers == list(range(1, before + 1))
    return accepted, rejects


@dataclasses.dataclass(frozen=True)
class Table:
    """A file and the rows that were written to it."""

    text: str
    rows: list[tuple[Any, ...]]


@st.composite
def tables(draw: st.DrawFn, characters: str) -> Table:
    """A well-formed file: values of the characters, quoted where they must be and sometimes where not, with any line ends."""
    value = st.text(characters, max_size=8)
    records = draw(st.lists(st.tuples(st.integers(-99, 99) | st.none(), value, value.filter(bool), value), max_size=12))
    parts = [draw(st.sampled_from(["", "\ufeff"])), draw(st.sampled_from([HEADER, '"b","x","id","a"'])), draw(LINE_ENDS)]
    for record in records:
        parts.append(draw(st.sampled_from(["", "", "\n", "\r\n"])))
        for place, field in enumerate("" if value is None else str(value) for value in record):
            must = any(character in field for character in ',\r\n"')
            quoted = '"' + field.replace('"', '""') + '"' if must or draw(st.booleans()) else field
            parts += ["," if place else "", quoted]
        parts.append(draw(LINE_ENDS))
    text = "".join(parts)
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    return Table(text, [(key, key, a or None, b) for b, _, key, a in records])


@CASES
@given(tables('ab,"\n\r é名'), st.integers(1, 100), st.sampled_from(["utf-8", "utf-16"]))
def test_a_table_is_read_as_it_was_written(table: Table, block_bytes: int, encoding: str) -> None:
    accepted, rejects = read(table.text.encode(encoding), Layout(encoding=encoding), block_bytes)
    assert rejects == []
    assert [row[1:] for row in accepted] == table.rows
    header, *records = [record for record in csv.reader(io.StringIO(table.text.removeprefix("\ufeff"), newline="")) if record]
    assert header == HEADER.split(",")
    assert [(row[2], row[3] or "", "" if row[4] is None else str(row[4])) for row in accepted] == [(r[2], r[3], r[0]) for r in records]


@CASES
@given(tables('ab," é'), st.integers(1, 100), st.lists(st.integers(0, 300), max_size=6), st.sampled_from(["utf-8", "latin-1"]))
def test_a_table_is_read_as_it_was_written_however_it_is_split(table: Table, block_bytes: int, cuts: list[int], encoding: str) -> None:
    data = table.text.removeprefix("\ufeff" if encoding == "latin-1" else "").encode(encoding)
    accepted, rejects = read(data, Layout(False, encoding), block_bytes, [min(cut, len(data)) for cut in cuts])
    assert rejects == []
    assert [row[1:] for row in accepted] == table.rows
    assert [row[0] for row in accepted] == list(range(1, len(table.rows) + 1))


# Lines as they come, with quotes, commas and line ends anywhere.
PIECES = [
    "7,x,k,a",
    "7,x,k,a\n",
    '"',
    '""',
    '","',
    ",",
    "\n",
    "\r\n",
    "\r",
    "k",
    '"7","x","k","a"\n',
    '7,x,"k\nk",a\n',
    "é",
    "\ufeff",
    "100,",
    "\x00",
]
DIRTY = st.lists(st.sampled_from(PIECES).map(str.encode) | st.just(b"\xff"), max_size=40).map(b"".join)


@CASES
@given(DIRTY, st.integers(1, 60), st.sampled_from([5, 12, 40, 1 << 20]))
def test_what_is_turned_away_does_not_depend_on_the_blocks(dirt: bytes, block_bytes: int, max_row_bytes: int) -> None:
    data = f"{HEADER}\n".encode() + dirt
    whole = read(data, Layout(), 1 << 20, max_row_bytes=max_row_bytes)
    assert read(data, Layout(), block_bytes, max_row_bytes=max_row_bytes) == whole


@CASES
@given(DIRTY, st.integers(1, 60), st.lists(st.integers(0, 120), max_size=5), st.sampled_from([5, 12, 40, 1 << 20]))
def test_what_is_turned_away_does_not_depend_on_the_splits(dirt: bytes, block_bytes: int, cuts: list[int], max_row_bytes: int) -> None:
    data, layout = f"{HEADER}\r\n".encode() + dirt, Layout(newlines_in_values=False)
    whole = read(data, layout, 1 << 20, max_row_bytes=max_row_bytes)
    assert read(data, layout, block_bytes, [min(cut, len(data)) for cut in cuts], max_row_bytes) == whole
    # Line by line each line is one row.
    assert len(whole[0]) + len(whole[1]) == sum(bool(line) for line in data.replace(b"\r", b"\n").split(b"\n")) - 1


@CASES
@given(tables("abc,é"), DIRTY, st.integers(0, 12))
def test_rows_before_dirt_stay(table: Table, dirt: bytes, block_bytes: int) -> None:
    """What comes later in a file changes no row before it."""
    data = table.text.rstrip("\r\n").encode() + b"\n"
    accepted, _ = read(data + dirt, Layout(), 7 + block_bytes)
    assert [row[1:] for row in accepted[: len(table.rows)]] == table.rows
