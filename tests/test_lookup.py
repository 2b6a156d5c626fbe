import datetime
import functools
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from beam_jobs import lookup, shard
from beam_jobs.arrow import shards_for
from beam_jobs.config import Config
from beam_jobs.run import MonthRun
from beam_jobs.runner import run_pipeline
from schemas import tables
from schemas.contract import Column, Contract
from schemas.lake import Current, Manifest, Receipt, commit
from schemas.parquet import write_parquet
from schemas.storage import Folder
from serving import store
from serving.shard import KEY_END, shard_of

CONTRACT = Contract(
    (
        Column("ad", "bytes", frozenset({"key"}), True),
        Column('odd "name"\\', "bytes", frozenset({"segment"})),
        Column("floor", "float", frozenset({"segment"})),
        Column("site", "int", frozenset({"segment"})),
        Column("bid", "float"),
    )
)
ODD_STRINGS = [
    *(
        "",
        "plain",
        'quoted "twice" ""',
        "back\\slash\\\\",
        "\\u0041",
        "a/b",
        "tab\tnewline\nreturn\r",
        "null",
        "{}",
        "\x7f\x80",
        "\u2028\u2029",
    ),
    *("Ünïcode – 広告 😀", "\ufeff", "\ud7ff\ue000\U0010ffff", "".join(map(chr, range(1, 32))), "before\0behind", "\0", None),
]
ODD_FLOATS = [
    0.0,
    -0.0,
    0.1,
    1 / 3,
    1e-7,
    5e-324,
    2.2250738585072014e-308,
    1.7976931348623157e308,
    1e15,
    1e16,
    1e21,
    -123456.789,
    100.0,
    None,
]
ODD_INTS = [0, -1, 2**63 - 1, -(2**63), 10**15, None]


# --- JSON ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(values) for values in (ODD_STRINGS, ODD_FLOATS, ODD_INTS, [True, False, None], ["plain", None])),
        *(pa.array(ODD_STRINGS).slice(3, 7), pa.array([], pa.string()), pa.nulls(3, pa.string())),
    ],
    ids=range(8),
)
def test_values_are_what_json_makes_of_them(column: pa.Array) -> None:
    texts = shard.json_values(column).to_pylist()
    assert [json.loads(text) for text in texts] == column.to_pylist()
    for text, value in zip(texts, column.to_pylist(), strict=True):
        assert "\n" not in text and (isinstance(value, float) or json.loads(json.dumps(value)) == json.loads(text))


def test_every_double_comes_back() -> None:
    values = np.random.default_rng(0).integers(0, 1 << 63, 20_000, np.uint64).view(np.float64)
    values = np.concatenate([values[np.isfinite(values)], np.random.default_rng(1).random(20_000)])
    texts = shard.json_values(pa.array(values)).to_pylist()
    np.testing.assert_array_equal(np.array([float(json.loads(text)) for text in texts]), values)


@pytest.mark.parametrize("name", ["p_click", 'odd "name"\\', "line\nbreak", "ключ"])
def test_objects_are_their_rows(name: str) -> None:
    rows = max(len(ODD_STRINGS), len(ODD_FLOATS))
    batch = pa.RecordBatch.from_pydict(
        {
            "key": [text or "" for text in (ODD_STRINGS * 2)[:rows]],
            name: (ODD_FLOATS * 2)[:rows],
            "n": (ODD_INTS * 4)[:rows],
            "last": (ODD_STRINGS * 2)[1 : rows + 1],
        }
    )
    keys, objects = zip(*(record[:-1].split(KEY_END) for record in shard.records(batch).to_pylist()), strict=True)
    assert [key.decode() for key in keys] == batch["key"].to_pylist()
    assert [json.loads(text) for text in objects] == batch.to_pylist()
    assert [list(json.loads(text)) for text in objects] == [list(row) for row in batch.to_pylist()]
    assert shard.records(batch.slice(0, 0)).to_pylist() == []


# --- the table ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 7, 1000])
def test_shards_are_those_that_the_service_looks_in(shards: int) -> None:
    keys = [key for key in ODD_STRINGS if key] + [f"ad{i}" for i in range(1000)]
    numbers = pa.array(shard.key_numbers(pa.array(keys)))
    found = lookup.shard_of_key(pa.RecordBatch.from_arrays([numbers], [""]), shards)
    assert found.tolist() == [shard_of(key.encode(), shards) for key in keys]


def score_rows(run: MonthRun, rows: int) -> pa.RecordBatch:
    rng = np.random.default_rng(rows)
    keys = ([f"{text}!" for text in ODD_STRINGS if text] + ["x" * 500] + [f"ad{i}" for i in range(rows)])[:rows]
    some = {"month": [datetime.date(2026, 10, 1)] * rows, "key": keys, "ad": keys, "floor": (ODD_FLOATS * rows)[:rows]}
    odd = {'odd "name"\\': (ODD_STRINGS * rows)[:rows], "site": (ODD_INTS * rows)[:rows], "p_click": rng.random(rows)}
    creative = {
        "creative": [f"{i:064x}" if i % 2 else None for i in range(rows)],
        "image_status": ["ok"] * rows,
        "score_status": ["ok"] * rows,
        "evidence_key": [7] * rows,
        "evidence_creative": [0] * rows,
    }
    versions = {"encoder_version": ["e"] * rows, "model_version": ["m"] * rows, "run_id": [run.id] * rows}
    return pa.RecordBatch.from_pydict({**some, **odd, **creative, **versions}, schema=tables.schema("scores", CONTRACT))


@pytest.fixture
def run(tmp_path: pathlib.Path) -> MonthRun:
    lake = str(tmp_path / "lake")
    return MonthRun(Folder(lake), CONTRACT, Config(lake=lake), "2026-10", "r", (), None, None)


def scored(run: MonthRun, *receipts: Receipt) -> Manifest:
    return commit(run.storage, run.stage("scores"), Manifest("score", receipts, {"encoder": "e", "ranker": "m"}))


@pytest.mark.parametrize(("rows", "rows_a_shard", "shards"), [(1, 500_000, 1), (400, 500_000, 1), (400, 50, 8)])
def test_each_row_is_found_under_its_key(
    run: MonthRun, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, rows: int, rows_a_shard: int, shards: int
) -> None:
    monkeypatch.setattr(lookup, "shards_for", functools.partial(shards_for, rows_per_shard=rows_a_shard))
    batch = score_rows(run, rows)
    parts = [batch.slice(at, 150) for at in range(0, rows, 150)]
    receipts = [write_parquet(run.storage, "scores", f"unit/{at}", [part]) for at, part in enumerate(parts)]
    run_pipeline(functools.partial(lookup.define_pipeline, run=run, scores=scored(run, *receipts)), [])
    manifest = run.manifest(run.stage("lookup"))
    assert manifest.rows == manifest.count("entries") == rows and len(manifest.receipts) == shards == manifest.info["shards"]
    table = store.fetch(run.storage, Current("2026-10", "r"), tmp_path / "cache")
    try:
        assert (table.rows, table.month, table.run, table.encoder_version, table.model_version) == (rows, "2026-10", "r", "e", "m")
        for row in batch.to_pylist():
            found = table.get(row["key"].encode())
            assert found is not None
            assert json.loads(found) == {name: value for name, value in row.items() if name not in lookup.SAME_FOR_ALL}
        assert table.get(b"another") is None
    finally:
        table.close()


def test_a_key_that_repeats_is_an_error_that_names_it(run: MonthRun) -> None:
    receipts = tuple(write_parquet(run.storage, "scores", f"unit/{at}", [score_rows(run, 20)]) for at in range(2))
    with pytest.raises(ValueError, match="repeats; expected keys that are unique in a month"):
        run_pipeline(functools.partial(lookup.define_pipeline, run=run, scores=scored(run, *receipts)), [])
    assert not [name for name in run.storage.names("lookup/") if name.endswith("manifest.json")]
