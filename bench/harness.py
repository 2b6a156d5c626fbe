"""Ways to do one thing, side by side: in turns, each turn in a process of its own; what came of it goes into bench/RESULTS.md.

A bench is a module of *sides*, functions of its arguments that do the work once and tell how long it took, and of a `bench` that lays out
the data, lets the sides take turns, checks that their answers are equal and judges the bars. Seconds are those of the work alone: what
it takes to start (Python and its imports, TensorFlow's model, the runner) is measured apart, and shown.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import psutil

TOP = pathlib.Path(__file__).resolve().parent.parent
RESULTS = TOP / "bench" / "RESULTS.md"
ADSTOCRAT = [sys.executable, "-m", "beam_jobs.cli"]
T = TypeVar("T")
Told = dict[str, Any]
Sides = Mapping[str, Callable[[argparse.Namespace], Told]]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One run of a side.

    Attributes:
        told: what it told of itself: `units` done in `seconds`, of its process's `cpu` seconds if it knows them, `start` (seconds by what
            was started), and whatever else.
        wall, cpu: seconds of the whole process and its children.
        peak: most resident bytes of the process and its children together, looked at 20 times a second.
    """

    told: Told
    wall: float
    cpu: float
    peak: int


@dataclasses.dataclass(frozen=True)
class Bar:
    """What must be reached: `found` at least, or at most, `limit`."""

    what: str
    found: float
    limit: float
    at_least: bool = True

    @property
    def reached(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit


class Clock:
    """Seconds, and CPU seconds, of a side's process by what they went into; the first lap began with the process."""

    def __init__(self) -> None:
        self._last, self._last_cpu = psutil.Process().create_time(), 0.0
        self.laps, self.cpu = dict[str, float](), dict[str, float]()

    def lap(self, name: str) -> float:
        now, cpu = time.time(), time.process_time()
        self.laps[name], self.cpu[name], self._last, self._last_cpu = now - self._last, cpu - self._last_cpu, now, cpu
        return self.laps[name]


def run_bench(
    doc: str, sides: Sides, bench: Callable[[argparse.Namespace], None], add_flags: Callable[[argparse.ArgumentParser], Any]
) -> None:
    """The main function of a bench: all of it, or, in a child, one side."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, help="folder for data, kept and used again; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--side", choices=[*sides], help=argparse.SUPPRESS)
    parser.add_argument("--tell", type=pathlib.Path, help=argparse.SUPPRESS)
    add_flags(parser)
    flags = parser.parse_args()
    if flags.side:
        flags.tell.write_text(json.dumps(sides[flags.side](flags)))
        return
    with tempfile.TemporaryDirectory(prefix="adstocrat-bench-") as temporary:
        flags.work = (flags.work or pathlib.Path(temporary)).resolve()
        flags.work.mkdir(parents=True, exist_ok=True)
        bench(flags)


def beyond_start(clock: Clock, prepare: Callable[[T], Callable[[], int]], few: T, whole: T) -> Told:
    """What a side takes of `whole` beyond what it takes of `few`, its start-up: the second time, since the first warms it.

    Args:
        clock: whose lap `imports` is over.
        prepare: makes ready, and returns what is to be timed, which returns how many units it has done.
    """
    for name, what in (("first time", few), ("start", few), ("work", whole)):
        work = prepare(what)
        clock.lap("made ready")
        units = work()
        clock.lap(name)
    seconds, cpu = (laps["work"] - laps["start"] for laps in (clock.laps, clock.cpu))
    return {"units": units, "seconds": seconds, "cpu": cpu, "start": {"imports": clock.laps["imports"], "few rows": clock.laps["start"]}}


def take_turns(flags: argparse.Namespace, sides: Sequence[str], *, rounds: int | None = None, **others: Any) -> dict[str, list[Turn]]:
    """Run the sides in turns, A B A B, with the bench's own flags; `others` stand in for some of these."""
    turns: dict[str, list[Turn]] = {side: [] for side in sides}
    for _ in range(rounds or flags.rounds):
        for side in sides:
            turns[side].append(turn(flags, side, **others))
    return turns


def turn(flags: argparse.Namespace, side: str, cores: int | None = None, **others: Any) -> Turn:
    """Run one side once, on the first `cores` of the machine's cores."""
    values = {**vars(flags), **others, "side": side, "tell": flags.work / f"told-{os.getpid()}.json"}
    command = [sys.executable, "-m", f"bench.{pathlib.Path(sys.argv[0]).stem}"]
    for name, value in values.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    if cores:
        command = ["taskset", "--cpu-list", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores])), *command]
    done = measured(command)
    told = json.loads(values["tell"].read_text())
    values["tell"].unlink()
    done = dataclasses.replace(done, told=told)
    if told["seconds"] <= 0:
        raise RuntimeError(f"{side} took less than its start, {told}: give it more to do")
    rate = told["units"] / told["seconds"]
    print(f"  {side}: {rate:,.0f}/s, {told['seconds']:.2f} s of {done.wall:.1f}, CPU {done.cpu:.1f} s, {done.peak >> 20:,} MiB", flush=True)
    return done


def measured(command: Sequence[str]) -> Turn:
    """Run a command to its end; what it told is all that it `said`.

    Raises:
        RuntimeError: it failed; with what it said last.
    """
    with tempfile.TemporaryFile("w+") as said:
        before, started, peak = os.times(), time.monotonic(), 0
        child = psutil.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while child.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(_resident(process) for process in (child, *child.children(recursive=True))))
            with contextlib.suppress(psutil.TimeoutExpired):
                child.wait(0.05)
        wall, after = time.monotonic() - started, os.times()
        said.seek(0)
        text = said.read()
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {text[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Turn({"said": text}, wall, cpu, peak)


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0


def median(turns: Sequence[Turn], of: Callable[[Turn], float]) -> float:
    return statistics.median(map(of, turns))


def rate(turns: Sequence[Turn]) -> float:
    """Units a second, start apart."""
    return median(turns, lambda one: one.told["units"] / one.told["seconds"])


def cpu_rate(turns: Sequence[Turn]) -> float:
    """Units a CPU second, start apart: what others' load on the machine leaves as it is."""
    return median(turns, lambda one: one.told["units"] / one.told["cpu"])


def table(turns: Mapping[str, Sequence[Turn]], unit: str) -> str:
    """What the sides took, as Markdown."""
    columns = [f"{unit}/s", "s", f"{unit} per CPU s", "start, s", "whole process, s", "CPU s", "peak MiB"]
    lines = [f"| | {' | '.join(columns)} |", "|---|---:|---:|---:|---|---:|---:|---:|"]
    for side, some in turns.items():
        starts = [one.told.get("start", {}) for one in some]
        start = ", ".join(f"{name} {statistics.median(one[name] for one in starts):.1f}" for name in starts[0])
        cells = [
            f"{rate(some):,.0f}",
            f"{median(some, lambda one: one.told['seconds']):.2f}",
            f"{cpu_rate(some):,.0f}" if "cpu" in some[0].told else "",
            start,
            f"{median(some, lambda one: one.wall):.1f}",
            f"{median(some, lambda one: one.cpu):.1f}",
            f"{median(some, lambda one: one.peak / (1 << 20)):,.0f}",
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(name: str, title: str, parts: Sequence[str], bars: Sequence[Bar], packages: Sequence[str]) -> None:
    """Write a bench's section, its bars first."""
    rows = [(b.what, f"{b.found:,.3g}", f"{'≥' if b.at_least else '≤'} {b.limit:,.4g}", b.reached) for b in bars]
    write(name, title, [verdicts("wanted", rows), *parts], packages)


def verdicts(third: str, rows: Sequence[tuple[str, str, str, bool]]) -> str:
    """Bars as Markdown: what, what was found, a third column of that name, and whether it is reached."""
    lines = [f"| bar | found | {third} | |", "|---|---:|---:|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} | {'reached' if reached else '**missed**'} |" for *cells, reached in rows)])


def write(name: str, title: str, parts: Sequence[str], packages: Sequence[str]) -> None:
    """Write a section of RESULTS.md, in place of what it said before, with machine, versions and command."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("pyarrow", "apache-beam", *packages))
    command = f"scripts/bench {pathlib.Path(sys.argv[0]).stem}"
    if arguments := list(_without_work(sys.argv[1:])):
        command += f" -- {' '.join(arguments)}"
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    about = f"{os.cpu_count()} cores, {_processor()}, Python {platform.python_version()}, {versions}; load at the end {load}."
    section = "\n\n".join([f"## {name}: {title}", *parts, f"`{command}`; {about}"])
    print(f"\n{section}", flush=True)
    head = "# Side by side\n\nWritten by `scripts/bench`; ratios are what counts, absolute numbers are of one machine. What limits\n"
    head += "the bars that are missed: [LIMITS.md](LIMITS.md).\n"
    sections = dict(_sections(RESULTS.read_text())) if RESULTS.exists() else {}
    sections[name] = section
    ordered = sorted(sections, key=lambda title: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", title)])
    RESULTS.write_text("\n\n".join([head.rstrip(), *(sections[one] for one in ordered)]) + "\n")


def _sections(text: str) -> Iterator[tuple[str, str]]:
    for section in text.split("\n## ")[1:]:
        yield section.partition(":")[0], f"## {section.strip()}"


def _without_work(arguments: Sequence[str]) -> Iterator[str]:
    """Arguments without folders of this machine, which say nothing to others."""
    following = iter(arguments)
    for argument in following:
        if argument in ("--work", "--lake", "--encoder-lake", "--criteo"):
            next(following)
        else:
            yield argument


def _processor() -> str:
    found = re.search(r"model name\s*: (.+)", pathlib.Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()
