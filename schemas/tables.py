"""The tables and views that analysts query, and the audits before a month is published: files under `tables/`, `views/` and `audits/`.

A table's fixed columns are its file; the contract adds its key and segment columns to `scores`. A view or an audit is one SELECT below a
comment that describes it.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from schemas.contract import Contract

if TYPE_CHECKING:
    import pyarrow as pa

_FOLDER = pathlib.Path(__file__).parent
_CONTRACT_TYPES = {"bytes": "STRING", "int": "INT64", "float": "FLOAT64"}
_PAIRS = "ARRAY<STRUCT<segment STRING, value STRING>>"


@dataclasses.dataclass(frozen=True)
class Table:
    """What a table says of itself; all are partitioned by `month`.

    Attributes:
        description: for people.
        clustering: columns that its rows lie in order of.
        replaced: the rows that a publication of a `{month}` replaces; None where it only adds to them.
    """

    description: str
    clustering: tuple[str, ...]
    replaced: str | None = "month = {month}"


TABLES = {
    "scores": Table("One row for each ad of each month's inventory, with the probability that an impression of it is clicked.", ("key",)),
    "outcomes": Table("What was delivered of each ad's impressions and clicks; ads without impressions are not here.", ("key",)),
    "quality": Table(
        "How well models did, by month and segment: on gate rows before publishing, and by the outcomes of the month after.",
        ("kind", "model", "segment"),
        "(month = {month} AND kind = 'evaluation') OR (judged_month = {month} AND kind = 'realised')",
    ),
    "runs": Table("One row for each time that a run was made a month's, also by a rollback.", ("run_id",), None),
}


@dataclasses.dataclass(frozen=True)
class Statement:
    """A file of SQL: its SELECT, and what the comment above it says."""

    text: str
    description: str


@functools.cache
def _fixed(table: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((_FOLDER / "tables" / f"{table}.json").read_text()))


def fields(table: str, contract: Contract | None = None) -> list[dict[str, Any]]:
    """Columns of a table as BigQuery's API has them: the fixed ones, and in `scores` behind the key those that the contract carries."""
    first, second, *others = _fixed(table)
    carried = [
        {"name": column.name, "type": _CONTRACT_TYPES[column.kind], "mode": "NULLABLE", "description": "As delivered."}
        for column in (contract.carried if contract and table == "scores" else ())
    ]
    return [first, second, *carried, *others]


def schema(table: str, contract: Contract | None = None) -> "pa.Schema":
    """A table's schema in Arrow; what BigQuery calls REQUIRED is not nullable."""
    import pyarrow as pa

    types = {"DATE": pa.date32(), "STRING": pa.string(), "INT64": pa.int64(), "FLOAT64": pa.float64()}
    return pa.schema([pa.field(field["name"], types[field["type"]], field["mode"] != "REQUIRED") for field in fields(table, contract)])


def statements(folder: str, values: Mapping[str, Any]) -> dict[str, Statement]:
    """The files of `views` or `audits` by name, with the values put in."""
    found = {}
    for path in sorted((_FOLDER / folder).glob("*.sql")):
        comment, _, text = path.read_text().partition("\n")
        found[path.stem] = Statement(text.format(**values).rstrip(), comment.removeprefix("-- "))
    return found


def names(table: str, contract: Contract) -> str:
    """The table's columns as a list in SQL."""
    return ", ".join(f"`{field['name']}`" for field in fields(table, contract))


def segments(contract: Contract) -> str:
    """SQL for a row's segments, an array of (segment, value) to be unnested beside the row; all rows are of `overall`."""
    own = [f"('{column.name}', CAST(`{column.name}` AS STRING))" for column in contract.segments]
    pairs = ", ".join(["('overall', CAST(NULL AS STRING))", *own])
    return f"{_PAIRS}[{pairs}]"


def listed(pairs: Sequence[tuple[str, str]]) -> str:
    """SQL for such an array of given values."""
    return f"{_PAIRS}[{', '.join(f'({literal(segment)}, {literal(value)})' for segment, value in pairs)}]"


def literal(value: str | int | bool) -> str:
    """A value in SQL; a string of JSON is one of GoogleSQL."""
    return json.dumps(value, ensure_ascii=False)
