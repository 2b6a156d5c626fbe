"""The lakes that benches work on: sample months, made once in the bench's folder."""

import contextlib
import functools
import json
import pathlib
import re
from collections.abc import Iterator
from unittest import mock

from beam_jobs.config import Config
from beam_jobs.run import MonthRun, kept
from bench import harness
from bench.harness import ADSTOCRAT
from model import registry

MONTH = "2026-08"
# What a stage says when it has run.
_RAN = re.compile(r"^(\w+) +.*?, ([\d.]+) s, peak memory", re.MULTILINE)


def stage_seconds(said: str) -> dict[str, float]:
    """Seconds of each stage that a month, or one stage of it, says to have run: without Python's start and imports."""
    return {stage: float(seconds) for stage, seconds in _RAN.findall(said)}


def month_lake(work: pathlib.Path, ads: int, creatives: int) -> pathlib.Path:
    """The lake of one sample month that was run to its end."""
    lake = work / f"month-{ads}-{creatives}"
    if not (lake / "lookup" / "CURRENT").exists():
        sample = ["sample-data", str(lake), "--months", f"{MONTH}:{MONTH}", "--ads", str(ads), "--creatives", str(creatives)]
        harness.measured([*ADSTOCRAT, *sample])
        harness.measured([*ADSTOCRAT, "month", MONTH, "--lake", str(lake)])
    return lake


def month_of(lake: pathlib.Path) -> MonthRun:
    """The run that the lake's month was published with."""
    return kept(Config(lake=str(lake)), MONTH, json.loads((lake / "lookup" / "CURRENT").read_text())["run"])


@contextlib.contextmanager
def models_kept() -> Iterator[None]:
    """Models that are loaded meanwhile are kept, so that a side can load them before what is timed."""
    with mock.patch.object(registry, "load", functools.cache(registry.load)):
        yield
