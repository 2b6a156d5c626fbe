"""How long the command takes to begin: its help, a month in which nothing is to do, and a service that is ready.

scripts/bench startup
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

from bench import harness, lakes
from bench.harness import ADSTOCRAT, Bar

_HEAVY = ("tensorflow", "keras", "apache_beam", "google.cloud.bigquery")
# The command as `python -m` runs it, and then what it had to import.
_IMPORTED = f"""
import runpy, sys
try:
    runpy.run_module("beam_jobs.cli", run_name="__main__")
finally:
    import json
    print(json.dumps([name for name in {_HEAVY} if name in sys.modules]))
"""


def ready(lake: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds from the command to a service that says it is ready, with nothing fetched before."""
    command = [*ADSTOCRAT, "serve", "--lake", str(lake), "--port", "0", "--probes-port", "0", "--cache", str(cache)]
    log = cache.with_suffix(".log")
    started = time.monotonic()
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while True:
                found = re.findall(r"http://[^\s,]+", log.read_text())
                try:
                    if len(found) > 1 and urllib.request.urlopen(found[1] + "/readyz").status == 200:
                        return time.monotonic() - started
                except (urllib.error.URLError, ConnectionError):
                    pass
                if server.poll() is not None or time.monotonic() - started > 60:
                    raise RuntimeError(f"the service is not ready: {log.read_text()}")
                time.sleep(0.005)
        finally:
            server.terminate()
            server.wait()


def bench(flags: argparse.Namespace) -> None:
    lake = lakes.month_lake(flags.work, 20_000, 500)
    month = ["month", lakes.MONTH, "--lake", str(lake)]
    # A lake that another version made has something to do.
    harness.measured([*ADSTOCRAT, *month])
    told = subprocess.run([sys.executable, "-c", _IMPORTED, *month], check=True, capture_output=True, text=True).stdout
    imported = json.loads(told.splitlines()[-1])
    found: dict[str, list[float]] = {"help": [], "month": [], "serve": []}
    for number in range(flags.rounds):
        found["help"].append(harness.measured([*ADSTOCRAT, "--help"]).wall)
        found["month"].append(harness.measured([*ADSTOCRAT, *month]).wall)
        found["serve"].append(ready(lake, flags.work / f"cache-{os.getpid()}-{number}"))
    seconds = {name: statistics.median(some) for name, some in found.items()}
    bars = [
        Bar("`adstocrat --help`, s", seconds["help"], 0.3, at_least=False),
        Bar("a month in which nothing is to do, s", seconds["month"], 2.0, at_least=False),
        Bar(f"of {', '.join(_HEAVY)} imported by it", len(imported), 0, at_least=False),
        Bar("`adstocrat serve` ready, s", seconds["serve"], 1.0, at_least=False),
    ]
    spread = ", ".join(f"{name} {min(some):.2f} to {max(some):.2f}" for name, some in found.items())
    parts = [f"Medians of {flags.rounds}; {spread}."]
    harness.report("9", "start-up", parts, bars, ["tensorflow"])


if __name__ == "__main__":
    harness.run_bench(__doc__, {}, bench, lambda parser: None)
