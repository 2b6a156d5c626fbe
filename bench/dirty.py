"""What bad rows and bad images cost: the same sample month clean, and with 0.5 % bad rows of every kind and 2 % bad images.

Each is run from CSV to lookup in a process of its own, A B A B; the last line is the ratio of the medians, of the whole month and of each
stage. `--share` is of each kind by itself: with eleven kinds, 5.5 % of the rows are bad, and `max_reject_share` is raised to let them.

    scripts/bench dirty -- [--ads N] [--creatives N] [--rounds N] [--work FOLDER]
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np

from bench.lakes import stage_seconds
from schemas import csv_records, lake, rows
from schemas.storage import Storage, open_storage

MONTH = "2026-10"
# A clean row's fields, by the names of the sample's columns, made bad; a row too long is not among them: half a percent of those is no CSV.
BAD: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    rows.FIELD_COUNT: lambda row: b",".join(row.values()) + b",more",
    rows.BAD_ENCODING: lambda row: b",".join((row | {"advertiser": b"caf\xe9"}).values()),
    rows.UNPARSABLE: lambda row: b",".join((row | {"bid": b"1.2.3"}).values()),
    rows.MISSING_REQUIRED: lambda row: b",".join((row | {"ad_id": b""}).values()),
    rows.OUT_OF_DOMAIN: lambda row: b",".join((row | {"hour": b"24"}).values()),
    rows.CLICKS_OVER_IMPRESSIONS: lambda row: b",".join((row | {"impressions": b"3", "clicks": b"4"}).values()),
    rows.KEY_TOO_LONG: lambda row: b",".join((row | {"ad_id": b"k" * 501}).values()),
    rows.IMAGE_OUTSIDE_MONTH: lambda row: b",".join((row | {"image": b"../" + row["image"]}).values()),
    rows.DUPLICATE_KEY: lambda row: b",".join(row.values()),
    csv_records.STRAY_QUOTE: lambda row: b",".join((row | {"campaign": b'"a"b'}).values()),
    csv_records.UNCLOSED_QUOTE: lambda row: b",".join((row | {"campaign": b'"open'}).values()),
}
BAD_IMAGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: b"",
    lambda data: b"<html>not found</html>",
    lambda data: data[: len(data) // 10],
    lambda data: data[:200] + bytes(len(data) - 200),
)


def spoil(storage: Storage, share: float, image_share: float, seed: int) -> dict[str, int]:
    """Make rows of every kind and images bad, in place; returns how many of each."""
    rng = np.random.default_rng(seed)
    made = dict.fromkeys([*BAD, "images"], 0)
    first = b""
    for name in storage.names(lake.raw_ads(MONTH)):
        header, *lines = storage.read(name).splitlines()
        names = header.decode().split(",")
        kinds = rng.choice(len(BAD) + 1, len(lines), p=[*[share] * len(BAD), 1 - share * len(BAD)])
        first = first or lines[int(np.flatnonzero(kinds == len(BAD))[0])].split(b",")[names.index("ad_id")]
        for number in np.flatnonzero(kinds < len(BAD)).tolist():
            kind = list(BAD)[kinds[number]]
            row = dict(zip(names, lines[number].split(b","), strict=True))
            if kind == rows.DUPLICATE_KEY:
                row["ad_id"] = first
            made[kind] += 1
            lines[number] = BAD[kind](row)
        storage.write(name, b"\n".join([header, *lines, b""]))
    for name in storage.names(lake.raw_images(MONTH)):
        if rng.random() < image_share:
            made["images"] += 1
            storage.write(name, BAD_IMAGES[made["images"] % len(BAD_IMAGES)](storage.read(name)))
    return made


def run(work: pathlib.Path, raw: pathlib.Path, round_: int) -> dict[str, float]:
    """Seconds by stage of the month from the start, in a new lake beside the same raw files."""
    target = work / f"run-{raw.name}-{round_}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    os.symlink(raw / "raw", target / "raw")
    config = work / "config.yaml"
    config.write_text("max_reject_share: 0.2\n")
    command = [sys.executable, "-m", "beam_jobs.cli", "month", MONTH, "--lake", str(target), "--config", str(config)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = stage_seconds(told.stdout + told.stderr)
    current = json.loads((target / "lookup" / "CURRENT").read_text())
    ledger = json.loads((target / "runs" / MONTH / current["run"] / "ledger.json").read_text())
    print(
        f"  {raw.name}, round {round_}: {sum(seconds.values()):.1f} s; rejected {ledger['rejected']}, images {ledger['image_status']}",
        flush=True,
    )
    shutil.rmtree(target)
    return {**seconds, "month": sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ads", default="300000", help="rows of the month")
    parser.add_argument("--creatives", default="6000", help="its images")
    parser.add_argument("--share", type=float, default=0.005, help="bad rows of each kind")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=pathlib.Path, help="folder for the lakes; default: a temporary one")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adstocrat-bench-") as temporary:
        work = (flags.work or pathlib.Path(temporary)).resolve()
        clean, dirty = work / "clean", work / "dirty"
        adstocrat = [sys.executable, "-m", "beam_jobs.cli", "sample-data", str(clean), "--months", f"{MONTH}:{MONTH}"]
        subprocess.run([*adstocrat, "--ads", flags.ads, "--creatives", flags.creatives], check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(clean, dirty, dirs_exist_ok=True)
        made = spoil(open_storage(str(dirty)), flags.share, 0.02, 0)
        print(f"made bad: {made}")
        times: dict[str, list[dict[str, float]]] = {"clean": [], "dirty": []}
        for round_ in range(flags.rounds):
            for raw in (clean, dirty):
                times[raw.name].append(run(work, raw, round_))
        print(f"\n{'':<12} {'clean s':>9} {'dirty s':>9} {'ratio':>7}")
        for stage in times["clean"][0]:
            a, b = (statistics.median(one[stage] for one in times[name]) for name in ("clean", "dirty"))
            print(f"{stage:<12} {a:>9.1f} {b:>9.1f} {b / max(a, 0.1):>7.2f}")


if __name__ == "__main__":
    main()
