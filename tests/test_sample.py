"""The sample months are as hard as they are said to be, and the same for the same arguments."""

import hashlib
import io
import itertools
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from schemas import lake
from schemas.sample import POSITION_EFFECTS, PROPERTIES, write_months
from schemas.sample_images import HEIGHT, WIDTH, Picture, draw
from schemas.storage import Storage, open_storage

MONTHS = ("2026-08", "2026-09")
COLUMNS = "ad_id,advertiser,campaign,format,placement,device,hour,bid,position,image,impressions,clicks"


def quiet(_: str) -> None:
    pass


def digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file by its path in the folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_rows(storage: Storage, month: str) -> pa.Table:
    return pa.concat_tables(pyarrow.csv.read_csv(io.BytesIO(storage.read(name))) for name in storage.names(lake.raw_ads(month)))


def read_parquet(storage: Storage, name: str) -> dict[str, np.ndarray]:
    table = pq.read_table(io.BytesIO(storage.read(name)))
    return {column: table[column].to_numpy() for column in table.column_names}


def pairs(columns: dict[str, np.ndarray], one: str, other: str) -> set[tuple]:
    return set(zip(columns[one], columns[other], strict=True))


class Month:
    """A month as it was written, with columns as arrays; n and p are impressions and click probabilities."""

    def __init__(self, storage: Storage, month: str) -> None:
        self.table = read_rows(storage, month)
        self.rows = {name: self.table[name].to_numpy() for name in self.table.column_names}
        self.truth = read_parquet(storage, lake.truth(month))
        self.creatives = read_parquet(storage, f"truth/creatives-{month}.parquet")
        self.images = [name.rpartition("/")[2] for name in storage.names(lake.raw_images(month))]
        self.n, self.p, self.reference = (self.truth[name] for name in ("impressions", "p_click", "p_click_reference"))


# The pinned difficulty, at 120,000 rows and 5,000 creatives.


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(str(tmp_path_factory.mktemp("sample")))
    write_months(storage, MONTHS, 120_000, 5_000, 7, quiet)
    return storage


@pytest.fixture(scope="module")
def written(storage: Storage) -> dict[str, Month]:
    return {month: Month(storage, month) for month in MONTHS}


@pytest.fixture(params=MONTHS)
def month(request: pytest.FixtureRequest, written: dict[str, Month]) -> Month:
    return written[request.param]


def log_odds(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def test_click_rate_is_two_percent(written: dict[str, Month]) -> None:
    rates = [np.average(month.p, weights=month.n) for month in written.values()]
    assert rates[0] == pytest.approx(0.02, rel=0.02)
    assert np.diff(log_odds(np.array(rates)))[0] == pytest.approx(0, abs=0.13)  # the month's shift, and who came and went
    for month in written.values():
        labelled = month.table["clicks"].is_valid().to_numpy()
        observed = np.nansum(month.rows["clicks"]) / np.nansum(month.rows["impressions"])
        expected = np.average(month.p[labelled], weights=month.n[labelled])
        assert observed == pytest.approx(expected, rel=0.04)


def test_log_odds_have_the_planted_variance(month: Month) -> None:
    reference = log_odds(month.reference)
    assert reference.std() == pytest.approx(1, abs=0.05)
    parts = {name: month.truth[name] for name in ("columns", "visible", "interaction", "invisible")}
    np.testing.assert_allclose(sum(parts.values()), reference, atol=1e-9)
    creative = reference - parts["columns"]
    assert creative.var() / reference.var() == pytest.approx(1 / 3, abs=0.03)
    assert parts["invisible"].var() / creative.var() == pytest.approx(0.2, abs=0.03)
    assert parts["interaction"].var() / creative.var() == pytest.approx(0.1, abs=0.02)


def test_impressions_are_few_with_a_heavy_tail(month: Month) -> None:
    assert month.n.mean() == pytest.approx(8, abs=0.5)
    assert np.median(month.n) <= 5
    assert np.quantile(month.n, 0.999) > 100
    assert 0 < (month.n == 0).mean() < 0.2


def test_a_tenth_is_unlabelled(month: Month) -> None:
    valid = [month.table[name].is_valid().to_numpy() for name in ("impressions", "clicks")]
    np.testing.assert_array_equal(*valid)
    assert valid[0].mean() == pytest.approx(0.9, abs=1e-4)
    np.testing.assert_array_equal(month.rows["impressions"][valid[0]], month.n[valid[0]])
    assert (month.rows["clicks"][valid[0]] <= month.rows["impressions"][valid[0]]).all()


def test_population_is_large_and_uneven(month: Month) -> None:
    _, rows = np.unique(month.rows["image"], return_counts=True)
    assert len(rows) == 5_000
    assert 1_000 <= rows.sum() ** 2 / (rows**2).sum() <= 2_500
    assert rows.max() > 10 * rows.mean()
    assert len(set(month.rows["advertiser"])) >= 300
    assert len(set(month.rows["campaign"])) >= 1_000
    assert len(set(month.rows["placement"])) >= 40
    assert len(set(month.rows["ad_id"])) == 120_000
    assert len(pairs(month.rows, "campaign", "advertiser")) == len(set(month.rows["campaign"]))


def test_months_turn_over(written: dict[str, Month]) -> None:
    first, second = (month.rows for month in written.values())
    for column, share in {"image": 0.25, "advertiser": 0.05, "ad_id": 0.30}.items():
        new = set(second[column]) - set(first[column])
        assert len(new) / len(set(second[column])) == pytest.approx(share, abs=0.01)
    assert len(pairs(first, "ad_id", "image") & pairs(second, "ad_id", "image")) == len(set(first["ad_id"]) & set(second["ad_id"]))


def test_staying_creatives_stay_the_same(storage: Storage, written: dict[str, Month]) -> None:
    first, second = written.values()
    both = sorted(set(first.images) & set(second.images))
    assert len(both) > 3_500
    for name in both[::50]:
        assert len({storage.read(lake.raw_images(month) + name) for month in MONTHS}) == 1
    for effect in ("visible", "invisible"):
        assert len(pairs(first.creatives, "name", effect) & pairs(second.creatives, "name", effect)) == 3_750


def test_two_percent_of_images_are_missing(month: Month) -> None:
    missing = set(month.rows["image"]) - set(month.images)
    assert len(missing) / 5_000 == pytest.approx(0.02, abs=0.005)
    assert set(month.images) <= set(month.rows["image"])
    assert missing == set(month.creatives["name"][~month.creatives["delivered"]])


def test_position_depends_on_bid_and_quality_and_lowers_clicks(month: Month) -> None:
    position = month.rows["position"]
    assert set(position) == {1, 2, 3, 4, 5, 6}
    for column in (month.rows["bid"], log_odds(month.reference)):
        assert np.corrcoef(position, column)[0, 1] < -0.2
    np.testing.assert_allclose(log_odds(month.p) - log_odds(month.reference), np.array(POSITION_EFFECTS)[position - 1], atol=1e-9)


def test_columns_alone_explain_at_most_three_quarters(month: Month) -> None:
    names = ("advertiser", "campaign", "format", "placement", "device", "hour", "position")
    codes = [np.unique(month.rows[name], return_inverse=True)[1] for name in names]
    codes.append(np.searchsorted(np.quantile(month.rows["bid"], np.arange(0.05, 1, 0.05)), month.rows["bid"]))
    fold = np.random.default_rng(0).integers(0, 10, 120_000)
    train = (fold < 8) & month.table["clicks"].is_valid().to_numpy()
    impressions, clicks = (np.where(train, np.nan_to_num(month.rows[name]), 0) for name in ("impressions", "clicks"))

    def explained(predicted: np.ndarray, rows: np.ndarray) -> float:
        p, q, n = month.p[rows], predicted[rows], month.n[rows]
        base = np.average(p, weights=n)
        return 1 - (n * divergence(p, q)).sum() / (n * divergence(p, base)).sum()

    models = [logistic_regression(codes, impressions, clicks, penalty) for penalty in (1, 3, 10, 30, 100)]
    tuned = max(models, key=lambda predicted: explained(predicted, fold == 8))
    assert 0.5 <= explained(tuned, fold == 9) <= 0.75


def divergence(p: np.ndarray, q: np.ndarray | float) -> np.ndarray:
    """Kullback-Leibler divergence of coins, in nats."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def logistic_regression(codes: list[np.ndarray], impressions: np.ndarray, clicks: np.ndarray, penalty: float) -> np.ndarray:
    """Predicted probabilities of a one-hot model with an L2 penalty, fitted one column at a time by Newton steps."""
    eta = np.full(len(clicks), log_odds(clicks.sum() / impressions.sum()))
    weights = [np.zeros(code.max() + 1) for code in codes]
    for _, (code, weight) in itertools.product(range(25), list(zip(codes, weights, strict=True))):
        p = 1 / (1 + np.exp(-eta))
        gradient = np.bincount(code, clicks - impressions * p, len(weight)) - penalty * weight
        step = gradient / (np.bincount(code, impressions * p * (1 - p), len(weight)) + penalty)
        np.add(weight, step, out=weight)
        eta += step[code]
    return 1 / (1 + np.exp(-eta))


def test_colours_say_little_of_the_visible_effect(storage: Storage, written: dict[str, Month]) -> None:
    month = written[MONTHS[0]]
    delivered = month.creatives["delivered"]
    visible = month.creatives["visible"][delivered]
    names = month.creatives["name"][delivered]
    colours = np.array([colour_statistics(storage.read(lake.raw_images(MONTHS[0]) + name)) for name in names])
    planted = np.stack([month.creatives[name][delivered] for name in (*PROPERTIES, "warmth")], axis=1)
    by_planted = ridge(planted, visible)
    assert by_planted > 0.95
    assert ridge(colours, visible) <= 0.35 * by_planted


def colour_statistics(data: bytes) -> np.ndarray:
    """Mean, deviation and histogram (16 bins) by channel, and a 4 x 4 thumbnail: shape (102,)."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (WIDTH // 2, HEIGHT // 2))
    pixels = np.asarray(image)
    thumbnail = np.asarray(image.resize((4, 4), Image.Resampling.BOX)).ravel() / 255
    histograms = [np.bincount(pixels[..., channel].ravel() >> 4, minlength=16) / pixels[..., 0].size for channel in range(3)]
    return np.concatenate([pixels.mean((0, 1)) / 255, pixels.std((0, 1)) / 255, *histograms, thumbnail])


def ridge(inputs: np.ndarray, target: np.ndarray) -> float:
    """Share of the target's variance that a ridge regression explains in the last fifth, which it was not fitted to; the best penalty's."""
    train = np.arange(len(target)) < 0.8 * len(target)
    scaled = (inputs - inputs[train].mean(0)) / (inputs[train].std(0) + 1e-9)
    centred = target - target[train].mean()
    gram, moments = scaled[train].T @ scaled[train], scaled[train].T @ centred[train]
    errors = [
        centred[~train] - scaled[~train] @ np.linalg.solve(gram + penalty * np.eye(len(gram)), moments) for penalty in (1, 10, 100, 1000)
    ]
    return 1 - min((error**2).mean() for error in errors) / centred[~train].var()


# The same for the same arguments, and nothing overwritten.


def test_files_are_as_delivered_by_an_agency(tmp_path: pathlib.Path) -> None:
    storage = open_storage(str(tmp_path))
    lines: list[str] = []
    write_months(storage, ["2026-01"], 300, 60, 1, lines.append)
    names = storage.names("")
    assert storage.names(lake.raw_ads("2026-01")) == [f"raw/2026-01/ads/ads-0000{i}-of-00002.csv" for i in range(2)]
    assert len(storage.names(lake.raw_images("2026-01"))) == 59
    assert {name for name in names if not name.startswith("raw/")} == {
        "truth/2026-01.parquet",
        "truth/creatives-2026-01.parquet",
        "truth/sample-2026-01.json",
    }
    assert storage.read("raw/2026-01/ads/ads-00000-of-00002.csv").decode().splitlines()[0] == COLUMNS
    assert read_rows(storage, "2026-01").num_rows == 300
    assert lines == ["2026-01: 300 rows, 59 images"]


def test_same_arguments_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    for folder, months, seed in [("a", 3, 5), ("b", 3, 5), ("shorter", 2, 5), ("other", 1, 6)]:
        write_months(open_storage(str(tmp_path / folder)), ["2026-11", "2026-12", "2027-01"][:months], 400, 40, seed, quiet)
    a, b, shorter, other = (digests(tmp_path / folder) for folder in ("a", "b", "shorter", "other"))
    assert a == b
    assert shorter == {name: digest for name, digest in a.items() if "2027-01" not in name}
    assert other["truth/2026-11.parquet"] != a["truth/2026-11.parquet"]


@pytest.mark.parametrize(("ads", "creatives"), [(20, 20), (100, 99), (1000, 20)])
def test_small_months_name_every_creative(tmp_path: pathlib.Path, ads: int, creatives: int) -> None:
    storage = open_storage(str(tmp_path))
    months = lake.months_between("2026-01", "2026-06")
    write_months(storage, months, ads, creatives, 2, quiet)
    for month in months:
        rows = read_rows(storage, month).to_pydict()
        assert len(rows["ad_id"]) == len(set(rows["ad_id"])) == ads
        assert len(set(rows["image"])) == creatives


def test_a_written_month_is_left_alone_and_later_ones_added(tmp_path: pathlib.Path) -> None:
    storage = open_storage(str(tmp_path))
    write_months(storage, ["2026-01"], 100, 20, 1, quiet)
    before = digests(tmp_path)
    lines: list[str] = []
    write_months(storage, ["2026-01", "2026-02"], 100, 20, 1, lines.append)
    assert lines[0] == "2026-01: already there"
    assert before.items() <= digests(tmp_path).items()
    fresh = open_storage(str(tmp_path / "fresh"))
    write_months(fresh, ["2026-01", "2026-02"], 100, 20, 1, quiet)
    assert fresh.read(lake.truth("2026-02")) == storage.read(lake.truth("2026-02"))


@pytest.mark.parametrize("change", ["seed", "file added", "file lost", "no record", "no truth"])
def test_anything_else_is_not_overwritten(tmp_path: pathlib.Path, change: str) -> None:
    storage = open_storage(str(tmp_path))
    write_months(storage, ["2026-01"], 100, 20, 1, quiet)
    if change == "file added":
        storage.write("raw/2026-01/ads/late.csv", b"")
    elif change != "seed":
        lost = {"file lost": storage.names("raw/")[-1], "no record": "truth/sample-2026-01.json", "no truth": lake.truth("2026-01")}
        (tmp_path / lost[change]).unlink()
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"raw/2026-01/? holds"):
        write_months(storage, ["2025-12", "2026-01"] if change == "seed" else ["2026-01"], 100, 20, 1, quiet)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("months", "ads", "creatives", "seed", "message"),
    [
        (["2026-13"], 100, 20, 1, "2026-13"),
        ([], 100, 20, 1, "empty"),
        (["2026-02", "2026-01"], 100, 20, 1, "out of order"),
        (["2026-01", "2026-01"], 100, 20, 1, "each once"),
        (["2026-01"], 100, 101, 1, "101 creatives for 100 ads"),
        (["2026-01"], 100, 19, 1, "at least 20"),
        (["2026-01"], 100, 20, -1, "seed -1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: pathlib.Path, months: list[str], ads: int, creatives: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_months(open_storage(str(tmp_path)), months, ads, creatives, seed, quiet)
    assert not digests(tmp_path)


def test_a_picture_is_a_jpeg_of_its_properties() -> None:
    plain = Picture("plain.jpg", 3, False, False, 0, 0, 0.5)
    assert draw(plain) == draw(plain)
    pictures = [plain, *(plain._replace(**{name: value}) for name, value in [("face", True), ("call_to_action", True), ("text", 2)])]
    drawn = {draw(picture) for picture in pictures}
    assert len(drawn) == 4
    assert {Image.open(io.BytesIO(data)).size for data in drawn} == {(WIDTH, HEIGHT)}
