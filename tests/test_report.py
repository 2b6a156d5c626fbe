"""The page of a run: what it says, and how it looks and behaves in a real browser."""

import html
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import browser as browsers
import numpy as np
import pyarrow as pa
import pytest
import reported
from playwright.sync_api import Browser, Page, expect
from reported import HOSTILE, LAST, THIS, World

from beam_jobs import month as months
from beam_jobs import plots, report, report_scores, statistics
from beam_jobs.cli import main
from beam_jobs.report_sections import panels
from beam_jobs.run import MonthRun, StageError
from schemas import lake

LONG = bool(os.environ.get("ADSTOCRAT_LONG"))
ROWS = 4000
SECTIONS = ["rows", "gate", "scores", "moved", "creatives", "evidence", "faults", "drift", "realised", "stages", "lineage"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return reported.world(tmp_path_factory.mktemp("reported"), ROWS)


@pytest.fixture(scope="module")
def runs(world: World) -> tuple[MonthRun, MonthRun]:
    """Two published months with pages, drift and realised quality found in the second."""
    last, this = world.make(LAST), world.make(THIS)
    world.watched(this)
    report.write(last)
    report.write(this)
    return last, this


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    yield from browsers.started(browsers.install())


def path_of(world: World, name: str) -> pathlib.Path:
    return pathlib.Path(world.config.lake) / name


def page_of(world: World, run: MonthRun) -> str:
    return path_of(world, f"{run.folder}/report.html").read_text()


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def opened(chromium: Browser, path: pathlib.Path, width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
    """The page, and whatever it did that it should not have."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light")
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url == path.as_uri() else wrong.append(request.url[:100]))
    page.goto(path.as_uri())
    return page, [entry for entry in wrong if not entry.startswith("data:")]


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
@pytest.mark.parametrize("which", ["report", "index"])
def test_the_pages_in_a_browser(
    world: World, runs: tuple[MonthRun, MonthRun], chromium: Browser, tmp_path: pathlib.Path, which: str, width: int, scheme: str
) -> None:
    path = path_of(world, report.INDEX if which == "index" else f"{runs[1].folder}/report.html")
    page, wrong = opened(chromium, path, width, scheme)
    page.screenshot(path=tmp_path / f"{which}-{width}-{scheme}.png", full_page=LONG)
    if LONG or (width == 390) == (scheme == "light"):
        # By the debugger, as the page itself lets no other script run.
        found = page.evaluate((browsers.install() / "axe.min.js").read_text() + "; axe.run()")
        assert len(found["passes"]) > 15
        assert [rule["id"] for rule in found["violations"] if rule["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    assert "taken" not in page.title() and page.locator("img[src=x]").count() == 0 and page.locator("script").count() == 1
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    for chart in page.locator("svg").all():
        assert chart.get_attribute("role") == "img" and len(chart.get_attribute("aria-label") or "") > 40
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    assert wrong == []
    page.context.close()


def test_text_from_rows_is_shown_as_text(world: World, runs: tuple[MonthRun, MonthRun], chromium: Browser) -> None:
    page, _ = opened(chromium, path_of(world, f"{runs[1].folder}/report.html"))
    for where in ("header", "#gate", "#moved", "#creatives", "#faults", "#drift", "#realised", "#lineage"):
        shown = page.locator(where).inner_text()
        assert HOSTILE.replace("/", "" if where == "#lineage" else "/")[:60] in shown, where
    missing = [row for row in page.locator("#faults tr").all_inner_texts() if row.endswith("missing") and ", of the ad " in row]
    assert len(missing) == 6 and all(".jpg" in row for row in missing)
    # In charts too, cut where they are long; from the statistics of both months, where there are such.
    drawn = page.locator("#drift svg text").all_text_contents()
    assert f"{HOSTILE[:9]}…" in drawn and "adv1" in drawn and "! advertiser" in drawn and "median" in drawn
    page.locator("#drift details summary").first.click()
    numbers = [row.split() for row in page.locator("#drift details tr").all_inner_texts()]
    assert ["advertiser", "adv1", "0.3", "0.3"] in numbers and ["c1", "50%", "are", "below", "10", "10"] in numbers
    page.context.close()


def test_tables_sort_by_number_and_by_text(world: World, runs: tuple[MonthRun, MonthRun], chromium: Browser) -> None:
    page, _ = opened(chromium, path_of(world, f"{runs[1].folder}/report.html"))
    table = page.locator("#moved table").nth(2)
    for column in (3, 0):
        head = table.locator("th").nth(column)
        for order in ("ascending", "descending"):
            head.get_by_role("button").click()
            expect(head).to_have_attribute("aria-sort", order)
            cells = table.locator(f"tbody td:nth-child({column + 1})").all_text_contents()
            values = [float(cell.rstrip("%")) for cell in cells] if column else [cell.strip().lower() for cell in cells]
            if column:
                assert values == sorted(values, reverse=order == "descending") and len(set(values)) > 3
            else:
                assert (values[0] <= values[-1]) == (order == "ascending")
    page.context.close()


def test_it_prints_and_every_section_is_there_in_its_order(world: World, runs: tuple[MonthRun, MonthRun], chromium: Browser) -> None:
    page, _ = opened(chromium, path_of(world, f"{runs[1].folder}/report.html"))
    assert page.evaluate("[...document.querySelectorAll('section')].map((each) => each.id)") == SECTIONS
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    page.context.close()


def test_what_changed_comes_first(world: World, runs: tuple[MonthRun, MonthRun], capsys: pytest.CaptureFixture[str]) -> None:
    alarm, judged = world.watched(runs[1])
    page = page_of(world, runs[1])
    words = " ".join(text_of(page[page.index("<body") :]).split())
    verdict = f"{THIS} is published: {ROWS:,} ads are scored by a new model, which the gate let take the champion's place."
    assert words.startswith(" ".join(f"{THIS} run {runs[1].id} {verdict} {alarm} realised warn: {judged} Ads scored {ROWS:,}".split()))
    assert main(["report", runs[1].id, "--lake", world.config.lake]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [verdict, f"  ! {alarm}", f"  ! realised warn: {judged}"] and "\x1b" not in "".join(shown)


def test_the_numbers_are_what_plain_code_computes(world: World, runs: tuple[MonthRun, MonthRun]) -> None:
    last, this = world.columns(LAST), world.columns(THIS)
    before = report_scores.read(runs[0])
    assert before
    month = report_scores.read(runs[1], before)
    assert month and month.moved
    moved = month.moved
    assert (month.rows, moved.both, moved.new, moved.gone) == (ROWS, ROWS * 9 // 10, ROWS // 10, ROWS // 10)
    assert month.mean == pytest.approx(this["p"].mean()) and month.histogram.sum() == ROWS
    was = dict(zip(last["number"], last["p"], strict=True))
    changes = sorted((p - was[n], n, p) for n, p in zip(this["number"], this["p"], strict=True) if n in was)
    assert [row["p_click"] for row in moved.down] == [p for _, _, p in changes[:8]]
    assert [row["p_click"] for row in moved.up] == [p for _, _, p in changes[::-1][:8]]
    assert [row["before"] for row in moved.up] == [was[n] for _, n, _ in changes[::-1][:8]]
    means = {v: (this["p"][this["number"] % 51 == v].mean(), last["p"][last["number"] % 51 == v].mean()) for v in range(51)}
    top = moved.groups["advertiser"]
    most = max(means.values(), key=lambda pair: abs(pair[0] - pair[1]))
    assert (top[0]["mean"], top[0]["before"]) == pytest.approx(most) and len(top) == 16
    shown = this["number"] % 50 != 0
    by_creative = {
        c: this["p"][shown & (this["creative"] == c)].mean() for c in range(world.creatives) if (shown & (this["creative"] == c)).any()
    }
    known = sorted(mean for c, mean in by_creative.items() if 7 * c % 401 >= report_scores.LOW_EVIDENCE)
    galleries = report_scores.galleries(month.creatives)
    assert [row["mean"] for row in galleries["worst"]] == pytest.approx(known[:12])
    assert [row["mean"] for row in galleries["best"]] == pytest.approx(known[::-1][:12])
    classes = np.digitize(this["evidence_key"], [1, report_scores.LOW_EVIDENCE])
    assert month.evidence[:, 0].tolist() == [(classes == c).sum() for c in range(3)]
    assert month.evidence[:, 1] == pytest.approx([this["p"][classes == c].sum() for c in range(3)])


def test_of_a_large_month_a_share_of_the_keys_is_compared(
    world: World, runs: tuple[MonthRun, MonthRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_scores, "_KEYS_HELD", ROWS // 4)
    before = report_scores.read(runs[0])
    assert before and before.step == 4 and ROWS / 8 < len(before.hashes) < ROWS / 2
    found = report_scores.read(runs[1], before)
    assert found and found.moved
    assert found.moved.both + found.moved.gone == len(before.hashes) and found.moved.both > 5 * found.moved.new
    assert found.histogram.sum() == ROWS


def test_without_a_month_before_it_says_so(world: World, runs: tuple[MonthRun, MonthRun]) -> None:
    page = text_of(page_of(world, runs[0]))
    assert "There is no earlier month to compare with." in page and page.count("Not compared yet") == 2 and "no month before" in page


def test_a_month_without_outcomes_or_a_month_before_is_not_judged(tmp_path: pathlib.Path) -> None:
    """What is written of drift and of realised quality where there is nothing to compare with."""
    world = reported.world(tmp_path, 500)
    run = world.make(THIS)
    for name, told in (
        ("drift", {"previous": None, "compared": [], "alarms": []}),
        ("realised", {"month": None, "run": None, "matched_share": 0.0, "unmatched": {}, "rows": [], "verdict": "no run", "action": "ok"}),
        ("shift", {"sentence": f"mean p_click {HOSTILE}"}),
    ):
        world.storage.write(f"{run.folder}/{name}.json", json.dumps(told).encode())
    summary, page = report.write(run), text_of(page_of(world, run))
    assert summary.alarms == [] and summary.numbers[3].note.startswith("on gate rows")
    assert "Not judged: no run." in page and f"Mean p_click {HOSTILE}." in page
    assert "Not compared yet" in path_of(world, report.INDEX).read_text()


def test_the_page_tells_kept_replaced_stopped_and_unfinished(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = reported.world(tmp_path, 500)
    kept = world.make(LAST, promoted=False)
    assert report.write(kept).verdict == (
        f"{LAST} is published: 500 ads are scored by the champion, which was kept because normalized entropy +2 % {HOSTILE} (9 rows)."
    )
    told = report.stopped(kept, "publish", StageError(f"audit mean refused {HOSTILE}."))
    assert (told.status, told.verdict) == (
        report.STOPPED,
        f"{LAST} is not published: stopped at publish, because audit mean refused {HOSTILE}.",
    )
    assert "<img src=x" not in page_of(world, kept)
    world.publish(kept)
    assert report.write(kept).status == report.KEPT
    report.stopped(kept, "score", StageError("why"))
    report.went_on(kept)
    assert report.write(kept).status == report.KEPT
    begun = world.make(THIS, publish=False)
    assert report.write(begun).status == report.UNFINISHED
    world.publish(begun)
    world.storage.write(lake.raw_ads(THIS) + "late.csv", b"id,advertiser,device,image,impressions,clicks\nlate,a,b,,1,0\n")
    late = world.make(THIS)
    assert report.write(begun).verdict.endswith(f"and later by {late.id}.")
    report.write(late)
    capsys.readouterr()
    assert main(["runs", "--lake", world.config.lake, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(run["run"], run["served"]) for run in listed if run["month"] == THIS and run["served"]] == [(late.id, True)]
    index = text_of(path_of(world, report.INDEX).read_text())
    assert f"Current is {THIS}, run {late.id}." in index and "replaced" in index and "current" in index


def test_a_month_that_is_stopped_leaves_a_page_that_says_why(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = reported.world(tmp_path, 500)
    rows = "".join(f"k{i},a,b,,{HOSTILE[:8] if i % 2 else 1},0\n" for i in range(40))
    world.storage.write(lake.raw_ads(THIS) + "ads.csv", f"id,advertiser,device,image,impressions,clicks\n{rows}".encode())
    flags = ["--lake", world.config.lake, "--contract", str(world.config.contract)]
    assert main(["month", THIS, *flags, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "stopped" and "20 of 40 rows of 2026-10 were rejected, 50.00%" in told["verdict"]
    page = text_of(pathlib.Path(told["report"]).read_text())
    assert told["verdict"] in page and "20 rejected: " in page and "Nothing is scored." in page and HOSTILE[:8] in page


def test_the_time_that_is_left_is_told_by_the_month_before(tmp_path: pathlib.Path) -> None:
    world = reported.world(tmp_path, 500)
    last = world.make(LAST)
    assert months._expected(world.make(THIS, publish=False)) == {}
    ledger = {"used": {"ingest": {"seconds": 4.0}, "creatives-packs": {"seconds": 2.0}, "creatives-index": {"seconds": 1.5}}}
    world.storage.write(f"{last.folder}/ledger.json", json.dumps(ledger).encode())
    assert months._expected(world.make(THIS, publish=False)) == {"ingest": 4.0, "creatives": 3.5}


@pytest.mark.parametrize("command", ["runs", "models", "status", "gc", "show", "report", "month"])
def test_what_reports_reports_in_json_too(
    world: World, runs: tuple[MonthRun, MonthRun], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    first = {"show": [runs[1].id], "report": [runs[1].id], "month": [THIS, "--plan"], "gc": ["--keep", "9", "--dry-run"]}.get(command, [])
    more = ["--contract", str(world.config.contract)] if command in ("month", "status") else []
    status = main([command, *first, "--lake", world.config.lake, *more, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told and status == (3 if command == "status" else 0)


def test_the_page_opens(world: World, runs: tuple[MonthRun, MonthRun], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    opened = list[str]()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", runs[1].id, "--lake", world.config.lake, "--open"]) == 0
    (shown,) = tmp_path.glob("*/report.html")
    assert opened == [shown.as_uri()] and shown.read_bytes() == path_of(world, f"{runs[1].folder}/report.html").read_bytes()


@pytest.mark.alone
def test_a_report_is_made_and_opens_quickly(chromium: Browser, tmp_path: pathlib.Path) -> None:
    """A month of 1 M rows: in 20 s, in 6 MB, and open in 2 s."""
    world = reported.world(tmp_path, 1_000_000 if LONG else 20_000)
    world.make(LAST)
    run = world.make(THIS)
    world.watched(run)
    started = time.monotonic()
    command = [sys.executable, "-m", "beam_jobs.cli", "report", run.id, "--lake", world.config.lake]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    made = time.monotonic() - started
    path = path_of(world, f"{run.folder}/report.html")
    page = chromium.new_page()
    started = time.monotonic()
    page.goto(path.as_uri())
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    opens = time.monotonic() - started
    page.close()
    print(f"{world.rows:,} rows: made in {made:.1f} s, {path.stat().st_size / 1e6:.2f} MB, open in {opens:.2f} s")
    assert (made < 20 or not LONG) and path.stat().st_size < 6e6 and opens < 2


def test_a_property_of_images_that_one_month_alone_tells_is_drawn_as_the_comparison_tells_it() -> None:
    row = {"kind": "drift", "column": "image", "value": "size", "last": 0.1, "this": 0.4, "alarm": True}
    known = {("image", "size"): statistics.of_column(pa.array(np.arange(21.0)), categorical=False)}
    for last, this in (({}, known), (known, {})):
        assert panels([row], last, this) == [plots.Panel("image", ["size"], [0.1], [0.4], True)]
