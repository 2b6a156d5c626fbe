"""The tables that analysts query: their fixed columns are the files under `tables/`, the contract adds its key and segment columns."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from schemas.contract import Contract

if TYPE_CHECKING:
    import pyarrow as pa

_FOLDER = pathlib.Path(__file__).parent
_CONTRACT_TYPES = {"bytes": "STRING", "int": "INT64", "float": "FLOAT64"}


@functools.cache
def _fixed(table: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((_FOLDER / "tables" / f"{table}.json").read_text()))


def score_fields(contract: Contract) -> list[dict[str, Any]]:
    """Columns of the score table as BigQuery's API has them: the fixed ones, and behind the key those that the contract carries."""
    carried = [
        {"name": column.name, "type": _CONTRACT_TYPES[column.kind], "mode": "NULLABLE", "description": "As delivered."}
        for column in contract.carried
    ]
    month, key, *others = _fixed("scores")
    return [month, key, *carried, *others]


def scores(contract: Contract) -> "pa.Schema":
    """The score table's schema in Arrow; what BigQuery calls REQUIRED is not nullable."""
    return _arrow(score_fields(contract))


def quality() -> "pa.Schema":
    """The quality table's schema in Arrow."""
    return _arrow(_fixed("quality"))


def _arrow(fields: Sequence[dict[str, Any]]) -> "pa.Schema":
    import pyarrow as pa

    types = {"DATE": pa.date32(), "STRING": pa.string(), "INT64": pa.int64(), "FLOAT64": pa.float64()}
    return pa.schema([pa.field(field["name"], types[field["type"]], field["mode"] != "REQUIRED") for field in fields])
