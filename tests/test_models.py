"""Months through the gate by the command: what is promoted and what refused; and kept models listed, moved to and compared."""

import csv
import dataclasses
import io
import os
import pathlib
import random
import re
import shutil
import zipfile
from collections.abc import Callable

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from beam_jobs import models
from beam_jobs.cli import main
from beam_jobs.evaluate import COLD, OVERALL, WARM, Counted, make_plan, segments_of, warm_and_cold
from model import golden, registry
from model.registry import ModelError
from model.splits import GATE, TRAIN, split_of_rows
from schemas import contract as contracts
from schemas import lake, tables
from schemas.contract import Column, Contract
from schemas.hashing import hash64_column
from schemas.lake import Champion, Current
from schemas.parquet import read_parquet
from schemas.storage import Folder, Storage

LONG = bool(os.environ.get("ADSTOCRAT_LONG"))
AUGUST, SEPTEMBER = "2026-08", "2026-09"
IMAGES = 40 if LONG else 0
COLUMNS = (
    Column("id", "bytes", frozenset({"key"}), required=True),
    *([Column("image", "bytes", frozenset({"image"}))] if LONG else []),
    Column("device", "bytes", frozenset({"segment"})),
    Column("slot", "bytes"),
    Column("clicks", "int", frozenset({"clicks"})),
    Column("impressions", "int", frozenset({"impressions"})),
)
CONTRACT = Contract(COLUMNS)
Outcome = Callable[[list[str], np.ndarray], np.ndarray]  # of keys and clicks, other clicks


def deliver(storage: Storage, month: str, outcome: Outcome = lambda keys, clicks: clicks, count: int = 5000) -> None:
    """Rows whose clicks follow device and slot, the latter by four in log-odds from end to end."""
    rng = np.random.default_rng(int(month[-2:]))
    keys = [f"k{i}" for i in range(count)]
    device, slot = rng.integers(0, 3, count), rng.integers(0, 12, count)
    rate = 1 / (1 + np.exp(4.6 - 0.36 * slot - 0.5 * (device == 0)))
    clicks = outcome(keys, rng.binomial(40, rate))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([column.name for column in COLUMNS])
    images = [[f"i{i % IMAGES}.png"] if IMAGES else [] for i in range(count)]
    writer.writerows([key, *image, f"d{d}", f"s{s}", k, 40] for key, image, d, s, k in zip(keys, images, device, slot, clicks, strict=True))
    storage.write(lake.raw_ads(month) + "ads.csv", file.getvalue().encode())
    for i in range(IMAGES):
        data = io.BytesIO()
        Image.new("RGB", (80, 40), (6 * i, 255 - 6 * i, 77)).save(data, "PNG")
        storage.write(f"{lake.raw_images(month)}i{i}.png", data.getvalue())


def run(storage: Storage, month: str, *flags: str) -> int:
    path = pathlib.Path(storage.uri) / "contract.pbtxt"
    path.write_text(contracts.dumps(CONTRACT))
    return main(["month", month, "--lake", storage.uri, "--contract", str(path), *flags])


def pointers(storage: Storage) -> tuple[Champion, Current]:
    champion, current = lake.read_pointer(storage, lake.CHAMPION, Champion)[0], lake.read_pointer(storage, lake.CURRENT, Current)[0]
    assert champion is not None and current is not None
    return champion, current


def published(storage: Storage, stage: str) -> pa.Table:
    """The files of a stage of the run that is served."""
    current = pointers(storage)[1]
    manifest = lake.read_manifest(storage, lake.stage_folder(stage, current.month, current.run))
    assert manifest is not None
    return pa.Table.from_batches([batch for file in manifest.files for batch in read_parquet(storage, file)])


def evaluation(storage: Storage, month: str) -> dict:
    name = next(name for name in storage.names(f"evaluation/{month}/") if name.endswith(lake.MANIFEST))
    return dict(lake.Manifest.from_json(storage.read(name)).info)


def copied(storage: Folder, to: pathlib.Path) -> Folder:
    shutil.copytree(storage.uri, to)
    return Folder(str(to))


@pytest.fixture(scope="module")
def august(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A lake after its first month."""
    storage = Folder(str(tmp_path_factory.mktemp("lakes") / "august"))
    deliver(storage, AUGUST)
    assert run(storage, AUGUST) == 0
    return storage


@pytest.fixture(scope="module")
def september(august: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The same lake after a second month of the same world."""
    storage = copied(august, tmp_path_factory.mktemp("lakes") / "september")
    deliver(storage, SEPTEMBER)
    assert run(storage, SEPTEMBER) == 0
    return storage


def test_a_first_model_and_one_that_is_as_good_are_promoted(september: Folder) -> None:
    first, second = evaluation(september, AUGUST), evaluation(september, SEPTEMBER)
    assert (first["status"], first["promoted"], first["flagged"], first["refused"]) == ("first", True, False, [])
    assert (second["status"], second["promoted"], second["flagged"], second["refused"]) == ("promoted", True, False, [])
    champion, current = pointers(september)
    assert champion.ranker == f"{SEPTEMBER}-{current.run}" == second["ranker"]
    assert set(second["metrics"]) == {"candidate", "base_rate", "champion"}
    ledger = september.read_json(f"runs/{SEPTEMBER}/{current.run}/ledger.json")
    assert ledger["gate"] == {"status": "promoted", "why": second["why"]}
    rows = published(september, "evaluation")
    assert rows.schema.equals(tables.schema("quality"))
    told = {(row["model"], row["segment"], row["value"]) for row in rows.to_pylist()}
    assert told >= {(model, *part) for model in second["metrics"] for part in (("overall", None), ("device", "d0"))}
    assert set(rows["model_version"].to_pylist()) == {champion.ranker, first["ranker"], None}
    # The same by plain code: gate rows of September, scored by the published model, which knows no position.
    scores = {row["key"]: row["p_click"] for row in published(september, "scores").to_pylist()}
    lines = list(csv.DictReader(io.StringIO(september.read(lake.raw_ads(SEPTEMBER) + "ads.csv").decode(), newline="")))
    creatives = {row["key"]: row["creative"] for row in published(september, "scores").to_pylist()}
    split = split_of_rows(pa.array([row["id"] for row in lines]), pa.array([creatives[row["id"]] for row in lines], pa.string()))
    gate = [row for row, part in zip(lines, split, strict=True) if part == GATE]
    loss = -sum(int(r["clicks"]) * np.log(scores[r["id"]]) + (40 - int(r["clicks"])) * np.log1p(-scores[r["id"]]) for r in gate)
    metrics = second["metrics"]["candidate"]
    assert (metrics["rows"], metrics["clicks"]) == (len(gate), sum(int(row["clicks"]) for row in gate))
    assert metrics["log_loss"] == pytest.approx(loss / (40 * len(gate)), rel=1e-6)


def shuffled(keys: list[str], clicks: np.ndarray) -> np.ndarray:
    """Clicks permuted among the rows that are learnt from."""
    where = np.flatnonzero(split_of_rows(pa.array(keys), pa.nulls(len(keys), pa.string())) != GATE)
    out = clicks.copy()
    out[where] = clicks[np.random.default_rng(0).permutation(where)]
    return out


def test_what_is_worse_or_broken_is_refused_and_the_champion_scores(
    august: Folder, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    storage = copied(august, tmp_path / "lake")
    champion = pointers(storage)[0].ranker
    deliver(storage, SEPTEMBER, shuffled)
    flags = ("--window-months", "1")
    assert run(storage, SEPTEMBER, "--require-promotion", *flags) == 1
    assert not storage.names(f"scores/{SEPTEMBER}/") and pointers(storage)[1].month == AUGUST
    assert "is not scored, as a promotion is required and the candidate was refused: normalized entropy +" in capsys.readouterr().err
    found = evaluation(storage, SEPTEMBER)
    assert (found["status"], found["promoted"], found["ranker"]) == ("kept", False, champion) and "champion" in found["refused"]

    # Its evaluation lost, and a byte of it changed.
    candidate = next(name.split("/")[2] for name in storage.names("models/ranker/") if f"/{SEPTEMBER}-" in name)
    weights = next(name for name in storage.names(f"models/ranker/{candidate}/files") if name.endswith("model.keras"))
    storage.delete(f"evaluation/{SEPTEMBER}/")
    whole = storage.read(weights)
    storage.write(weights, whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert run(storage, SEPTEMBER, *flags) == 0
    found = evaluation(storage, SEPTEMBER)
    assert (found["status"], found["refused"], found["ranker"]) == ("kept", ["damaged"], champion)
    assert f"ranker '{candidate}' is damaged" in found["why"]
    assert set(published(storage, "scores")["model_version"].to_pylist()) == {champion}
    assert pointers(storage)[0] == Champion(found["encoder"], champion, SEPTEMBER, pointers(storage)[1].run)
    with pytest.raises(ModelError, match="is damaged"):
        models.promote(storage, candidate)
    assert pointers(storage)[0].ranker == champion

    # Nor is a pair promoted whose encoder is damaged, though its ranker is whole.
    storage.delete(f"evaluation/{SEPTEMBER}/")
    storage.write(weights, whole)
    of_encoder = next(name for name in storage.names(f"models/encoder/{found['encoder']}/files") if name.endswith("model.keras"))
    storage.write(of_encoder, storage.read(of_encoder)[:-1])
    assert run(storage, SEPTEMBER, *flags) == 0
    found = evaluation(storage, SEPTEMBER)
    assert found["refused"] == ["damaged"] and f"encoder '{found['encoder']}' is damaged" in found["why"]


def test_models_are_listed_moved_to_and_compared(september: Folder, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    storage = copied(september, tmp_path / "lake")
    champion, current = pointers(storage)
    old = next(name.split("/")[2] for name in storage.names("models/ranker/") if f"/{AUGUST}-" in name)
    capsys.readouterr()
    for arguments in (["models"], ["compare", old, champion.ranker], ["promote", old], ["models"]):
        assert main([*arguments, "--lake", storage.uri]) == 0
    before, compared, after = re.split(r"\n(?=gate rows|champion:)", capsys.readouterr().out)
    assert [line.endswith("champion") for line in before.splitlines() if line.startswith("ranker")] == [False, True]
    assert [line.endswith("champion") for line in after.splitlines() if line.startswith("ranker")] == [True, False]
    assert f"from {old}" in before and "first, normalized entropy 0." in before and "promoted, normalized entropy 0." in before
    assert compared.splitlines()[0] == f"gate rows of {SEPTEMBER}: A is {old}, B is {champion.ranker}"
    metrics = evaluation(storage, SEPTEMBER)["metrics"]
    overall = compared.splitlines()[2].split()
    expected = [f"{metrics[name]['normalized_entropy']:.5f}" for name in ("champion", "candidate")]
    assert overall[:4] == ["overall", f"{metrics['candidate']['clicks']:,.0f}", *expected]
    encoder = registry.manifest(storage, "ranker", old).info["encoder"]
    assert pointers(storage)[0] == Champion(encoder, old, SEPTEMBER, current.run)
    storage.write(lake.CHAMPION, b'{"encoder": "e", "ranker": "other", "month": "2026-09", "run": "r"}')
    lake.commit(storage, lake.model_folder("ranker", "other"), lake.Manifest("ranker", (), {"contract": "another", "encoder": "e"}))
    with pytest.raises(ModelError, match=f"ranker '{old}' is of contract .*, the champion 'other' of another"):
        models.promote(storage, old)
    with pytest.raises(ModelError, match="they cannot be compared"):
        models.compare(storage, old, "other")
    made = registry.manifest(storage, "ranker", old)
    storage.delete(f"{lake.model_folder('ranker', old)}/{lake.MANIFEST}")
    lake.commit(
        storage, lake.model_folder("ranker", old), dataclasses.replace(made, info={**made.info, "contract": "another", "format": 0})
    )
    with pytest.raises(ModelError, match=f"ranker '{old}' has model format 0; expected {registry.FORMAT}"):
        models.promote(storage, old)


def test_the_evaluation_is_written_for_tfma_too(september: Folder, tmp_path: pathlib.Path) -> None:
    path = str(pathlib.Path(september.uri) / "contract.pbtxt")
    folder = str(tmp_path / "tfma")
    assert main(["evaluate", SEPTEMBER, "--lake", september.uri, "--contract", path, "--write-tfma", folder]) == 0
    import tensorflow_model_analysis

    (metrics,) = (
        found[""][""] for key, found in tensorflow_model_analysis.load_eval_result(folder, model_name="champion").slicing_metrics if not key
    )
    expected = evaluation(september, SEPTEMBER)["metrics"]["champion"]
    assert metrics["binary_crossentropy"]["doubleValue"] == pytest.approx(expected["log_loss"], rel=1e-6)
    assert metrics["weighted_example_count"]["doubleValue"] == expected["impressions"]


def test_golden_scores_tell_another_model(september: Folder, tmp_path: pathlib.Path) -> None:
    registry.fetch(september, "ranker", pointers(september)[0].ranker, tmp_path / "new")
    assert golden.check(tmp_path / "new") == ""
    old = next(name.split("/")[2] for name in september.names("models/ranker/") if f"/{AUGUST}-" in name)
    registry.fetch(september, "ranker", old, tmp_path / "old")
    shutil.copy(tmp_path / "old" / golden.FILE, tmp_path / "new" / golden.FILE)
    assert re.fullmatch(r"[\d,]+ of 1,000 golden scores are others: the first 0\.\d+, expected 0\.\d+", golden.check(tmp_path / "new"))
    (tmp_path / "new" / golden.FILE).unlink()
    assert golden.check(tmp_path / "new") == f"it has no {golden.FILE}"


def flipped(keys: list[str], clicks: np.ndarray) -> np.ndarray:
    """The other outcome of every impression on a gate key."""
    return np.where(split_of_rows(pa.array(keys), pa.nulls(len(keys), pa.string())) == GATE, 40 - clicks, clicks)


def test_flipping_all_gate_outcomes_changes_nothing_but_the_evaluation(august: Folder, september: Folder, tmp_path: pathlib.Path) -> None:
    other = Folder(str(tmp_path / "lake"))
    deliver(other, AUGUST, flipped)
    assert run(other, AUGUST) == 0
    assert evaluation(other, AUGUST)["metrics"]["candidate"]["clicks"] > 4 * evaluation(august, AUGUST)["metrics"]["candidate"]["clicks"]
    assert trained(other, AUGUST, tmp_path / "0") == trained(august, AUGUST, tmp_path / "1")
    scores = [
        published(storage, "scores").drop_columns(["run_id", "model_version", "encoder_version"]).sort_by("key")
        for storage in (other, august)
    ]
    assert scores[0] == scores[1]
    # A refresh as well, whatever the gate says of it.
    deliver(other, SEPTEMBER, flipped)
    assert run(other, SEPTEMBER) == 0
    assert trained(other, SEPTEMBER, tmp_path / "2") == trained(september, SEPTEMBER, tmp_path / "3")


def trained(storage: Storage, month: str, folder: pathlib.Path) -> dict[str, object]:
    """What is in the files of the encoder and the ranker that a month trained."""
    files: dict[str, object] = {}
    months = {name.split("/")[2] for name in storage.names("models/ranker/")}
    for kind in ("encoder", "ranker"):
        for version in {name.split("/")[2] for name in storage.names(f"models/{kind}/{month}")}:
            registry.fetch(storage, kind, version, folder / kind)
            for path in (folder / kind).rglob("*"):
                # Graphs are left out: they have names that count what the process made before.
                if path.is_file() and "saved_model" not in path.parts:
                    files[path.relative_to(folder).as_posix()] = contents(path, [name.removeprefix(f"{name[:7]}-") for name in months])
    assert "ranker/model.keras" in files and "ranker/golden.arrow" in files
    return files


def contents(path: pathlib.Path, runs: list[str]) -> object:
    if path.suffix == ".keras":
        # HDF5 keeps times and leaves gaps: its arrays are compared.
        weights: dict[str, bytes] = {}
        with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            file.visititems(lambda name, part: weights.update({name: part[()].tobytes()} if isinstance(part, h5py.Dataset) else {}))
            return weights
    # The runs' ids, which the checksums of the months' files are part of, are in names.
    return re.sub(rb'"encoder_digest": "\w+"|' + "|".join(runs).encode(), b"", path.read_bytes())


def counted(month: str, clicks: float, rows: int = 10, device: float = 0.0) -> Counted:
    return Counted(month, rows, {(OVERALL, None): clicks, ("device", "d0"): device}, np.array([len(month)], np.uint64))


@pytest.mark.parametrize(
    ("units", "min_clicks", "months"),
    [
        ([], 100, ()),
        ([counted("2026-10", 100)], 100, ("2026-10",)),
        ([counted("2026-08", 100), counted("2026-09", 60), counted("2026-10", 99)], 100, ("2026-10", "2026-09")),
        ([counted("2026-10", 50), counted("2026-10", 50), counted("2026-09", 99)], 100, ("2026-10",)),
        ([counted("2026-10", 0, rows=0), counted("2026-09", 5), counted("2026-08", 5)], 100, ("2026-09", "2026-08")),
        ([counted("2026-10", 0), counted("2026-09", 5)], 1, ("2026-10", "2026-09")),
    ],
)
def test_earlier_months_are_pooled_while_there_are_too_few_clicks(units: list[Counted], min_clicks: int, months: tuple[str, ...]) -> None:
    random.Random(0).shuffle(units)
    assert make_plan(units, min_clicks).months == months


def test_segments_with_enough_clicks_over_all_units_are_judged() -> None:
    units = [counted("2026-10", 500, device=200), counted("2026-10", 500, device=200), counted("2026-09", 500, device=900)]
    assert make_plan(units, 1000).segments == {("device", "d0")}
    assert make_plan([counted("2026-10", 1000, device=399), units[2]], 1000).segments == frozenset()


def test_rows_are_warm_cold_or_without_a_creative() -> None:
    creatives = pa.array(["seen", None, "new", "seen", ""], pa.string())
    trained = np.unique(hash64_column(pa.array(["seen", "other"])))
    found = {name: rows.tolist() for (name, _), rows in warm_and_cold(creatives, trained)}
    assert found == {WARM: [0, 3], COLD: [2, 4]}
    assert {name: rows.tolist() for (name, _), rows in warm_and_cold(creatives, trained[:0])} == {COLD: [0, 2, 3, 4]}
    assert list(warm_and_cold(pa.nulls(2, pa.string()), trained)) == []


def test_segments_are_the_values_of_the_segment_columns() -> None:
    batch = pa.RecordBatch.from_pydict({"device": pa.array(["a", None, "b", "a"], pa.string()), "slot": list("xxxx")})
    assert [(segment, rows.tolist()) for segment, rows in segments_of(batch, CONTRACT)] == [
        (("device", "a"), [0, 3]),
        (("device", ""), [1]),
        (("device", "b"), [2]),
    ]
    assert list(segments_of(batch.slice(0, 0), CONTRACT)) == []
    assert TRAIN != GATE
