"""Whole months: the second beside the first, how the stages grow with rows and with creatives, and one of 10 M rows.

    scripts/bench month [-- --only again,rows,creatives,whole --work FOLDER]

Each stage runs in a process of its own, which tells its seconds (without Python's imports) and whose memory is looked at from outside.
What starting takes of them, TensorFlow and the runner, is what each stage takes where there is next to nothing to do.
"""

import argparse
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Mapping

from beam_jobs.month import STAGES as _ALL
from bench import harness, lakes
from bench.creatives import lay_out
from bench.harness import ADSTOCRAT, Bar, Turn
from bench.score import FEW
from schemas.lake import month_after

STAGES = tuple(stage.name for stage in _ALL)
FIRST = lakes.MONTH
SECOND = month_after(FIRST, 1)
# What costs by the new creative.
_CREATIVES = ("creatives", "embed")
# Seconds beyond its start: how a stage grows that takes less says nothing.
_LEAST = 1.0
_STARTS = 3


def run(lake: pathlib.Path, month: str, stages: tuple[str, ...] = STAGES) -> dict[str, Turn]:
    """Run the stages of a month one by one; one that has nothing to do is left out."""
    ran = {}
    for stage in stages:
        turn = harness.measured([*ADSTOCRAT, stage, month, "--lake", str(lake)])
        seconds = lakes.stage_seconds(turn.told["said"]).get(stage)
        if seconds is None:
            continue
        ran[stage] = Turn({"seconds": seconds}, turn.wall, turn.cpu, turn.peak)
        print(f"  {lake.name} {month} {stage}: {seconds:.1f} s of {turn.wall:.1f}, {turn.peak >> 20:,} MiB", flush=True)
    return ran


def seconds(turns: Mapping[str, Turn], stages: tuple[str, ...] = STAGES) -> float:
    return sum(turn.told["seconds"] for stage, turn in turns.items() if stage in stages)


def table(columns: Mapping[str, Mapping[str, Turn]]) -> str:
    """Seconds and peak memory of each stage, a column for each month."""
    heads = [f"{name}, {what}" for name in columns for what in ("s", "MiB")]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for stage in STAGES:
        cells = []
        for turns in columns.values():
            turn = turns.get(stage)
            cells += [f"{turn.told['seconds']:.1f}", f"{turn.peak >> 20:,}"] if turn else ["", ""]
        if any(cells):
            lines.append(f"| {stage} | {' | '.join(cells)} |")
    whole = [text for turns in columns.values() for text in (f"{seconds(turns):.1f}", "")]
    return "\n".join([*lines, f"| **all** | {' | '.join(whole)} |"])


def again(flags: argparse.Namespace) -> None:
    """A second month, of whose creatives a tenth is new."""
    lake = flags.work / f"again-{flags.ads}-{flags.images}"
    shutil.rmtree(lake, ignore_errors=True)
    lay_out(str(lake), flags.images, flags.ads, [FIRST, SECOND])
    months = {month: run(lake, month) for month in (FIRST, SECOND)}
    first, second = months.values()
    start = starts(flags.work)
    begun = seconds(start, _CREATIVES)
    bars = [
        Bar("time of month 2, of month 1's", seconds(second) / seconds(first), 0.5, at_least=False),
        Bar(
            "of its stages creatives and embed, starts apart",
            (seconds(second, _CREATIVES) - begun) / (seconds(first, _CREATIVES) - begun),
            0.12,
            at_least=False,
        ),
    ]
    told = f"{flags.ads:,} ads, {flags.images:,} JPEGs of 1200 x 628 a month, a tenth of them new in the second."
    harness.report("5", "the second month", [told, table({**months, "2,000 ads, 50 creatives": start})], bars, ["tensorflow"])
    shutil.rmtree(lake)


@functools.cache
def starts(work: pathlib.Path) -> dict[str, Turn]:
    """Each stage of a small month at its quickest; once for all parts of the bench."""
    runs = [run(sample(work, *FEW), FIRST) for _ in range(_STARTS)]
    return {stage: min((one[stage] for one in runs), key=lambda turn: turn.told["seconds"]) for stage in runs[0]}


def sample(work: pathlib.Path, ads: int, creatives: int) -> pathlib.Path:
    lake = work / f"grown-{ads}-{creatives}"
    if not (lake / "raw").exists():
        counts = ["--ads", str(ads), "--creatives", str(creatives)]
        harness.measured([*ADSTOCRAT, "sample-data", str(lake), "--months", f"{FIRST}:{FIRST}", *counts])
    for folder in (path for path in lake.iterdir() if path.name not in ("raw", "truth")):
        shutil.rmtree(folder)
    # Else the disk would be busy with what was written for the bench, or removed, while a stage is timed.
    os.sync()
    return lake


def grown(flags: argparse.Namespace, name: str, title: str, small: tuple[int, int], big: tuple[int, int], limit: float) -> None:
    """The same month with more ads, or with more creatives."""
    start = starts(flags.work)
    sizes = {f"{ads:,} x {creatives:,}": sample(flags.work, ads, creatives) for ads, creatives in (small, big)}
    months: dict[str, dict[str, Turn]] = {size: {} for size in sizes}
    # In turns, since machines are not equally quick all the time.
    for stage in STAGES:
        for size, lake in sizes.items():
            months[size].update(run(lake, FIRST, (stage,)))
    a, b = months.values()
    bars = []
    for stage in b:
        took, less = (turns[stage].told["seconds"] - start[stage].told["seconds"] for turns in (b, a))
        if took > _LEAST:
            bars.append(Bar(f"time of {stage} beyond its start, times", took / less if less > 0 else math.inf, limit, at_least=False))
        bars.append(Bar(f"memory of {stage}, times", b[stage].peak / a[stage].peak, 1.2, at_least=False))
    bars.append(Bar("most memory, GB", max(turn.peak for turn in b.values()) / 1e9, 6, at_least=False))
    harness.report(name, f"growth {title}", [table({**months, "2,000 x 50": start})], bars, ["tensorflow"])


def whole(flags: argparse.Namespace) -> None:
    """A month of 10 M rows from CSV to lookup, whose thumbnails are there."""
    lake = sample(flags.work, flags.rows * 10, 100_000)
    thumbnails = run(lake, FIRST, ("ingest", "creatives"))
    shutil.rmtree(lake / "rows")
    month = run(lake, FIRST)
    bars = [Bar("a month of 10 M rows, minutes", seconds(month) / 60, 30, at_least=False)]
    columns = {"thumbnails, before": {"creatives": thumbnails["creatives"]}, "the month": month}
    harness.report("8c", "a whole month of 10 M rows and 100,000 creatives", [table(columns)], bars, ["tensorflow"])


def bench(flags: argparse.Namespace) -> None:
    parts = flags.only.split(",")
    if "again" in parts:
        again(flags)
    if "rows" in parts:
        grown(flags, "8a", "with rows", (flags.rows, 5_000), (10 * flags.rows, 5_000), 10.5)
    if "creatives" in parts:
        grown(flags, "8b", "with creatives", (200_000, 20_000), (200_000, 100_000), 5.25)
    if "whole" in parts:
        whole(flags)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="again,rows,creatives,whole", help="parts (default: %(default)s)")
    parser.add_argument("--ads", type=int, default=200_000, help="of the second month's bench (default: %(default)s)")
    parser.add_argument("--images", type=int, default=20_000, help="of it (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="that grow tenfold (default: %(default)s)")


if __name__ == "__main__":
    harness.run_bench(__doc__, {}, bench, add_flags)
