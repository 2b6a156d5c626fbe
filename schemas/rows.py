"""From the bytes of a CSV file to checked, typed rows: columnar throughout, and a bad row costs one row.

Columns are read as bytes and cast here under masks, because a reader that casts by itself loses the whole file to one bad value.
"""

import contextlib
import dataclasses
import difflib
import gzip
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from schemas import csv_records
from schemas.contract import Column, Contract, ContractError
from schemas.csv_records import MAX_ROW_BYTES, Block, Fault, HeaderError, Layout

BLOCK_BYTES = 8 << 20
MAX_KEY_BYTES = 500

# Reasons to reject a row; the first that holds is the one that counts. Three more are those of `csv_records`.
FIELD_COUNT = "field_count"
BAD_ENCODING = "bad_encoding"
UNPARSABLE = "unparsable"
MISSING_REQUIRED = "missing_required"
OUT_OF_DOMAIN = "out_of_domain"
CLICKS_OVER_IMPRESSIONS = "clicks_over_impressions"
KEY_TOO_LONG = "key_too_long"
DUPLICATE_KEY = "duplicate_key"
IMAGE_OUTSIDE_MONTH = "image_outside_month"

AS_USUAL = Layout()
_TEXTS = ("column", "reason", "value", "line")
REJECTS = pa.schema([("file", pa.string()), ("row", pa.int64()), *((name, pa.string()) for name in _TEXTS)])
_VALUE_BYTES, _LINE_BYTES = 1000, 4096
# What the casts surely take; where a block has a bad value, the others are tried one by one.
_SURE_DIGITS = 18
_INTEGER = r"^-?[0-9]{1,18}$"
_NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?$"
_BAD_FILE = (EOFError, gzip.BadGzipFile, zlib.error, HeaderError)
# A name that leaves the month's images folder: a parent folder, an absolute path, a URI, or control characters that hide one.
_OUTSIDE = (
    r"(^|[/\\])\s*\.\.\s*([/\\]|$)|^\s*[/\\]|://|^\s*[A-Za-z]:|^\s*[A-Za-z][A-Za-z0-9+.-]*:[/\\]"
    r"|[\x00-\x1f\x7f]"
)
# What could be unescaped into such a name, in this order.
_ESCAPED = (("(?i)%(25)+", "%"), ("(?i)%2e", "."), ("(?i)%2f", "/"), ("(?i)%5c", r"\\"), ("(?i)%3a", ":"), ("(?i)%([01][0-9a-f]|7f)", "\t"))


@dataclasses.dataclass(frozen=True)
class Checked:
    """Rows of one block of a file.

    Attributes:
        rows: `key` and the contract's kept columns, typed.
        numbers: of each of `rows`, the row's number in the file, from 1; turned away rows have numbers too, blank lines have none.
        rejects: what was turned away, as `REJECTS`.
    """

    rows: pa.RecordBatch
    numbers: np.ndarray
    rejects: pa.RecordBatch

    @property
    def read(self) -> int:
        return self.rows.num_rows + self.rejects.num_rows


def row_schema(contract: Contract) -> pa.Schema:
    """Columns of an ingested row: its `key` as one string, then the contract's kept columns."""
    return pa.schema([("key", pa.string()), *((column.name, column.arrow_type) for column in contract.kept)])


def read_rows(
    stream: BinaryIO, contract: Contract, file: str, layout: Layout = AS_USUAL, span: tuple[int, int] | None = None
) -> Iterator[Checked]:
    """Stream one CSV file as checked blocks, in the order of the file.

    Args:
        stream: the file's bytes; unpacked here where `file` ends in `.gz`.
        file: its name, for rejects and errors.
        layout: how it is written.
        span: only the rows that begin in these bytes, [start, end), of a file that can be split; they are numbered from 1.

    Raises:
        ContractError: the header lacks a column of the contract, or the file is no CSV.
    """
    with _told(file):
        names, pieces = csv_records.open_file(stream, file, layout, BLOCK_BYTES, span)
        if names is None:
            return
        columns = _places(names, contract, file)
        before = 0
        for block in csv_records.blocks(pieces, layout, MAX_ROW_BYTES):
            checked = _checked(block, len(names), columns, contract, file, before)
            before += checked.read
            yield checked


def duplicate_rejects(
    stream: BinaryIO, contract: Contract, file: str, layout: Layout, span: tuple[int, int] | None, duplicates: pa.Table
) -> Iterator[pa.RecordBatch]:
    """Rejects, as `REJECTS`, of rows whose key an earlier row of the month has; their lines are cut from the file once more.

    Args:
        stream, contract, file, layout, span: as for `read_rows`.
        duplicates: `row`, the number that `read_rows` gave, ascending, and `key`.
    """
    rows, name = duplicates["row"].to_numpy(), ", ".join(column.name for column in contract.key)
    with _told(file):
        _, pieces = csv_records.open_file(stream, file, layout, BLOCK_BYTES, span)
        before = 0
        for block in csv_records.blocks(pieces, layout, MAX_ROW_BYTES):
            starts, ends = block.bounds
            first, last = np.searchsorted(rows, (before, before + len(starts)), "right").tolist()
            lines = [csv_records.shown(block.data[starts[record] : ends[record]], _LINE_BYTES) for record in rows[first:last] - before - 1]
            if lines:
                own = duplicates.slice(first, last - first).combine_chunks()
                same = [pa.repeat(text, len(lines)) for text in (file, name, DUPLICATE_KEY)]
                columns = [same[0], own["row"].combine_chunks(), *same[1:], own["key"].combine_chunks(), pa.array(lines)]
                yield pa.RecordBatch.from_arrays(columns, schema=REJECTS)
            if last == len(rows):
                return
            before += len(starts)


@contextlib.contextmanager
def _told(file: str) -> Iterator[None]:
    """What ends a file early is told with its name."""
    try:
        yield
    except _BAD_FILE as error:
        raise ContractError(f"{file} cannot be read as CSV: {error}; deliver the file again") from None


def _places(names: list[str], contract: Contract, file: str) -> dict[str, int]:
    """Where in a record each kept column stands, by its name."""
    for column in contract.kept:
        if names.count(column.name) > 1:
            raise ContractError(f"{file} has the column {column.name!r} {names.count(column.name)} times; keep one of them in the export")
        if column.name not in names:
            spellings = {re.sub(r"[\W_]+", "", name).lower(): name for name in names}
            near = difflib.get_close_matches(re.sub(r"[\W_]+", "", column.name).lower(), spellings, 1, 0.7)
            there = ", ".join(map(repr, names[:50]))[:1000]
            raise ContractError(
                f"{file} lacks a column of the contract: {column.name!r}; its header is {there}"
                + (f", did you mean {spellings[near[0]]!r}?" if near else "")
                + "; add it to the export or drop it from the contract, which is that of the sample months unless --contract names another"
            )
    return {column.name: names.index(column.name) for column in contract.kept}


def _checked(block: Block, width: int, columns: dict[str, int], contract: Contract, file: str, before: int) -> Checked:
    """Parse a block's records and turn the bad ones away.

    Args:
        width: fields of a record.
        columns: of which these are kept, each at its place.
        before: records of the file before the block's.
    """
    wrong_count: list[int] = []

    def skip(row: csv.InvalidRow) -> str:
        wrong_count.append(row.number - 1)
        return "skip"

    _turn_away_bad_texts(block, width)
    data = block.clean() or b"\n"
    places = [str(place) for place in columns.values()]
    table = csv.read_csv(
        pa.BufferReader(pa.py_buffer(data)),
        # One chunk, which holds whole records: where it ends need not be looked for again.
        csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=[str(place) for place in range(width)]),
        csv.ParseOptions(newlines_in_values=False, invalid_row_handler=skip),
        csv.ConvertOptions(
            include_columns=places, column_types=dict.fromkeys(places, pa.binary()), null_values=[""], strings_can_be_null=True
        ),
    ).combine_chunks()
    values = {name: _one_chunk(table[place]) for name, place in zip(columns, places, strict=True)}
    rows, rejecter = check(values, contract)
    records = len(rows) + len(wrong_count) + len(block.faults)
    if not (rejecter.found or wrong_count or block.faults):
        return Checked(rows, before + np.arange(1, records + 1), pa.RecordBatch.from_pylist([], REJECTS))
    starts, ends = block.bounds
    assert len(starts) == records, f"{file}: {len(starts)} records were cut and {records} were read, after record {before}"
    # Which of the records each parsed row is: those that are left when the others are struck out.
    parsed = np.ones(records, bool)
    faulty = np.searchsorted(starts, [fault.start for fault in block.faults])
    parsed[faulty] = False
    miscounted = np.flatnonzero(parsed)[wrong_count]
    parsed[miscounted] = False
    of_row = np.flatnonzero(parsed)
    # (record, column, reason, value); a record that is turned away whole shows its line as its value.
    found: list[tuple[int, str, str, bytes | None]] = [
        (int(of_row[row]), column, reason, values[column][row].as_py())
        for rows_, column, reason in rejecter.found
        for row in rows_.tolist()
    ]
    whole = dict.fromkeys(miscounted.tolist(), FIELD_COUNT)
    whole |= {record: fault.reason for record, fault in zip(faulty.tolist(), block.faults, strict=True)}
    found += [(record, "", reason, block.data[starts[record] : ends[record]][:_LINE_BYTES]) for record, reason in whole.items()]
    found.sort(key=lambda reject: reject[0])
    rejects = {
        "file": [file] * len(found),
        "row": [before + 1 + record for record, *_ in found],
        "column": [column for _, column, _, _ in found],
        "reason": [reason for _, _, reason, _ in found],
        "value": [None if value is None else csv_records.shown(value, _VALUE_BYTES) for *_, value in found],
        "line": [csv_records.shown(block.data[starts[record] : ends[record]], _LINE_BYTES) for record, *_ in found],
    }
    good = ~rejecter.rejected
    numbers = before + 1 + of_row[good]
    return Checked(rows.filter(pa.array(good)) if rejecter.found else rows, numbers, pa.RecordBatch.from_pydict(rejects, REJECTS))


def _turn_away_bad_texts(block: Block, width: int) -> None:
    """Turn away the records that are no UTF-8 and have another number of fields too: Arrow cannot tell of these, and gives up."""
    if block.data.isascii() or _casts(_texts(block, np.array([0, block.end])), pa.string()):
        return
    starts, ends = block.bounds
    known = {fault.start for fault in block.faults}
    for record in np.flatnonzero(_unfit(_texts(block, np.append(starts, block.end)), pa.string())):
        start, end = int(starts[record]), int(ends[record])
        if start not in known and csv_records.field_count(block.data[start:end]) != width:
            block.faults.append(Fault(start, end, FIELD_COUNT))
    block.faults.sort(key=lambda fault: fault.start)


def _texts(block: Block, edges: np.ndarray) -> pa.Array:
    """A block's bytes from each edge to the next."""
    return pa.Array.from_buffers(pa.binary(), len(edges) - 1, [None, pa.py_buffer(edges.astype(np.int32)), pa.py_buffer(block.data)])


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def check(values: dict[str, pa.Array], contract: Contract) -> tuple[pa.RecordBatch, "Rejecter"]:
    """Type the kept columns of one block, binary by name: all rows typed, and which of them are turned away."""
    rejecter = Rejecter(len(next(iter(values.values()))))
    typed = {column.name: _typed(column, values[column.name], rejecter) for column in contract.kept}
    for column in contract.kept:
        _check_domain(column, typed[column.name], rejecter)
    if contract.clicked:
        name = contract.clicked.name
        rejecter.reject(pc.or_(pc.less(typed[name], 0), pc.greater(typed[name], 1)), name, OUT_OF_DOMAIN)
    if contract.clicks and contract.impressions:
        clicks, impressions = typed[contract.clicks.name], typed[contract.impressions.name]
        for outcome in (contract.clicks, contract.impressions):
            rejecter.reject(pc.less(typed[outcome.name], 0), outcome.name, OUT_OF_DOMAIN)
        rejecter.reject(pc.greater(clicks, impressions), contract.clicks.name, CLICKS_OVER_IMPRESSIONS)
    if contract.image:
        rejecter.reject(_outside(typed[contract.image.name]), contract.image.name, IMAGE_OUTSIDE_MONTH)
    key = key_of([typed[column.name] for column in contract.key])
    rejecter.reject(pc.greater(pc.binary_length(key), MAX_KEY_BYTES), contract.key[0].name, KEY_TOO_LONG)
    return pa.RecordBatch.from_arrays([key, *typed.values()], schema=row_schema(contract)), rejecter


def _outside(images: pa.Array) -> pa.Array:
    """Whether each name leaves the month's images folder, as it stands or unescaped."""
    offsets, data = _bytes_of(images)
    odd = (data < 0x20) | (data == 0x7F)
    for byte in rb"/\:%":
        odd |= data == byte
    odd[1:] |= (data[1:] == ord(".")) & (data[:-1] == ord("."))
    # Most names have none of these, and a search for each would take as long as reading it.
    rows = _rows_with(odd, offsets)
    names = images.take(pa.array(rows))
    outside = pc.match_substring_regex(names, _OUTSIDE)
    for pattern, meant in _ESCAPED:
        names = pc.replace_substring_regex(names, pattern, meant)
    found = np.zeros(len(images), bool)
    found[rows] = pc.or_(outside, pc.match_substring_regex(names, _OUTSIDE)).fill_null(False).to_numpy(zero_copy_only=False)
    return pa.array(found)


def _bytes_of(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of texts one after the other, and where each starts in them, and the last ends."""
    _, offsets, data = values.buffers()
    if not len(values) or data is None:
        return np.zeros(len(values) + 1, np.int32), np.empty(0, np.uint8)
    places = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return places - places[0], np.frombuffer(data, np.uint8)[places[0] : places[-1]]


def _rows_with(odd: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The rows that hold an odd byte."""
    return np.unique(np.searchsorted(offsets, np.flatnonzero(odd), side="right") - 1)


def key_of(columns: list[pa.Array]) -> pa.Array:
    """The key as one string: the column itself, or all joined by `|`, with `\\` and `|` escaped in each."""
    texts = [column.cast(pa.string()) for column in columns]
    if len(texts) == 1:
        return texts[0]
    escaped = [pc.replace_substring(pc.replace_substring(text, "\\", "\\\\"), "|", "\\|") for text in texts]
    return pc.binary_join_element_wise(*escaped, "|")


class Rejecter:
    """Collects the first reason against each row of a block.

    Attributes:
        rejected: whether each row is turned away, shape (rows,).
        found: (rows, column, reason), each row once.
    """

    def __init__(self, rows: int):
        self.rejected = np.zeros(rows, bool)
        self.found: list[tuple[np.ndarray, str, str]] = []

    def reject(self, mask: pa.Array, column: str, reason: str) -> None:
        """Turn away the rows where `mask` is true (null is not), unless they are already."""
        if not pc.any(mask).as_py():
            return
        fresh = pc.fill_null(mask, False).to_numpy(zero_copy_only=False) & ~self.rejected
        if fresh.any():
            self.rejected |= fresh
            self.found.append((np.flatnonzero(fresh), column, reason))


def _typed(column: Column, values: pa.Array, rejecter: Rejecter) -> pa.Array:
    """The column in its own type; a value that is not of it is null and rejects its row."""
    if column.required:
        rejecter.reject(values.is_null(), column.name, MISSING_REQUIRED)
    text = _cast(values, pa.string(), column.name, BAD_ENCODING, rejecter)
    return text if column.kind == "bytes" else _cast(text, column.arrow_type, column.name, UNPARSABLE, rejecter)


def _cast(values: pa.Array, kind: pa.DataType, column: str, reason: str, rejecter: Rejecter) -> pa.Array:
    """The values as `kind`; those that are not of it are null and reject their rows."""
    try:
        return cast(values, kind)
    except pa.ArrowInvalid:
        bad = _unfit(values, kind)
        rejecter.reject(pa.array(bad), column, reason)
        return pc.if_else(pa.array(bad), None, values).cast(kind)


def cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values as `kind`; ArrowInvalid where one is not of it, and 0x10, which Arrow would take for an integer, is none."""
    if kind == pa.int64() and _bytes_of(values)[1].max(initial=0) > ord("9"):
        raise pa.ArrowInvalid("a byte that no decimal integer has")
    return values.cast(kind)


def _unfit(values: pa.Array, kind: pa.DataType) -> np.ndarray:
    """Whether each value does not cast. It is the cast's word, as for all of them at once: it never depends on the rows beside it."""
    offsets, data = _bytes_of(values)
    # Most rows are surely good: text in ASCII, and digits.
    rows = _rows_with(data >= 0x80 if kind == pa.string() else (data < ord("0")) | (data > ord("9")), offsets)
    if kind == pa.int64():
        rows = np.union1d(rows, np.flatnonzero(np.diff(offsets) > _SURE_DIGITS))
    doubtful = values.take(pa.array(rows))
    if kind == pa.string():
        casts = [_is_utf8(value) for value in doubtful.to_pylist()]
    else:
        surely = pc.match_substring_regex(doubtful, _INTEGER if kind == pa.int64() else _NUMBER)
        # What was no text is null by now.
        casts = pc.fill_null(surely, True).to_numpy(zero_copy_only=False).copy()
        for row in np.flatnonzero(~casts).tolist():
            casts[row] = _casts(doubtful.slice(row, 1), kind)
    bad = np.zeros(len(values), bool)
    bad[rows] = ~np.array(casts, bool)
    return bad


def _casts(values: pa.Array, kind: pa.DataType) -> bool:
    try:
        cast(values, kind)
    except pa.ArrowInvalid:
        return False
    return True


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_domain(column: Column, values: pa.Array, rejecter: Rejecter) -> None:
    if column.minimum is not None:
        rejecter.reject(pc.less(values, column.minimum), column.name, OUT_OF_DOMAIN)
    if column.maximum is not None:
        rejecter.reject(pc.greater(values, column.maximum), column.name, OUT_OF_DOMAIN)
    if column.kind == "float":
        rejecter.reject(pc.invert(pc.is_finite(values)), column.name, OUT_OF_DOMAIN)
