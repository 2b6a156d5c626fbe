"""From the bytes of a CSV file to checked, typed rows: columnar throughout, and a bad row costs one row.

Columns are read as bytes and cast here under masks, because a reader that casts by itself loses the whole file to one bad value.
"""

import dataclasses
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from schemas.contract import Column, Contract, ContractError

BLOCK_BYTES = 8 << 20
MAX_KEY_BYTES = 500

# The closed list of reasons to reject a row; the first that holds is the one that counts.
FIELD_COUNT = "field_count"
BAD_ENCODING = "bad_encoding"
UNPARSABLE = "unparsable"
MISSING_REQUIRED = "missing_required"
OUT_OF_DOMAIN = "out_of_domain"
CLICKS_OVER_IMPRESSIONS = "clicks_over_impressions"
KEY_TOO_LONG = "key_too_long"
IMAGE_OUTSIDE_MONTH = "image_outside_month"

REJECTS = pa.schema([("file", pa.string()), ("row", pa.int64()), ("column", pa.string()), ("reason", pa.string()), ("value", pa.string())])
# What the casts surely take; in a block with a bad value, the others are tried one by one.
_INTEGER = r"^-?[0-9]{1,18}$"
_NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?$"
_BAD_FILE = (pa.ArrowInvalid, EOFError, gzip.BadGzipFile, zlib.error)
# A name that leaves the month's images folder: a parent folder, an absolute path, or a URI.
_OUTSIDE = r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|://|^[A-Za-z]:"


@dataclasses.dataclass(frozen=True)
class Checked:
    """Rows of one block of a file.

    Attributes:
        rows: `key` and the contract's kept columns, typed.
        rejects: what was turned away, as `REJECTS`.
    """

    rows: pa.RecordBatch
    rejects: pa.RecordBatch

    @property
    def read(self) -> int:
        return self.rows.num_rows + self.rejects.num_rows


def row_schema(contract: Contract) -> pa.Schema:
    """Columns of an ingested row: its `key` as one string, then the contract's kept columns."""
    return pa.schema([("key", pa.string()), *((column.name, column.arrow_type) for column in contract.kept)])


def read_rows(stream: BinaryIO, contract: Contract, file: str) -> Iterator[Checked]:
    """Stream one CSV file as checked blocks, in the order of the file.

    Args:
        stream: the file's bytes; unpacked here where `file` ends in `.gz`.
        file: its name, for rejects and errors.

    Raises:
        ContractError: the header lacks a column of the contract.
    """
    plain: Any = _Unsplit(gzip.GzipFile(fileobj=stream) if file.endswith(".gz") else stream)
    wrong_count: list[tuple[int, str]] = []

    def skip(row: csv.InvalidRow) -> str:
        wrong_count.append((row.number - 2, row.text))
        return "skip"

    try:
        reader = csv.open_csv(
            plain,
            read_options=csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=csv.ConvertOptions(
                include_columns=[column.name for column in contract.kept],
                column_types={column.name: pa.binary() for column in contract.kept},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except _BAD_FILE as error:
        if "Empty CSV file" in str(error):
            return
        raise ContractError(f"{file} cannot be read as CSV: {error}") from None
    except pa.ArrowKeyError as error:
        raise ContractError(f"{file} lacks a column of the contract: {error}; add it to the export or drop it from the contract") from None
    parsed, reported = 0, 0
    for batch in _told(reader, file):
        # A row that the parser skipped has a number all the same: shift the numbers of those behind it.
        skipped = np.array([number for number, _ in wrong_count], np.int64)
        index = np.arange(parsed, parsed + batch.num_rows)
        numbers = index + 1 + np.searchsorted(skipped - np.arange(len(skipped)), index, side="right")
        yield check(batch, contract, file, numbers, wrong_count[reported:])
        parsed, reported = parsed + batch.num_rows, len(wrong_count)
    if reported < len(wrong_count):
        empty = pa.RecordBatch.from_pylist([], pa.schema([(column.name, pa.binary()) for column in contract.kept]))
        yield check(empty, contract, file, np.empty(0, np.int64), wrong_count[reported:])


class _Unsplit(io.RawIOBase):
    """A stream whose pieces never end between CR and LF: Arrow drops such an LF, even inside quotes."""

    def __init__(self, stream: Any):
        self._stream, self._held = stream, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._held + self._stream.read(size - len(self._held))
        self._held = b"\r" if len(data) > 1 and data.endswith(b"\r") else b""
        return data[: len(data) - len(self._held)]


def _told(reader: csv.CSVStreamingReader, file: str) -> Iterator[pa.RecordBatch]:
    """The reader's batches; what ends them early is told with the file's name."""
    try:
        yield from reader
    except _BAD_FILE as error:
        raise ContractError(f"{file} cannot be read as CSV: {error}") from None


def check(batch: pa.RecordBatch, contract: Contract, file: str, numbers: np.ndarray, wrong_count: list[tuple[int, str]]) -> Checked:
    """Type one block and turn bad rows away.

    Args:
        batch: the kept columns as binary.
        numbers: data row number in the file of each row, from 1, shape (rows,).
        wrong_count: (index from 0, text) of rows that had too few or too many fields.
    """
    rejecter = _Rejecter(batch.num_rows)
    typed = {column.name: _typed(column, batch[column.name], rejecter) for column in contract.kept}
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
        rejecter.reject(pc.match_substring_regex(typed[contract.image.name], _OUTSIDE), contract.image.name, IMAGE_OUTSIDE_MONTH)
    key = key_of([typed[column.name] for column in contract.key])
    rejecter.reject(pc.greater(pc.binary_length(key), MAX_KEY_BYTES), contract.key[0].name, KEY_TOO_LONG)
    rows = pa.RecordBatch.from_arrays([key, *typed.values()], schema=row_schema(contract))
    return Checked(rows if rejecter.none else rows.filter(pa.array(~rejecter.rejected)), rejecter.table(batch, file, numbers, wrong_count))


def key_of(columns: list[pa.Array]) -> pa.Array:
    """The key as one string: the column itself, or all joined by `|`, with `\\` and `|` escaped in each."""
    texts = [column.cast(pa.string()) for column in columns]
    if len(texts) == 1:
        return texts[0]
    escaped = [pc.replace_substring(pc.replace_substring(text, "\\", "\\\\"), "|", "\\|") for text in texts]
    return pc.binary_join_element_wise(*escaped, "|")


class _Rejecter:
    """Collects the first reason against each row of a block."""

    def __init__(self, rows: int):
        self.rejected = np.zeros(rows, bool)
        self._found: list[tuple[np.ndarray, str, str]] = []

    @property
    def none(self) -> bool:
        return not self._found

    def reject(self, mask: pa.Array, column: str, reason: str) -> None:
        """Turn away the rows where `mask` is true (null is not), unless they are already."""
        if not pc.any(mask).as_py():
            return
        fresh = pc.fill_null(mask, False).to_numpy(zero_copy_only=False) & ~self.rejected
        if fresh.any():
            self.rejected |= fresh
            self._found.append((np.flatnonzero(fresh), column, reason))

    def table(self, batch: pa.RecordBatch, file: str, numbers: np.ndarray, wrong_count: list[tuple[int, str]]) -> pa.RecordBatch:
        found: list[dict[str, Any]] = [
            {"file": file, "row": int(numbers[row]), "column": column, "reason": reason, "value": _shown(batch[column][row].as_py())}
            for rows, column, reason in self._found
            for row in rows.tolist()
        ]
        found += [
            {"file": file, "row": index + 1, "column": "", "reason": FIELD_COUNT, "value": text[:1000]} for index, text in wrong_count
        ]
        return pa.RecordBatch.from_pylist(sorted(found, key=lambda reject: reject["row"]), REJECTS)


def _shown(value: bytes | None) -> str | None:
    return None if value is None else value[:1000].decode(errors="backslashreplace")


def _typed(column: Column, values: pa.Array, rejecter: _Rejecter) -> pa.Array:
    """The column in its own type; a value that is not of it is null and rejects its row."""
    if column.required:
        rejecter.reject(values.is_null(), column.name, MISSING_REQUIRED)
    try:
        text = values.cast(pa.string())
    except pa.ArrowInvalid:
        good = pa.array([value is None or _is_utf8(value) for value in values.to_pylist()])
        rejecter.reject(pc.invert(good), column.name, BAD_ENCODING)
        text = pc.if_else(good, values, None).cast(pa.string())
    if column.kind == "bytes":
        return text
    try:
        return text.cast(column.arrow_type)
    except pa.ArrowInvalid:
        # Whether a value is of the type is the cast's word, as above, so that it never depends on the rows beside it.
        surely = pc.match_substring_regex(text, _INTEGER if column.kind == "int" else _NUMBER)
        known = pc.fill_null(surely, True).to_numpy(zero_copy_only=False).copy()
        for row in np.flatnonzero(~known).tolist():
            known[row] = _casts(text[row], column.arrow_type)
        good = pa.array(known)
        rejecter.reject(pc.invert(good), column.name, UNPARSABLE)
        return pc.if_else(good, text, None).cast(column.arrow_type)


def _casts(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_domain(column: Column, values: pa.Array, rejecter: _Rejecter) -> None:
    if column.minimum is not None:
        rejecter.reject(pc.less(values, column.minimum), column.name, OUT_OF_DOMAIN)
    if column.maximum is not None:
        rejecter.reject(pc.greater(values, column.maximum), column.name, OUT_OF_DOMAIN)
    if column.kind == "float":
        rejecter.reject(pc.invert(pc.is_finite(values)), column.name, OUT_OF_DOMAIN)
