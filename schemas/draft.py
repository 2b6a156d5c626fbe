"""Drafts a contract from CSV files, for a person to look through."""

import logging
import zlib
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from schemas import csv_records, rows
from schemas.contract import OUTCOMES, Column, Contract, ContractError
from schemas.csv_records import Layout

log = logging.getLogger("adstocrat")


def infer(files: Sequence[str], roles: dict[str, Sequence[str]], layout: Layout = rows.AS_USUAL) -> Contract:
    """Draft a contract from CSV files: every row that ingest can read is looked at, so that what is drafted reads them all.

    Args:
        files: paths of CSV files with a header; `.gz` is unpacked.
        roles: column names by tag, such as {"key": ["ad_id"], "image": ["image"]}.
        layout: how the files are written.

    Raises:
        ContractError: no file has a header, a role's column is not in the files, or a file cannot be read as CSV.
    """
    kinds: dict[str, str | None] = {}
    counts = Counter[str]()
    for file in files:
        try:
            with open(file, "rb") as stream:
                header, _ = csv_records.open_file(stream, file, layout, rows.BLOCK_BYTES)
                if header is None:
                    continue
                names = _named(file, header, list(kinds))
                kinds = kinds or dict.fromkeys(names)
                _check_roles(roles, names)
                # Whatever the values are, they are text, and a key is there.
                keys = set(roles.get("key", ()))
                key = [Column(name, "bytes", frozenset({"key"}), required=True) for name in names if name in keys]
                texts = Contract((*key, *(Column(name, "bytes") for name in names if name not in keys)))
                stream.seek(0)
                for checked in rows.read_rows(stream, texts, file, layout):
                    counts["read"] += checked.read
                    counts.update(checked.rejects["reason"].to_pylist())
                    for name, kind in kinds.items():
                        kinds[name] = _widen(kind, checked.rows[name])
                        if kinds[name] == "bytes" != kind:
                            _tell_odd(name, checked.rows[name], file)
        except (OSError, EOFError, zlib.error, csv_records.HeaderError) as error:
            raise ContractError(f"{file!r} cannot be read as CSV: {error}") from None
    if not kinds:
        raise ContractError(f"no file to infer a contract from: none of {list(files)} has a header; name one or more CSV files")
    read = counts.pop("read", 0)
    if counts:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
        log.info("%d of %d rows cannot be read and say nothing here, as they will be rejected: %s", counts.total(), read, reasons)
    drafted = []
    for name, kind in kinds.items():
        tags = frozenset(tag for tag, columns in roles.items() if name in columns)
        if tags & {"key", "image"}:
            drawn = "bytes"  # Names are text even where they look like numbers: the keys 7 and 007 are two ads.
        elif tags & {*OUTCOMES, "position"}:
            drawn = kind or "int"
        else:
            drawn = kind or "bytes"
        drafted.append(Column(name, drawn, tags, required="key" in tags))
    return Contract(tuple(drafted))


def _check_roles(roles: dict[str, Sequence[str]], names: list[str]) -> None:
    """Every role is that of a column."""
    for tag, columns in roles.items():
        for name in columns:
            if name not in names:
                raise ContractError(f"--{tag} {name!r} is not a column of the files; expected one of {', '.join(names)}")


def _named(file: str, header: list[str], known: list[str]) -> list[str]:
    """The names in a header, each once; all files have the same, in whatever order."""
    if "" in header:
        log.info("%s: column %d has no name, so it is left out; name it in the export if it is to be used", file, header.index("") + 1)
    names = [name for name in header if name]
    for name in names:
        if names.count(name) > 1:
            raise ContractError(f"{file!r} has the column {name!r} {names.count(name)} times; expected a header of different names")
    if known and set(names) != set(known):
        odd = ", ".join(sorted(set(names) ^ set(known)))
        raise ContractError(f"{file!r} does not have the columns of the files before it, see {odd}; draft a contract for each kind of file")
    return names


def _widen(kind: str | None, column: pa.Array) -> str | None:
    """The narrowest type that holds what was seen before and this column too; None while all values are missing."""
    if column.null_count == len(column):
        return kind
    for candidate, arrow in (("int", pa.int64()), ("float", pa.float64())):
        if kind in (None, "int", candidate):
            try:
                values = rows.cast(column, arrow)
            except pa.ArrowInvalid:
                continue
            # Ingest turns away what is no finite number.
            if pc.all(pc.is_finite(values)).as_py():
                return candidate
    return "bytes"


def _tell_odd(name: str, column: pa.Array, file: str) -> None:
    """Where nearly all values are numbers, one that makes the column text is likely a fault, which the contract does not show."""
    values = column.drop_null()
    numbers = pc.match_substring_regex(values, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
    odd = values.filter(pc.invert(numbers))
    if 0 < len(odd) < len(values) / 10:
        log.info(
            "%r is text to the draft because of %r in %s, though nearly all of its values are numbers; if that is a fault, mend the "
            "export, or draft without such rows, and a month will reject them",
            *(name, odd[0].as_py(), file),
        )
