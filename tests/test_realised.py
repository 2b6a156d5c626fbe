"""Realised quality: what outcomes say of last month's run, where positions are confounded with quality, and what follows from it."""

import os
import pathlib
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from test_drift import rows_of

from beam_jobs import realised
from beam_jobs.realised import OK, SCRATCH, STOP, WARN, Part
from model.evaluation import Segment
from model.splits import GATE, split_of_rows
from schemas import contract as contracts
from schemas import lake
from schemas import sample as sample_months
from schemas.sample import POSITION_EFFECTS, write_months
from schemas.storage import Folder

LONG = bool(os.environ.get("ADSTOCRAT_LONG"))
CONTRACT = contracts.load(contracts.DEFAULT)
ADS, LAST, NOW = 1_000_000 if LONG else 150_000, "2026-09", "2026-10"
LIMITS = (0.10, 0.25, 0.50)
SEGMENTS: frozenset[Segment] = frozenset(("device", value) for value in ("mobile", "desktop", "tablet"))


@pytest.fixture(scope="module")
def months(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, pa.Table]:
    """Rows of a month, and the truth of those of its ads that the month before had: key, creative and p_click at the reference position."""
    storage = Folder(str(tmp_path_factory.mktemp("sample")))
    with mock.patch.object(sample_months, "write_pictures", lambda *_: []):
        write_months(storage, [LAST, NOW], ADS, ADS // 50, 3, lambda line: None)
    before, now = (pq.read_table(pathlib.Path(storage.uri) / lake.truth(month)) for month in (LAST, NOW))
    kept = now.filter(pc.is_in(now["ad_id"], before["ad_id"].combine_chunks()))
    return rows_of(storage, NOW), pa.table({"key": kept["ad_id"], "creative": kept["image"], "p_click": kept["p_click_reference"]})


def effect(positions: np.ndarray) -> np.ndarray:
    return np.asarray(POSITION_EFFECTS)[positions.astype(int) - 1]


def times(scores: pa.Table, factor: float) -> pa.Table:
    return scores.set_column(2, "p_click", pc.min_element_wise(pc.multiply(scores["p_click"], factor), 0.99))


def ruled(rows: pa.Table, scores: pa.Table, effect: realised.Effect = effect) -> dict:
    halves = [rows.slice(0, len(rows) // 2), rows.slice(len(rows) // 2)]
    parts = [Part(number, *realised.judge(half, scores, CONTRACT, effect, SEGMENTS)) for number, half in enumerate(halves)]
    return realised.ruled(realised.merge_parts(parts[::-1]), *LIMITS)


def test_the_truth_is_calibrated_where_position_is_confounded_with_quality(months: tuple[pa.Table, pa.Table]) -> None:
    told = ruled(*months)
    whole = told["rows"][0]
    assert whole["segment"] is None and abs(whole["calibration"] - 1) <= 0.03 and told["action"] == OK
    assert whole["calibration_low"] < whole["calibration"] < whole["calibration_high"] and whole["ne"] < 1
    assert {row["value"] for row in told["rows"][1:]} == {"mobile", "desktop", "tablet"}
    # Of probabilities that stay at the reference position, nobody would say so.
    assert ruled(*months, effect=lambda positions: 0 * positions)["rows"][0]["calibration"] > 1.15


def test_only_matched_keys_count_and_the_others_are_told(months: tuple[pa.Table, pa.Table]) -> None:
    rows, scores = months
    told = ruled(rows, scores)
    known = pc.is_in(rows["key"], scores["key"].combine_chunks()).to_numpy(zero_copy_only=False)
    shown = pc.fill_null(rows["impressions"], 0).to_numpy()
    assert told["matched_share"] == pytest.approx(shown[known].sum() / shown.sum()) and 0.6 < told["matched_share"] < 0.8
    assert told["unmatched"]["impressions"] == shown[~known].sum()
    mobile = pc.equal(rows["device"], "mobile").to_numpy(zero_copy_only=False)
    (mix,) = [mix for mix in told["unmatched"]["mix"] if mix["value"] == "mobile"]
    assert mix["impressions"] == shown[~known & mobile].sum()
    assert ruled(rows, scores.slice(0, 0))["rows"] == []


@pytest.mark.parametrize(("factor", "action"), [(1.15, WARN), (0.85, WARN), (1.4, SCRATCH), (2.0, STOP)])
def test_a_model_that_is_off_is_flagged(months: tuple[pa.Table, pa.Table], factor: float, action: str) -> None:
    rows, scores = months
    told = ruled(rows, times(scores, factor))
    assert told["action"] == action and told["rows"][0]["calibration"] == pytest.approx(factor, abs=0.05)
    assert f"{told['rows'][0]['calibration']:.3f}" in told["verdict"]


def test_gate_rows_are_told_and_do_not_decide_what_is_trained(months: tuple[pa.Table, pa.Table]) -> None:
    rows, scores = months
    keys = rows["key"].combine_chunks()
    gate = pa.array(split_of_rows(keys, pa.nulls(len(keys), pa.string())) == GATE)
    flipped = pc.if_else(gate, pc.subtract(rows["impressions"], rows["clicks"]), rows["clicks"])
    told = ruled(rows.set_column(rows.schema.get_field_index("clicks"), "clicks", flipped), scores)
    assert told["rows"][0]["calibration"] < 0.5 and told["action"] == WARN


def test_few_clicks_do_not_call_for_more_than_a_warning(months: tuple[pa.Table, pa.Table]) -> None:
    rows, scores = months
    few = rows.slice(0, 2_000)
    told = ruled(few, times(scores, 1.3 / ruled(few, scores)["rows"][0]["calibration"]))
    assert told["action"] == WARN and told["rows"][0]["calibration"] > 1.25 > told["rows"][0]["calibration_low"]


def test_a_segment_that_is_off_is_named(months: tuple[pa.Table, pa.Table]) -> None:
    rows, scores = months
    desktop = pc.is_in(scores["key"], rows.filter(pc.equal(rows["device"], "desktop"))["key"].combine_chunks())
    off = pc.if_else(desktop, pc.multiply(scores["p_click"], 0.7), scores["p_click"])
    told = ruled(rows, scores.set_column(2, "p_click", off))
    assert told["action"] == WARN and "device=desktop is off by 3" in told["verdict"]
