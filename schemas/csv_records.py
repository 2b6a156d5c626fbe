"""Where the records of a CSV file lie: blocks of whole records, cut so that a broken record costs itself and no other.

The dialect is RFC 4180 in UTF-8 (another encoding is transcoded first), with `,` and `"`. Beyond it:

- A record ends at LF, CR LF or CR; lines without a byte are no records. A byte-order mark before the header is dropped.
- A quote inside an unquoted field is a character like others (`19" monitor`), in records of one line.
- A record whose quotes do not pair (text after a closing quote, a quote that nothing closes within `max_row_bytes`) is turned away up to
  the end of its first line, and reading goes on with the next line: a stray quote never takes other rows with it.
- With `newlines_in_values` off every line is a record, so that a file can be read from the middle.

Only boundaries are found here, by whole columns of quotes; the fields are parsed by Arrow, which reads what is let through in the same way.
"""

import codecs
import csv
import dataclasses
import functools
import gzip
import itertools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

MAX_ROW_BYTES = 1 << 20
# Reasons to turn a record away before its fields are looked at.
UNCLOSED_QUOTE = "unclosed_quote"
STRAY_QUOTE = "stray_quote"
ROW_TOO_LONG = "row_too_long"

_UTF8 = ("utf-8", "ascii")
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(b"\xed[\xb0-\xb3][\x80-\xbf]")
# Codecs in which a byte of a line end is never a part of another character, and the characters before it do not matter.
_SPLITTABLE = ("utf-8", "ascii", "iso8859-", "cp125")
# The fields of a line: a quoted one must end at a comma or with the line, an unquoted one may hold quotes.
_QUOTED = rb'"[^"]*+(?:""[^"]*+)*+"'
_FIELD = rb"(?:" + _QUOTED + rb'(?=,|\Z)|(?!")[^,]*+)'
_FIELD_BEFORE = re.compile(_FIELD + rb",")
_LINE = re.compile(rb"(" + _FIELD + rb",)*+(?:" + _FIELD + rb"\Z)?")
_QUOTED_FIELD = re.compile(_QUOTED)
_HEADER = re.compile(rb'(?:\xef\xbb\xbf)?+[\r\n]*+((?:"[^"]*+"|[^"\r\n]++)++)[\r\n]')
_HEADER_LINE = re.compile(rb"(?:\xef\xbb\xbf)?+[\r\n]*+([^\r\n]++)[\r\n]")


class HeaderError(ValueError):
    """A file whose first record is no header, or which is in another encoding as a whole."""


def is_packed(file: str) -> bool:
    """Whether a file is gzip's, by its name."""
    return file.lower().endswith(".gz")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files are written.

    Attributes:
        newlines_in_values: whether a quoted value may hold a line end.
        encoding: the name of a Python codec.
    """

    newlines_in_values: bool = True
    encoding: str = "utf-8"

    @functools.cached_property
    def codec(self) -> str:
        """The encoding's own name; a byte-order mark is dropped in any case."""
        return codecs.lookup(self.encoding).name.removesuffix("-sig")

    def can_split(self, file: str) -> bool:
        """Whether a file can be read from its middle."""
        return not self.newlines_in_values and self.codec.startswith(_SPLITTABLE) and not is_packed(file)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A record that is turned away: where its bytes lie in the block, and why."""

    start: int
    end: int
    reason: str


@dataclasses.dataclass(eq=False)
class Block:
    """Whole records of a file, one after the other.

    Attributes:
        data: bytes, of which the first `end` are the block's.
        faults: those of its records that are turned away, in their order.
        unpaired: (start, end) of lines whose quotes do not pair, turned away or not.
        quotes: where quotes are in `data`.
    """

    data: bytes
    end: int
    faults: list[Fault]
    unpaired: list[tuple[int, int]]
    quotes: np.ndarray

    def clean(self) -> memoryview | bytes:
        """The records that are not turned away; lines without a byte may stand between them."""
        whole = memoryview(self.data)[: self.end]
        if not self.faults:
            # Arrow drops a byte-order mark at the start of whatever it is given.
            return b"\n" + whole if whole[:3] == _BOM else whole
        edges = [0, *(edge for fault in self.faults for edge in (fault.start, fault.end)), self.end]
        return b"\n".join([b"", *(whole[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)), b""])

    @functools.cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each record starts and ends, those that are turned away too, shape (records,)."""
        data = np.frombuffer(self.data, np.uint8, self.end)
        ends = np.flatnonzero((data == ord("\n")) | (data == ord("\r")) if b"\r" in self.data else data == ord("\n"))
        paired = np.ones(len(self.quotes), bool)
        for start, stop in self.unpaired:
            paired[slice(*np.searchsorted(self.quotes, (start, stop)))] = False
        if paired.any():
            ends = ends[np.searchsorted(self.quotes[paired], ends) & 1 == 0]
        if self.data[self.end - 1] not in b"\r\n":
            ends = np.append(ends, self.end)
        starts = np.append(0, ends[:-1] + 1)
        there = ends > starts
        return (starts, ends) if there.all() else (starts[there], ends[there])


def _surrogates(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("adstocrat-surrogate", _surrogates)


def shown(value: bytes, limit: int) -> str:
    """The first bytes of a value as text, with those that are no text as `\\xff`, as they stand in the file."""
    restored = _SURROGATE.sub(lambda found: b"\\x%02x" % (ord(found[0].decode("utf-8", "surrogatepass")) & 0xFF), value[:limit])
    return restored.decode(errors="backslashreplace")


def open_file(
    stream: BinaryIO, file: str, layout: Layout, size: int, span: tuple[int, int] | None = None
) -> tuple[list[str] | None, Iterator[bytes]]:
    """The names of a file's header, None where it has none, and what follows, in UTF-8 and in pieces of about `size` bytes.

    Args:
        span: only the lines that begin in these bytes of the file, [start, end); the file is one that can be split.

    Raises:
        HeaderError: it does not end, or cannot be one.
    """
    pieces = _as_utf8(_pieces(stream, file, size), layout)
    names, header, beyond = _take_header(pieces, layout)
    if span is None or names is None:
        return names, itertools.chain([beyond], pieces)
    # In a file that can be split, a character is a byte unless it is UTF-8.
    first = len(header) if layout.codec in _UTF8 else len(header.decode("utf-8", "surrogatepass"))
    start, end = max(span[0], first), span[1]
    return names, _as_utf8(_lines(stream, start, end, start == first, size) if start < end else iter(()), layout)


def _pieces(stream: BinaryIO, file: str, size: int) -> Iterator[bytes]:
    source: Any = gzip.GzipFile(fileobj=stream) if is_packed(file) else stream
    return iter(functools.partial(source.read, size), b"")


def _as_utf8(pieces: Iterator[bytes], layout: Layout) -> Iterator[bytes]:
    """The same text in UTF-8. Bytes that the encoding does not know become surrogates, which are no UTF-8: they cost their row later."""
    if layout.codec in _UTF8:
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder(layout.codec)("adstocrat-surrogate")
    for piece in itertools.chain(pieces, (b"",)):
        try:
            text = decoder.decode(piece, not piece)
        except UnicodeError as error:
            # Such as a file in UTF-16 that does not tell its byte order.
            raise HeaderError(f"it is not in {layout.encoding} ({error}), see csv_encoding") from None
        # A piece may end before its first character does.
        if text:
            yield text.encode("utf-8", "surrogatepass")


def _take_header(pieces: Iterator[bytes], layout: Layout) -> tuple[list[str] | None, bytes, bytes]:
    """The names in the first record; the bytes up to its end; and those taken beyond it."""
    data, pattern, found = b"", _HEADER if layout.newlines_in_values else _HEADER_LINE, None
    while found is None and len(data) <= MAX_ROW_BYTES and (piece := next(pieces, b"")):
        data += piece
        found = pattern.match(data)
    if found is None and len(data) <= MAX_ROW_BYTES:
        # The file ends with its header.
        data += b"\n"
        found = pattern.match(data)
    found = found or _HEADER_LINE.match(data)
    if found is None and not data.strip(_BOM + b"\r\n"):
        return None, data, b""
    if found is None or len(found[1]) > MAX_ROW_BYTES:
        raise HeaderError(f"its header does not end within {MAX_ROW_BYTES:,} bytes")
    try:
        names = next(csv.reader([found[1].decode(errors="backslashreplace")], strict=True))
    except csv.Error as error:
        raise HeaderError(f"its header is none ({error})") from None
    return names, data[: found.end()], data[found.end() :]


def _lines(stream: BinaryIO, start: int, end: int, begins: bool, size: int) -> Iterator[bytes]:
    """The lines whose first byte lies in [start, end), whole, in pieces of about `size`.

    Args:
        begins: whether a line begins at `start`; otherwise that depends on the byte before it.
    """
    at = start if begins else start - 1
    stream.seek(at)
    while piece := stream.read(size):
        if not begins:
            first = line_end(piece, 0, len(piece))
            begins = first >= 0
            dropped = first + 1 if begins else len(piece)
            piece, at = piece[dropped:], at + dropped
            if at >= end:
                return
            if not piece:
                continue
        # The last line is the one with the byte at end - 1, and ends there or later.
        if at + len(piece) >= end and (last := line_end(piece, max(0, end - 1 - at), len(piece))) >= 0:
            yield piece[: last + 1]
            return
        yield piece
        at += len(piece)


def blocks(pieces: Iterator[bytes], layout: Layout, max_row_bytes: int) -> Iterator[Block]:
    """Cut a file's bytes, the header apart, into blocks; holds a piece and a record at a time."""
    held, skipping, ended = b"", False, False
    while not ended:
        taken, size = [held], 0
        for piece in pieces:
            taken.append(piece)
            size += len(piece)
            # At least twice what was held, so that a long record is not looked at over and over.
            if size >= len(held):
                break
        else:
            ended = True
        data = b"".join(taken)
        if skipping:
            end = line_end(data, 0, len(data))
            skipping, data = end < 0, data[end + 1 :] if end >= 0 else b""
        if ended and data and data[-1] not in b"\r\n":
            data += b"\n"
        block = _cut(data, ended, layout, max_row_bytes)
        held = data[block.end :]
        if block.end:
            # A line that is too long goes on in the next piece.
            skipping = skipping or (bool(block.faults) and block.faults[-1].end == len(data))
            yield block


def _cut(data: bytes, ended: bool, layout: Layout, max_row_bytes: int) -> Block:
    """The records that are whole in `data`, which starts with one; `ended` if nothing follows, and it ends with a line end then."""
    quotes = _Quotes(data, layout)
    faults: list[Fault] = []
    unpaired: list[tuple[int, int]] = []
    at = 0
    while at < len(data):
        limit = min(len(data), at + max_row_bytes + 1)
        wrong = quotes.next_wrong(at)
        last = quotes.last_end(at, min(limit, wrong))
        if last >= 0:
            at = last + 1
            continue
        # The record here has a quote that does not pair, or is too long, or is not all there.
        end = line_end(data, at, limit)
        partial = limit - at <= max_row_bytes and not ended
        if partial and (end < 0 or wrong >= limit):
            break
        if end < 0:
            end = line_end(data, limit, len(data))
            faults.append(Fault(at, end if end >= 0 else len(data), ROW_TOO_LONG))
        elif (read := _line_read(data, at, end)) < end:
            faults.append(Fault(at, end, STRAY_QUOTE if _QUOTED_FIELD.match(data, read, end) else UNCLOSED_QUOTE))
        unpaired.append((at, end if end >= 0 else len(data)))
        at = unpaired[-1][1] + (end >= 0)
    return Block(data, at, faults, unpaired, quotes.at)


def _line_read(data: bytes, start: int, end: int) -> int:
    """How far a line is fields, when a quote inside an unquoted one is a character like others: to its end, or to the bad field's start."""
    found = _LINE.match(data, start, end)
    assert found is not None
    return found.end()


def field_count(record: bytes) -> int:
    """How many fields a record has that was not turned away."""
    count, at = 1, 0
    while found := _FIELD_BEFORE.match(record, at):
        count, at = count + 1, found.end()
    return count


def line_end(data: bytes, start: int, stop: int) -> int:
    """The first line end in [start, stop), -1 where there is none."""
    lf = data.find(b"\n", start, stop)
    cr = data.find(b"\r", start, stop if lf < 0 else lf)
    return cr if cr >= 0 else lf


def _beside(byte: np.ndarray) -> np.ndarray:
    """Whether a byte may stand beside a quote that opens or closes a field: two quotes in a quoted field close it and open it again."""
    return (byte == ord(",")) | (byte == ord('"')) | (byte == ord("\n")) | (byte == ord("\r"))


class _Quotes:
    """The quotes of some bytes, and which of them cannot be what they would be if all before them paired.

    Quotes pair from any record's start on: the first one opens a field, the second closes it, and so on. Whether a quote opens or closes
    then depends on nothing but whether an even or odd number of quotes comes before it, so both cases are worked out for all at once.
    """

    def __init__(self, data: bytes, layout: Layout):
        self._data, self._layout, self._cr = data, layout, b"\r" in data
        self._array = np.frombuffer(data, np.uint8)
        self.at = np.flatnonzero(self._array == ord('"')) if b'"' in data else np.empty(0, np.int64)
        # By whether the first quote that opens is an even or an odd one of all; seldom are both needed.
        self._wrong: list[np.ndarray | None] = [None, None]

    def _find_wrong(self, first: int) -> np.ndarray:
        """Which quotes do not pair when the one numbered `first`, 0 or 1, and every second one after it open a field."""
        opens, closes = self.at[first::2], self.at[1 - first :: 2]
        # Before the first byte a record begins; what follows the last one is not known yet.
        bad_opens = ~_beside(self._array[opens - 1]) & (opens > 0)
        bad_closes = ~_beside(self._array[np.minimum(closes + 1, len(self._array) - 1)])
        if not self._layout.newlines_in_values:
            ends = np.flatnonzero((self._array == ord("\n")) | (self._array == ord("\r")))
            before = opens[: len(closes)] if first == 0 else np.append(closes[:1], opens)[: len(closes)]
            bad_closes |= np.searchsorted(ends, before) != np.searchsorted(ends, closes)
        return np.sort(np.append(2 * np.flatnonzero(bad_opens) + first, 2 * np.flatnonzero(bad_closes) + 1 - first))

    def next_wrong(self, record: int) -> int:
        """Where the first quote is, from the start of a record on, that does not pair; the end of the data where all do."""
        if not len(self.at):
            return len(self._data)
        first = int(np.searchsorted(self.at, record))
        wrong = self._wrong[first & 1]
        if wrong is None:
            wrong = self._wrong[first & 1] = self._find_wrong(first & 1)
        index = np.searchsorted(wrong, first)
        return int(self.at[wrong[index]]) if index < len(wrong) else len(self._data)

    def last_end(self, record: int, stop: int) -> int:
        """The last line end outside quotes in [record, stop), -1 where there is none; all quotes there pair, or the last one opens."""
        first = np.searchsorted(self.at, record)
        while True:
            end = self._data.rfind(b"\n", record, stop)
            if self._cr:
                end = max(end, self._data.rfind(b"\r", max(record, end), stop))
            inside = np.searchsorted(self.at, end) - first if end >= 0 else 0
            if inside % 2 == 0:
                return end
            stop = int(self.at[first + inside - 1])
