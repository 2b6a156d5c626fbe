"""Planted drift is named, with the right column; undisturbed months are quiet. At full size where ADSTOCRAT_LONG is set."""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from beam_jobs import drift, statistics
from beam_jobs.config import Config
from beam_jobs.drift import CHURN, DRIFT, FAULTS, MISSING
from beam_jobs.run import MonthRun
from beam_jobs.statistics import IMAGES, Sketches
from model import images
from schemas import contract as contracts
from schemas import lake
from schemas import sample as sample_months
from schemas.rows import read_rows
from schemas.sample import write_months
from schemas.storage import Folder, Storage

CONTRACT = contracts.load(contracts.DEFAULT)
LONG = bool(os.environ.get("ADSTOCRAT_LONG"))
ADS, CREATIVES = (200_000, 4_000) if LONG else (20_000, 500)
QUIET_ADS, QUIET_CREATIVES = (50_000, 1_000) if LONG else (3_000, 600)
FIRST, LAST, NOW = "2026-08", "2026-09", "2026-10"
Pictures = dict[str, bytes]


def rows_of(storage: Storage, month: str) -> pa.Table:
    batches = []
    for name in storage.names(lake.raw_ads(month)):
        with storage.open(name) as stream:
            batches += [checked.rows for checked in read_rows(stream, CONTRACT, name)]
    return pa.Table.from_batches(batches).combine_chunks()


def pictures_of(storage: Storage, month: str) -> Pictures:
    prefix = lake.raw_images(month)
    return {name.removeprefix(prefix): storage.read(name) for name in storage.names(prefix)}


def sketched(rows: pa.Table, pictures: Pictures) -> Sketches:
    return sketched_rows(rows) | sketched_images(pictures)


def sketched_rows(rows: pa.Table) -> Sketches:
    half = len(rows) // 2
    return statistics.merged(statistics.of_rows(part, CONTRACT) for part in (rows.slice(0, half), rows.slice(half)))


def sketched_images(pictures: Pictures) -> Sketches:
    looks = []
    for name, data in pictures.items():
        try:
            pixels, status = images.decode(data)
            looks.append((name, len(data), images.aspect(data), float(pixels.mean()) / 255, status))
        except images.ImageFault as fault:
            looks.append((name, len(data), None, None, fault.fault))
    types = (pa.string(), pa.int64(), pa.float32(), pa.float32(), pa.string())
    return statistics.of_images(*(pa.array([look[place] for look in looks], type_) for place, type_ in enumerate(types)))


def found(months: list[Sketches], history: list[drift.Compared]) -> dict:
    """What is ruled of the last of some months, after the comparisons of those before, which `history` has and gets."""
    before, now = months[-2:]
    earlier = list(history)

    def usual(kind: str, column: str, value: str | None) -> list[float]:
        return [c.distance for c in earlier if (c.kind, c.column) == (kind, column) and value in (None, c.value)]

    history += both(before, now, usual)
    return drift.ruled([*history[len(earlier) :], *drift.skew(months[-3:], now, CONTRACT)], ("missing",))


def both(before: Sketches, now: Sketches, usual: drift.Usual) -> list[drift.Compared]:
    """All comparisons of two months but those with what is trained on."""
    return [*drift.compare(before, now, CONTRACT, 0.05, usual), *drift.churn(before, now, CONTRACT, usual)]


def unknown(*_: object) -> list[float]:
    return []


def set_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values.cast(rows.schema.field(name).type))


def where(rows: pa.Table, mask: np.ndarray, name: str, value: object) -> pa.Table:
    kind = rows.schema.field(name).type
    return set_column(rows, name, pc.if_else(pa.array(mask), pa.scalar(value, kind), rows[name].combine_chunks()))


def random_mask(rows: pa.Table, share: float) -> np.ndarray:
    return np.random.default_rng(0).random(len(rows)) < share


def renamed(rows: pa.Table) -> pa.Table:
    return set_column(rows, "format", pc.utf8_upper(rows["format"].combine_chunks()))


def halved(rows: pa.Table) -> pa.Table:
    mobile = pc.equal(rows["device"].combine_chunks(), "mobile")
    clicks = rows["clicks"].combine_chunks()
    fewer = pa.array(np.random.default_rng(0).binomial(pc.fill_null(clicks, 0).to_numpy(), 0.5))
    return set_column(rows, "clicks", pc.if_else(pc.and_(mobile, clicks.is_valid()), fewer, clicks))


def grey(pictures: Pictures) -> Pictures:
    data = io.BytesIO()
    Image.new("RGB", (400, 210), (128, 128, 128)).save(data, "JPEG")
    return dict.fromkeys(pictures, data.getvalue())


def reshaped(pictures: Pictures) -> Pictures:
    out = {}
    for name, data in pictures.items():
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).resize((210, 400)).save(stream, "JPEG")
        out[name] = stream.getvalue()
    return out


def cut(pictures: Pictures) -> Pictures:
    return {name: data[:200] if number % 5 == 0 else data for number, (name, data) in enumerate(pictures.items())}


SCENARIOS: dict[str, tuple[Callable, str, str, str | None]] = {
    "one advertiser takes 20 %": (lambda r, p: (where(r, random_mask(r, 0.2), "advertiser", "adv-big"), p), DRIFT, "advertiser", "adv-big"),
    "a column goes missing": (lambda r, p: (where(r, random_mask(r, 1.1), "campaign", None), p), MISSING, "campaign", None),
    "units x 100": (lambda r, p: (set_column(r, "bid", pc.multiply(r["bid"].combine_chunks(), 100)), p), DRIFT, "bid", None),
    "categories renamed": (lambda r, p: (renamed(r), p), DRIFT, "format", None),
    "images all grey": (lambda r, p: (r, grey(p)), DRIFT, "image", "brightness"),
    "positions swapped": (
        lambda r, p: (set_column(r, "position", pc.subtract(7, r["position"].combine_chunks())), p),
        DRIFT,
        "position",
        None,
    ),
    "clicks halved in one segment": (lambda r, p: (halved(r), p), DRIFT, "clicks", "device=mobile"),
    "half of a file": (lambda r, p: (r.slice(0, 3 * len(r) // 4), p), CHURN, "ad_id", "rows"),
    "a device is gone": (lambda r, p: (r.filter(pc.not_equal(r["device"], "tablet")), p), DRIFT, "device", "tablet"),
    "hours in another time zone": (
        lambda r, p: (set_column(r, "hour", pa.array((r["hour"].to_numpy() + 8) % 24)), p),
        DRIFT,
        "hour",
        None,
    ),
    "a fifth of the images cut": (lambda r, p: (r, cut(p)), FAULTS, "image", None),
    "images upright": (lambda r, p: (r, reshaped(p)), DRIFT, "image", "aspect"),
    "half of the images not delivered": (lambda r, p: (r, dict(list(p.items())[::2])), FAULTS, "image", "missing"),
    "other keys for most ads": (
        lambda r, p: (set_column(r, "key", pc.binary_join_element_wise("new", r["key"].combine_chunks(), "-")), p),
        CHURN,
        "ad_id",
        "new",
    ),
}


Sample = tuple[list[Sketches], pa.Table, Pictures]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Sketches of three months as they were, and the rows and pictures of the third."""
    storage, months = Folder(str(tmp_path_factory.mktemp("sample"))), (FIRST, LAST, NOW)
    write_months(storage, months, ADS, CREATIVES, 0, lambda line: None)
    delivered = [(rows_of(storage, month), pictures_of(storage, month)) for month in months]
    return [sketched(*month) for month in delivered], *delivered[-1]


def first_lines(tmp_path: pathlib.Path, document: dict) -> list[str]:
    run = MonthRun(Folder(str(tmp_path)), CONTRACT, Config(lake=str(tmp_path)), NOW, "r", (), None, None)
    run.storage.write_json(f"{run.folder}/drift.json", {"previous": LAST, **document})
    return drift.headlines(run)


def test_an_undisturbed_month_is_quiet(sample: Sample, tmp_path: pathlib.Path) -> None:
    months, _, _ = sample
    document = found(months, both(*months[:2], unknown))
    assert first_lines(tmp_path, document) == []
    assert len(document["compared"]) > 50 and not any(row["alarm"] for row in document["compared"])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_planted_drift_is_named_in_the_first_lines(sample: Sample, tmp_path: pathlib.Path, scenario: str) -> None:
    months, rows, pictures = sample
    plant, kind, column, value = SCENARIOS[scenario]
    planted, shown = plant(rows, pictures)
    parts = (months[-1] if planted is rows else sketched_rows(planted), months[-1] if shown is pictures else sketched_images(shown))
    now = {
        key: sketch
        for part, of_images in zip(parts, (False, True), strict=True)
        for key, sketch in part.items()
        if (key[0] == IMAGES) == of_images
    }
    document = found([*months[:2], now], both(*months[:2], unknown))
    alarms = [row for row in document["compared"] if row["alarm"]]
    assert [row["sentence"] for row in alarms] == document["alarms"]
    named = [place for place, row in enumerate(alarms) if (row["kind"], row["column"]) == (kind, column) and value in (None, row["value"])]
    assert named and named[0] < 3
    row = alarms[named[0]]
    assert row["distance"] > row["threshold"] and row["action"] == ("stop" if kind == MISSING else "warn")
    lines = first_lines(tmp_path, document)[:3]
    assert any(line.startswith(f"{kind} {column}") for line in lines)


def test_embeddings_that_moved_or_are_far_from_any_seen_are_named() -> None:
    rng = np.random.default_rng(0)

    def month(first: int, moved: float = 0.0, odd: float = 0.0) -> dict[str, np.ndarray]:
        """1,000 creatives from that number on: in groups, as pictures are, some of the last 250 of a kind of their own."""
        centres = np.random.default_rng(1).standard_normal((8, 32))
        made = {
            f"c{n}": (centres[n % 8] + 0.3 * np.random.default_rng(n).standard_normal(32)).astype(np.float32)
            for n in range(first, first + 1000)
        }
        fresh = [name for name in made if int(name[1:]) >= 1000]
        for name in fresh:
            made[name] += 4 * (rng.random() < odd) * np.eye(1, 32, 3, np.float32)[0]
        return {name: (vector + moved).astype(np.float32) for name, vector in made.items()}

    def alarms(now: dict[str, np.ndarray]) -> list[tuple[str, str]]:
        rows = drift.ruled(list(drift.embeddings("image", month(0), now)), ())["compared"]
        assert {(row["kind"], row["column"], row["value"]) for row in rows} == {
            (drift.EMBEDDING, "image", value) for value in ("mean", "far")
        }
        return [row["value"] for row in rows if row["alarm"]]

    assert alarms(month(250)) == []
    assert "mean" in alarms(month(250, moved=0.3)) and alarms(month(250, odd=0.2)) == ["far"]
    assert list(drift.embeddings("image", {}, month(0))) == []


def test_48_undisturbed_months_are_quiet(tmp_path: pathlib.Path) -> None:
    storage, alarms = Folder(str(tmp_path)), list[tuple[str, str]]()
    months, history = list[Sketches](), list[drift.Compared]()
    names = lake.months_between("2023-01", "2026-12")
    with contextlib.nullcontext() if LONG else mock.patch.object(sample_months, "write_pictures", lambda *_: []):
        write_months(storage, names, QUIET_ADS, QUIET_CREATIVES, 1, lambda line: None)
    for month in names:
        months = [*months[-2:], sketched(rows_of(storage, month), pictures_of(storage, month))]
        if len(months) > 1:
            alarms += [(month, sentence) for sentence in found(months, history)["alarms"]]
    print(*alarms, sep="\n")
    assert len(alarms) <= 2
