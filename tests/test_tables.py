"""The score table in BigQuery's words and in Arrow's is one and the same."""

import json
import pathlib

import pyarrow as pa
import pytest

from schemas import contract as contracts
from schemas import tables
from schemas.contract import RESERVED, Column, Contract, ContractError

FIXED = json.loads((pathlib.Path(tables.__file__).parent / "tables" / "scores.json").read_text())
KEY = Column("id", "bytes", frozenset({"key"}), required=True)
MIXED = Contract(
    (
        Column("bid", "float"),
        Column("market", "int", frozenset({"key", "segment"}), required=True),
        KEY,
        Column("weight", "float", frozenset({"segment"})),
        Column("note", "bytes", frozenset({"ignore"})),
    )
)


def test_the_contract_s_key_and_segments_stand_behind_the_key() -> None:
    names = [field["name"] for field in tables.fields("scores", MIXED)]
    assert names[:5] == ["month", "key", "market", "id", "weight"]
    assert names[5:] == [field["name"] for field in FIXED[2:]]


def test_carried_columns_have_their_own_types_and_may_be_null() -> None:
    carried = {field["name"]: (field["type"], field["mode"]) for field in tables.fields("scores", MIXED)[2:5]}
    assert carried == {"market": ("INT64", "NULLABLE"), "id": ("STRING", "NULLABLE"), "weight": ("FLOAT64", "NULLABLE")}


@pytest.mark.parametrize("contract", [MIXED, contracts.load(contracts.DEFAULT), Contract((KEY,))])
def test_arrow_and_bigquery_agree(contract: Contract) -> None:
    types = {"DATE": pa.date32(), "STRING": pa.string(), "INT64": pa.int64(), "FLOAT64": pa.float64()}
    fields, schema = tables.fields("scores", contract), tables.schema("scores", contract)
    assert schema.names == [field["name"] for field in fields]
    assert schema.types == [types[field["type"]] for field in fields]
    assert [not field.nullable for field in schema] == [field["mode"] == "REQUIRED" for field in fields]
    assert len(set(schema.names)) == len(schema.names)


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_table_and_column_is_described(table: str) -> None:
    fields = tables.fields(table, MIXED)
    assert tables.TABLES[table].description.endswith(".") and all(field["description"].endswith(".") for field in fields)
    assert fields[0]["name"] == "month" and set(tables.TABLES[table].clustering) <= {field["name"] for field in fields}


@pytest.mark.parametrize("folder", ["views", "audits"])
def test_every_view_and_audit_is_one_described_select(folder: str) -> None:
    values = dict.fromkeys(["dataset", "staging", "scores", "rows", "month", "last", "run", "max_mean_shift", "gone", "columns"], "x")
    for name, statement in tables.statements(folder, {**values, "segments": tables.segments(MIXED)}).items():
        assert statement.description.endswith(".") and statement.text.startswith(("SELECT", "WITH")), name
        assert ";" not in statement.text and "--" not in statement.text, name


def test_segments_and_literals_in_sql() -> None:
    assert tables.segments(Contract((KEY,))) == "ARRAY<STRUCT<segment STRING, value STRING>>[('overall', CAST(NULL AS STRING))]"
    assert tables.segments(MIXED).endswith(
        "[('overall', CAST(NULL AS STRING)), ('market', CAST(`market` AS STRING)), ('weight', CAST(`weight` AS STRING))]"
    )
    assert tables.listed([("a", 'it\'s "b"\\')]).endswith('[("a", "it\'s \\"b\\"\\\\")]')
    assert [tables.literal(value) for value in (True, 3, "é\n")] == ["true", "3", '"é\\n"']


@pytest.mark.parametrize("name", [field["name"] for field in FIXED])
@pytest.mark.parametrize("tag", ["key", "segment"])
def test_no_carried_column_may_be_named_like_a_fixed_one(name: str, tag: str) -> None:
    assert name in RESERVED
    with pytest.raises(ContractError, match="reserved name"):
        Contract((KEY, Column(name, "bytes", frozenset({tag}))))
