"""Does the image matter? Log loss of whole months against a known truth, and on real clicks, beside what it has to beat.

Sample months (120,000 rows x 5,000 creatives): the score table of month 3 against the true click probabilities at the reference
position, weighted by impressions; beside it the same system run from the start on images that a fixed permutation has shuffled among the
creatives, and the best constant. Real months, where a lake is given: trained on all months but the last, whose outcomes are taken away, and
judged on those.

    scripts/bench quality -- [--work FOLDER] [--real LAKE]
"""

import argparse
import csv
import io
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.splits import GATE, split_of_rows
from schemas import lake
from schemas.lake import Current
from schemas.parquet import read_parquet
from schemas.storage import Storage, open_storage

MONTHS = ["2026-08", "2026-09", "2026-10"]


def adstocrat(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "beam_jobs.cli", *arguments], check=True)


def run_months(uri: str, *flags: str) -> None:
    for month in MONTHS:
        adstocrat("month", month, "--lake", uri, *flags)


def scores(storage: Storage) -> pa.Table:
    """The published scores of the last month."""
    current, _ = lake.read_pointer(storage, lake.CURRENT, Current)
    assert current is not None and current.month == MONTHS[-1]
    manifest = lake.read_manifest(storage, lake.stage_folder("scores", current.month, current.run))
    assert manifest is not None
    return pa.Table.from_batches([batch for file in manifest.files for batch in read_parquet(storage, file)])


def permute_images(source: Storage, target: Storage, seed: int) -> None:
    """The same months with every creative's picture exchanged for another's, the same one in each month."""
    where = {name.rpartition("/")[2]: name for month in MONTHS for name in source.names(lake.raw_images(month))}
    names = sorted(where)
    taken = dict(zip(names, np.random.default_rng(seed).permutation(names).tolist(), strict=True))
    for month in MONTHS:
        for name in source.names(lake.raw_ads(month)):
            target.write(name, source.read(name))
        for name in source.names(lake.raw_images(month)):
            target.write(name, source.read(where[taken[name.rpartition("/")[2]]]))


def log_loss(truth: np.ndarray, p: np.ndarray, weight: np.ndarray) -> float:
    """Weighted mean of the cross-entropy of `p` (probabilities) under `truth` (probabilities or outcomes), in nats."""
    return float(np.average(-(truth * np.log(p) + (1 - truth) * np.log1p(-p)), weights=weight))


def bench_sample(work: pathlib.Path) -> bool:
    ours, shuffled = open_storage(str(work / "sample")), open_storage(str(work / "shuffled"))
    adstocrat("sample-data", ours.uri, "--months", f"{MONTHS[0]}:{MONTHS[-1]}", "--ads", "120000", "--creatives", "5000", "--seed", "0")
    permute_images(ours, shuffled, 0)
    for storage in (ours, shuffled):
        run_months(storage.uri)
    with ours.local(lake.truth(MONTHS[-1])) as path:
        truth = pq.read_table(path)
    true, weight = truth["p_click_reference"].to_numpy(), truth["impressions"].to_numpy().astype(float)
    mine, permuted = (table.take(pc.index_in(truth["ad_id"], table["key"].combine_chunks())) for table in map(scores, (ours, shuffled)))
    gate = split_of_rows(mine["key"].combine_chunks(), mine["creative"].combine_chunks()) == GATE
    print("\nsample months, log loss of month 3 against the truth at the reference position, by impressions")
    print(f"  {'':<16} {'all rows':>10} {'gate rows':>10}")
    losses = {}
    for name, p in (
        ("truth", true),
        ("adstocrat", mine["p_click"].to_numpy()),
        ("images permuted", permuted["p_click"].to_numpy()),
        ("best constant", np.full(len(true), np.average(true, weights=weight))),
    ):
        losses[name] = log_loss(true, p, weight)
        print(f"  {name:<16} {losses[name]:>10.6f} {log_loss(true[gate], p[gate], weight[gate]):>10.6f}")
    good = losses["adstocrat"] < min(losses["images permuted"], losses["best constant"])
    print(f"  adstocrat is below images permuted and the best constant: {'yes' if good else 'NO'}", flush=True)
    return good


def blank_outcomes(storage: Storage, column: str, key: str) -> dict[str, int]:
    """Take the last month's outcomes away, and return them by key."""
    outcomes: dict[str, int] = {}
    for name in storage.names(lake.raw_ads(MONTHS[-1])):
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(storage.read(name).decode(), newline="")))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        for row in rows:
            outcomes[row[key]] = int(row[column])
            writer.writerow({**row, column: ""})
        storage.write(name, text.getvalue().encode())
    return outcomes


def bench_real(work: pathlib.Path, source: pathlib.Path) -> bool:
    storage = open_storage(str(work / "real"))
    for path in sorted(source.glob("raw/**/*.*")):
        storage.upload(path, path.relative_to(source).as_posix())
    contract = str(work / "real.pbtxt")
    files = [str(path) for path in sorted(source.glob("raw/*/ads/*.csv"))]
    adstocrat("infer-contract", *files, "--key", "ad_id", "--image", "image", "--clicked", "clicked", "--out", contract)
    outcomes = blank_outcomes(storage, "clicked", "ad_id")
    run_months(storage.uri, "--contract", contract)
    table = scores(storage)
    clicked = np.array([outcomes[key] for key in table["key"].to_pylist()], float)
    earlier = [row for file in files[:-1] for row in csv.DictReader(pathlib.Path(file).read_text().splitlines())]
    base_rate = np.mean([int(row["clicked"]) for row in earlier])
    one = np.ones(len(clicked))
    mine, base = log_loss(clicked, table["p_click"].to_numpy(), one), log_loss(clicked, one * base_rate, one)
    print(f"\nreal months, log loss on all {len(clicked):,} outcomes of {MONTHS[-1]}, trained on {', '.join(MONTHS[:-1])}")
    print(f"  adstocrat          {mine:.6f}\n  base rate {base_rate:.4f}   {base:.6f}")
    print(f"  adstocrat is below the base rate: {'yes' if mine < base else 'NO'}")
    return bool(mine < base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, help="an empty folder to work in (default: a temporary one)")
    parser.add_argument("--real", type=pathlib.Path, help="a lake of real rows and photos with a column `clicked`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adstocrat-bench-") as temporary:
        work = arguments.work or pathlib.Path(temporary)
        good = [bench_real(work, arguments.real)] if arguments.real else []
        good.append(bench_sample(work))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
