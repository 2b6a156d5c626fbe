"""Training the ranker from the lake, beside the same model fed from memory.

    scripts/bench train [-- --ads 2000000 --rounds 3 --work FOLDER]

Both run the stage's own training. The peer is given an epoch's batches as they came out of the lake, all of them in memory before its clock
starts. Examples/s are those of the epochs; what goes before and after (survey, calibration) is told apart.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from bench import harness
from bench.harness import Bar, Clock, Told


def ours(flags: argparse.Namespace) -> Told:
    return _train(flags, in_memory=False)


def memory(flags: argparse.Namespace) -> Told:
    return _train(flags, in_memory=True)


def _train(flags: argparse.Namespace, in_memory: bool) -> Told:
    clock = Clock()
    from beam_jobs.join import examples
    from bench import lakes
    from model import descent, kept, registry, tensorflow, training

    tensorflow.load()
    clock.lap("imports")
    run = lakes.month_of(flags.lake)
    encoder = run.manifest(run.stage("evaluation")).info["encoder"]
    told: dict[str, Any] = {"seconds": 0.0, "waited": 0.0}

    def descend(model: Any, batches: Callable[[int], Iterator[Any]], tune: Any, how: Any, progress: Any) -> Any:
        if in_memory:
            held = list(batches(0))
            source: Callable[[int], Iterator[Any]] = lambda epoch: iter(held)  # noqa: E731
        else:
            source = batches
        clock.lap("survey and build")

        def timed(epoch: int) -> Iterator[Any]:
            began, batches = time.monotonic(), source(epoch)
            while True:
                asked = time.monotonic()
                batch = next(batches, None)
                told["waited"] += time.monotonic() - asked
                if batch is None:
                    break
                yield batch
            told["seconds"] += time.monotonic() - began

        done = real(model, timed, tune, how, progress)
        clock.lap("descent")
        told.update(epochs=done[0]["epochs"], loss=done[0]["tune_loss"], rows=how.rows)
        return done

    real = descent.descend
    once = kept.read_once(functools.partial(examples, run, encoder), run.contract)
    with mock.patch.object(training, "descend", descend), registry.local_folder() as folder, once as rows:
        training.train_ranker(
            rows,
            run.contract,
            0,
            folder,
            encoder,
            "",
            None,
            print,
            training.Settings(steps=0, epochs=flags.epochs, max_epochs=flags.epochs),
        )
    clock.lap("calibrate and write")
    start = {name: seconds for name, seconds in clock.laps.items() if name != "descent"}
    return {"units": told["rows"] * told["epochs"], "start": start, **told}


def bench(flags: argparse.Namespace) -> None:
    from bench import lakes

    flags.lake = flags.lake or lakes.month_lake(flags.work, flags.ads, 5000)
    turns = harness.take_turns(flags, ["ours", "memory"])
    # The peer sees the same batches in each epoch, so its loss after the first is another one, and close.
    losses = {side: some[0].told["loss"] for side, some in turns.items()}
    assert abs(losses["ours"] / losses["memory"] - 1) < 0.02, losses
    bars = [
        Bar("examples/s, of those fed from memory", harness.rate(turns["ours"]) / harness.rate(turns["memory"]), 0.8),
        Bar(
            "share of an epoch's time spent waiting for input",
            harness.median(turns["ours"], lambda one: one.told["waited"] / one.told["seconds"]),
            0.1,
            at_least=False,
        ),
    ]
    parts = [
        f"{turns['ours'][0].told['rows']:,} rows, {flags.epochs} epochs; tune loss {losses['ours']:.5f} and {losses['memory']:.5f}.",
        harness.table(turns, "examples"),
    ]
    harness.report("7", "train", parts, bars, ["tensorflow", "keras"])


SIDES = {"ours": ours, "memory": memory}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ads", type=int, default=2_000_000, help="rows (default: %(default)s)")
    parser.add_argument("--lake", type=pathlib.Path, help="a lake with a month that was run; default: one is made")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")


if __name__ == "__main__":
    harness.run_bench(__doc__, SIDES, bench, add_flags)
