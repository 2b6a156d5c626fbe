"""How good the models are: the ladder, calibration, position, downsampling, real rows and refresh, each beside what it has to reach.

Sample months at 120,000 rows x 5,000 creatives, several seeds, judged in month 3 on gate rows against the known truth; every number is per
impression. Models are trained as in a run, on months that were joined without Beam.

    scripts/bench quality -- [--only ladder,calibration,position,negatives,real,refresh] [--seeds 11,12,13,14,15] [--work DIR]
        [--criteo DIR]

The first run of a seed draws its months and trains an encoder (some 5 minutes of one core); what is in --work is used again.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import model
from bench import harness
from bench.months import CONTRACT, Month, months
from model import splits, tensorflow
from model.features import MONTH, embedding_column
from model.training import Examples, Settings, train_ranker
from schemas import lake

if TYPE_CHECKING:
    from bench.peers import Peers

PARTS = ("ladder", "calibration", "position", "negatives", "real", "refresh")
# What was told: headings, and of each its bars, what was found of them, what by seed, and whether they are reached.
TOLD: list[tuple[str, list[tuple[str, str, str, bool]]]] = []


def begin(heading: str) -> None:
    print(f"\n{heading}", flush=True)
    TOLD.append((heading, []))


def bar(name: str, value: float, good: bool, each: Sequence[float] = ()) -> None:
    """Print a number beside what it has to reach, and what it is for each seed."""
    seeds = ", ".join(f"{one:.4f}" for one in each if len(each) > 1)
    TOLD[-1][1].append((name, f"{value:.4f}", seeds, bool(good)))
    print(f"  {'met   ' if good else 'MISSED'} {name}: {value:.4f}{seeds and f'   ({seeds})'}", flush=True)


def divergence(truth: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.asarray(truth * np.log(truth / p) + (1 - truth) * np.log((1 - truth) / (1 - p)))


class Seed:
    """The months of a seed, what is judged in the last of them, and the models trained on them, kept in `work`."""

    def __init__(self, work: pathlib.Path, seed: int, count: int = 3) -> None:
        self.seed, self.work = seed, work / f"seed-{seed}-models-{count}"
        self.lake = work / f"seed-{seed}-120000-5000" / "lake"
        self.months, self.thumbnails = months(work, seed, count)
        self.creatives = self.thumbnails["creative"].combine_chunks()

    @functools.cached_property
    def gate(self) -> "Gate":
        return Gate(self.months)

    def examples(self, window: list[Month], embeddings: pa.Array | None) -> Examples:
        def of_epoch(epoch: int) -> Iterator[pa.RecordBatch]:
            units = [(month, batch) for month in window for batch in month.batches()]
            random.Random(f"{self.seed} {epoch}").shuffle(units)
            for month, batch in units:
                yield self.joined(month, batch, embeddings)

        return of_epoch

    def joined(self, month: Month, batch: pa.RecordBatch, embeddings: pa.Array | None) -> pa.RecordBatch:
        number = pa.repeat(pa.scalar(lake.month_number(month.name), pa.int32()), len(batch))
        batch = batch.append_column(MONTH, number)
        if embeddings is None:
            return batch
        return batch.append_column("embedding", embeddings.take(pc.index_in(batch["creative"], self.creatives)))

    def embeddings(self, window: list[Month], name: str = "encoder", order: np.ndarray | None = None) -> pa.Array:
        """Of all creatives by an encoder trained on the window; with `order`, each has the picture of another."""
        from model.encoder import Encoder
        from model.encoder_training import train_encoder

        pictures = self.thumbnails["thumbnail"].combine_chunks()
        shown = pa.table({"creative": self.creatives, "thumbnail": pictures if order is None else pictures.take(pa.array(order))})
        folder = self.work / name
        if not (folder / "spec.json").exists():
            batches = shown.combine_chunks().to_batches(1024)
            train_encoder(self.examples(window, None), lambda: iter(batches), CONTRACT, self.seed, folder, lambda line: None)
        pixels = np.frombuffer(b"".join(shown["thumbnail"].to_pylist()), np.uint8).reshape(-1, 64, 64, 3)
        return embedding_column(Encoder(folder).embed(pixels))

    def ranker(
        self,
        window: list[Month],
        embeddings: pa.Array,
        name: str = "ranker",
        settings: Settings | None = None,
        parent: str | None = None,
        digest: str = "d",
    ) -> float:
        """Train a ranker into the folder `name`; returns the processor's seconds."""
        started, folder = time.process_time(), self.work / name
        start = self.work / parent if parent else None
        train_ranker(self.examples(window, embeddings), CONTRACT, self.seed, folder, "e", digest, start, lambda line: None, settings)
        return time.process_time() - started

    def trained(self, embeddings: pa.Array, name: str = "ranker", settings: Settings | None = None) -> str:
        """The name of a ranker of all months, which is trained unless it is there."""
        if not (self.work / name / "spec.json").exists():
            self.ranker(self.months, embeddings, name, settings)
        return name

    def predict(self, embeddings: pa.Array, name: str = "ranker", at_reference: bool = False, rows: pa.Table | None = None) -> np.ndarray:
        """Probabilities of the last month's gate rows, or of other rows of it."""
        ranker = model.load(self.work / name)
        chosen = (self.gate.rows if rows is None else rows).combine_chunks().to_batches()
        return np.concatenate([ranker.predict(self.joined(self.months[-1], batch, embeddings), at_reference) for batch in chosen])

    @functools.cached_property
    def peers(self) -> "Peers":
        from bench.peers import Peers

        return Peers(self.lake, self.months, self.thumbnails)

    @functools.cached_property
    def informed(self) -> list[float]:
        """What a regression with the planted properties expects of the gate's clicks, of the truth.

        First where it learns from the clicks that were drawn, then from those that were to be expected, so that the choice of gate keys and
        creatives is all the chance that is left, and then from clicks that are drawn anew, five times.
        """
        peers, every, rng = copy.copy(self.peers), np.ones(len(self.gate.truth), bool), np.random.default_rng(self.seed)
        anew = [rng.binomial(peers.shown.astype(np.int64), peers.truth).astype(float) for _ in range(5)]
        found = []
        for clicks in (peers.clicks, peers.shown * peers.truth, *anew):
            peers.clicks = clicks
            found.append(self.gate.ratio(peers.regression(peers.planted, (0.1,))[1], every))
        return found


class Gate:
    """The gate rows of the last month, labelled or not, with their truth; which of them are warm or cold, and the window's base rate."""

    def __init__(self, window: list[Month]) -> None:
        self.rows, truth, seen, sums = window[-1].rows, window[-1].truth, [], np.zeros(2)
        for month in window:
            split = splits.split_of_rows(month.rows["key"].combine_chunks(), month.rows["creative"].combine_chunks())
            use = (split == splits.TRAIN) & (pc.fill_null(month.rows["impressions"], 0).to_numpy() > 0)
            train = month.rows.filter(pa.array(use))
            seen.append(train["creative"].combine_chunks())
            sums += [pc.sum(train["clicks"]).as_py(), pc.sum(train["impressions"]).as_py()]
        self.base_rate = float(sums[0] / sums[1])
        self.mask = split == splits.GATE
        self.rows, truth = self.rows.filter(pa.array(self.mask)), truth.filter(pa.array(self.mask))
        self.shown = truth["impressions"].to_numpy().astype(float)
        self.truth, self.reference = truth["p_click"].to_numpy(), truth["p_click_reference"].to_numpy()
        pictured = self.rows["creative"].is_valid().to_numpy()
        known = pc.is_in(self.rows["creative"], pc.unique(pa.chunked_array(seen)).drop_null()).to_numpy()
        every = np.ones(len(pictured), bool)
        self.parts = {"all": every, "warm": pictured & known, "cold": pictured & ~known, "without image": ~pictured}
        earlier = pa.chunked_array([chunk for month in window[:-1] for chunk in month.rows["advertiser"].chunks])
        self.parts["new advertisers"] = ~pc.is_in(self.rows["advertiser"], pc.unique(earlier)).to_numpy()

    def loss(self, p: np.ndarray, part: str = "all") -> float:
        """Expected log loss an impression, in nats."""
        use = self.parts[part]
        t, q = self.truth[use], p[use]
        return float(np.average(-(t * np.log(q) + (1 - t) * np.log1p(-q)), weights=self.shown[use]))

    def explained(self, p: np.ndarray, part: str) -> float:
        n, use = self.shown, self.parts[part]
        base = np.full(use.sum(), self.base_rate)
        return float(1 - (n[use] * divergence(self.truth[use], p[use])).sum() / (n[use] * divergence(self.truth[use], base)).sum())

    def ratio(self, p: np.ndarray, use: np.ndarray, truth: np.ndarray | None = None) -> float:
        truth = self.truth if truth is None else truth
        return float((self.shown * p)[use].sum() / (self.shown * truth)[use].sum())


def ladder(seeds: list[Seed]) -> None:
    from bench.peers import colour_statistics

    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        gate, peers = seed.gate, seed.peers
        given = min(peers.regression(peers.planted), peers.trees(peers.planted), key=lambda pair: pair[0])[1]
        order = np.random.default_rng(seed.seed).permutation(len(seed.creatives))
        permuted = seed.embeddings(seed.months, "permuted-encoder", order)
        rungs = {
            "base rate": np.full(len(gate.truth), gate.base_rate),
            "columns": peers.regression(None)[1],
            "colour statistics": peers.regression(colour_statistics(seed.thumbnails))[1],
            "ours": seed.predict(seed.embeddings(seed.months)),
            "planted properties": given,
            "truth": gate.truth,
            "images permuted": seed.predict(permuted, seed.trained(permuted, "permuted-ranker")),
        }
        for name, p in rungs.items():
            told = {f"loss {part}": gate.loss(p, part) for part in ("all", "warm", "cold")}
            found.setdefault(name, []).append(told | {f"explained {part}": gate.explained(p, part) for part in ("all", "warm", "cold")})
    mean = {name: {key: float(np.mean([told[key] for told in tolds])) for key in tolds[0]} for name, tolds in found.items()}
    begin(f"1. the ladder, mean of {len(seeds)} seeds")
    print(f"  {'':<20}{'log loss':>10}{'warm':>10}{'cold':>10}   explained, warm, cold")
    for name, one in mean.items():
        print(f"  {name:<20}{''.join(f'{value:>10.5f}' for value in one.values())}")
    # Ours may well be above peers that are given the properties, since they do not know of pairs of columns.
    for chain in (("base rate", "columns", "colour statistics", "ours", "truth"), ("colour statistics", "planted properties", "truth")):
        steps = -np.diff([mean[name]["loss all"] for name in chain])
        losses = np.array([[one["loss all"] for one in found[name]] for name in chain])
        bar(f"least step of {' > '.join(chain)} (> 0)", float(steps.min()), bool((steps > 0).all()), -np.diff(losses, axis=0).max(axis=0))
    told = {name: {key: np.array([one[key] for one in tolds]) for key in tolds[0]} for name, tolds in found.items()}
    for part, least, lost in (("all", 0.0, 0.06), ("warm", 0.85, 0.0), ("cold", 0.78, 0.12)):
        one, own, best = (told[name][f"loss {part}"] for name in ("columns", "ours", "planted properties"))
        explained = told["ours"][f"explained {part}"]
        if least:
            closed = (one - own).mean() / (one - best).mean()
            bar(f"gap closed, {part} (>= 0.60)", closed, closed >= 0.6, (one - own) / (one - best))
            bar(f"explained, {part} (>= {least})", explained.mean(), explained.mean() >= least, explained)
        if lost:
            fall = explained - told["images permuted"][f"explained {part}"]
            bar(f"explained lost with images permuted, {part} (>= {lost})", fall.mean(), fall.mean() >= lost, fall)


def chance(seeds: list[Seed]) -> str:
    """How far off in sum a model may be that is told all there is to see."""
    drawn, expected, *anew = np.array([seed.informed for seed in seeds]).T
    one, other = (", ".join(f"{value:.3f}" for value in values) for values in (drawn, expected))
    outside = float(np.mean(np.abs(np.array(anew) - 1) > 0.03))
    return (
        f"A regression that is given the planted properties is at {one}, and at {other} where it learns from expected clicks instead of "
        f"drawn ones. Where clicks are drawn anew, a seed is outside 1 +- 0.03 in {outside:.0%} of {np.size(anew)} draws: all "
        f"{len(seeds)} are within in {(1 - outside) ** len(seeds):.0%} of cases."
    )


def calibration(seeds: list[Seed], name: str = "ranker") -> None:
    if name == "ranker":
        begin(f"2. calibration, mean of {len(seeds)} seeds\n\n{chance(seeds)}")
    else:
        begin(f"4. their calibration, mean of {len(seeds)} seeds")
    ratios, within = [], []
    for seed in seeds:
        gate, p = seed.gate, seed.predict(seed.embeddings(seed.months), name)
        ratios.append([gate.ratio(p, use) for use in gate.parts.values()])
        values = [gate.rows[column.name].to_numpy().astype(str) for column in CONTRACT.segments]
        segments = [column == value for column in values for value in np.unique(column)]
        off = [gate.ratio(p, use) - 1 for use in segments if gate.shown[use].sum() >= 5000]
        within.append(float(np.mean(np.abs(off) <= 0.1)))
    for part, each in zip(seeds[0].gate.parts, np.array(ratios).T, strict=True):
        most = 0.02 if part == "all" else 0.1
        bar(f"{part} (1 +- {most})", each.mean(), abs(each.mean() - 1) <= most, each)
        if part == "all":
            worst = each[np.abs(each - 1).argmax()]
            bar("worst seed (1 +- 0.03)", worst, abs(worst - 1) <= 0.03)
            # A model cannot know which clicks were drawn and which creatives are the gate's, and this one has learnt from the same.
            beside = each / [seed.informed[0] for seed in seeds]
            worst = beside[np.abs(beside - 1).argmax()]
            bar("worst seed, of what the regression with the planted properties expects (1 +- 0.03)", worst, abs(worst - 1) <= 0.03, beside)
    bar("segment values within +- 0.10 (>= 0.90)", float(np.mean(within)), np.mean(within) >= 0.9, within)


def position(seeds: list[Seed]) -> None:
    from schemas.sample import POSITION_EFFECTS

    begin(f"3. position, mean of {len(seeds)} seeds")
    ours, blind, odds = [], [], dict[int, list[float]]()
    for seed in seeds:
        gate, embeddings = seed.gate, seed.embeddings(seed.months)
        every = np.ones(len(gate.truth), bool)
        at_reference = seed.predict(embeddings, at_reference=True)
        ours.append(gate.ratio(at_reference, every, gate.reference))
        # What ignores position says of each row what it is at its own, on average over positions.
        blind.append(gate.ratio(seed.predict(embeddings), every, gate.reference))
        clicks = np.zeros(7)
        for month in seed.months:
            clicks += np.bincount(month.rows["position"].to_numpy(), pc.fill_null(month.rows["clicks"], 0).to_numpy(), 7)
        for place in range(2, 7):
            at = seed.gate.rows.slice(0, 1).set_column(
                seed.gate.rows.schema.get_field_index("position"), "position", pa.array([place], pa.int64())
            )
            one, own = (seed.predict(embeddings, at_reference=held, rows=at)[0] for held in (True, False))
            if clicks[place] >= 1000:
                odds.setdefault(place, []).append(own / (1 - own) / (one / (1 - one)) / np.exp(POSITION_EFFECTS[place - 1]))
    bar("at the reference (1 +- 0.03)", float(np.mean(ours)), abs(np.mean(ours) - 1) <= 0.03, ours)
    bar("ignoring position (outside 1 +- 0.10)", float(np.mean(blind)), abs(np.mean(blind) - 1) > 0.1, blind)
    for place, each in sorted(odds.items()):
        bar(f"odds ratio of position {place} (1 +- 0.10)", float(np.mean(each)), abs(np.mean(each) - 1) <= 0.1, each)


def negatives(seeds: list[Seed]) -> None:
    begin(f"4. negatives downsampled to 20 %, mean of {len(seeds)} seeds")
    change = []
    for seed in seeds:
        embeddings = seed.embeddings(seed.months)
        thinned = seed.trained(embeddings, "thinned", dataclasses.replace(Settings(), negatives=0.2))
        change.append(seed.gate.loss(seed.predict(embeddings, thinned)) / seed.gate.loss(seed.predict(embeddings)) - 1)
    bar("NE against all rows (<= +0.002)", float(np.mean(change)), np.mean(change) <= 0.002, change)
    calibration(seeds, "thinned")


def refresh(work: pathlib.Path, numbers: list[int]) -> None:
    begin(f"6. refresh, mean of {len(numbers)} seeds")
    told = [refreshed(work, number) for number in numbers]
    limits = {"after 1": 0.0015, "after 6": 0.003, "with another encoder": 0.0015, "cost": 0.5}
    for name, most in limits.items():
        each = [one[name] for one in told]
        bar(f"{'cost' if name == 'cost' else f'NE {name}'} against scratch (<= {most})", float(np.mean(each)), np.mean(each) <= most, each)


def refreshed(work: pathlib.Path, seed: int) -> dict[str, float]:
    """Six refreshes, months 4 to 9, each on a window of three months, with the encoder of the first three; then another encoder."""
    data = Seed(work, seed, 9)
    months, told, costs = data.months, dict[str, float](), []
    embeddings = data.embeddings(months[:3])
    data.ranker(months[:3], embeddings, "r3")

    def against_scratch(window: list[Month], embeddings: pa.Array, *names: str) -> float:
        data.months, data.gate = window, Gate(window)
        ours, scratch = (data.gate.loss(data.predict(embeddings, name)) for name in names)
        return ours / scratch - 1

    for number in range(4, 10):
        window = months[number - 3 : number]
        fresh = data.ranker(window, embeddings, f"r{number}", parent=f"r{number - 1}")
        if number in (4, 9):
            costs.append(fresh / data.ranker(window, embeddings, f"s{number}"))
            told[f"after {number - 3}"] = against_scratch(window, embeddings, f"r{number}", f"s{number}")
    other = data.embeddings(window, "encoder-9")
    data.ranker(window, other, "n9", parent="r9", digest="other")
    data.ranker(window, other, "ns9", digest="other")
    told |= {"with another encoder": against_scratch(window, other, "n9", "ns9"), "cost": float(np.mean(costs))}
    print(f"  seed {seed}: {json.dumps({name: round(value, 5) for name, value in told.items()})}", flush=True)
    return told


def real(folder: pathlib.Path | None) -> None:
    from bench.criteo import folds

    if not folder:
        begin("5. real rows")
        bar("not measured, since --criteo names no folder", math.nan, False)
        return
    started = time.monotonic()
    losses = folds(folder)
    begin(f"5. real rows, 10 folds, mean log loss ({time.monotonic() - started:.0f} s): {json.dumps(losses)}")
    best = min(losses["lightgbm"], losses["logistic regression"])
    weaker = max(losses["lightgbm"], losses["logistic regression"])
    bar("weaker peer (<= 0.465)", weaker, weaker <= 0.465)
    bar("ours above the better peer (<= 0.003)", losses["ours"] - best, losses["ours"] - best <= 0.003)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, help="where months and models are kept (default: a temporary folder)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seeds", default="11,12,13,14,15")
    parser.add_argument("--criteo", type=pathlib.Path, help="folder of criteo_{train,dev,test}.tsv, for the part `real`")
    arguments = parser.parse_args()
    only, numbers = arguments.only.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if odd := set(only) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(odd))}; expected some of {', '.join(PARTS)}")
    tensorflow.load()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="adstocrat-bench-") as temporary:
        work = arguments.work or pathlib.Path(temporary)
        if set(only) & {"ladder", "calibration", "position", "negatives"}:
            seeds = [Seed(work, number) for number in numbers]
            for seed in seeds:
                seed.trained(seed.embeddings(seed.months))
            parts: dict[str, Callable[[list[Seed]], None]] = {
                "ladder": ladder, "calibration": calibration, "position": position, "negatives": negatives,
            }  # fmt: skip
            for name in only:
                if name in parts:
                    parts[name](seeds)
        if "real" in only:
            real(arguments.criteo)
        if "refresh" in only:
            refresh(work, numbers)
    reached = [good for _, bars in TOLD for *_, good in bars]
    told = f"{sum(reached)} of {len(reached)} met, {time.monotonic() - started:,.0f} s"
    print(f"\n{told}")
    if set(only) == set(PARTS):
        parts = [f"{heading}\n\n{harness.verdicts('by seed', bars)}" for heading, bars in TOLD]
        harness.write("quality", "how good the models are", [*parts, told], ["tensorflow", "lightgbm", "scikit-learn"])
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
