"""What the autoscaler of deploy/serving/kubernetes.yaml does when the load grows fourfold within a minute.

    scripts/simulate_scaling --capacity 20000 --startup 20

The formula is Kubernetes' own: every 15 s, wanted = ceil(ready instances x mean CPU / target), unless that is within 10 % of 1; CPU is
what the metrics server last told, the mean of the 15 s before; what a policy allows is counted from the instances at the start of its
period; an instance answers `--startup` seconds after it was asked for. Ends with 1 when a request found no core free, or when the first
new instance came at more than 90 % CPU.
"""

import argparse
import math
import pathlib
import sys
from typing import Any

import yaml

MANIFEST = pathlib.Path(__file__).with_name("kubernetes.yaml")
SYNC_SECONDS = 15
TOLERANCE = 0.1


def autoscaler(manifest: pathlib.Path) -> dict[str, Any]:
    """The manifest's HorizontalPodAutoscaler, its `spec`."""
    documents = yaml.safe_load_all(manifest.read_text())
    return next(document["spec"] for document in documents if document["kind"] == "HorizontalPodAutoscaler")


def wanted(spec: dict[str, Any], ready: int, asked: int, cpu: float) -> int:
    """How many instances the autoscaler asks for.

    Args:
        spec: of the autoscaler.
        ready, asked: instances that answer, and that were asked for so far.
        cpu: mean use of a ready instance, as a share of what it requests.
    """
    ratio = cpu / (spec["metrics"][0]["resource"]["target"]["averageUtilization"] / 100)
    if ratio - 1 <= TOLERANCE:  # Fewer come only after a while, and not in this minute.
        return asked
    allowed = [
        asked + (math.ceil(asked * p["value"] / 100) if p["type"] == "Percent" else p["value"])
        for p in spec["behavior"]["scaleUp"]["policies"]
    ]
    # Those that do not answer yet count as idle.
    return min(max(asked, math.ceil(ready * ratio)), max(allowed), spec["maxReplicas"])


def simulate(
    spec: dict[str, Any], capacity: float, startup: float, base: float, spike: float, ramp: float, offset: int
) -> tuple[float, float]:
    """One spike, printed at each look: (CPU at which the first new instance was asked for, share of requests that found no core).

    Args:
        capacity: requests/s of one instance.
        startup: seconds from asking for an instance to its first answer.
        base, spike, ramp: requests/s before, how many times that it becomes, within so many seconds.
        offset: seconds from a look of the autoscaler to the start of the ramp.
    """
    target = spec["metrics"][0]["resource"]["target"]["averageUtilization"] / 100
    count = max(spec["minReplicas"], math.ceil(base / capacity / target))
    since = [-math.inf] * count
    history: list[float] = []
    first, refused, total = math.nan, 0.0, 0.0
    print(f"\nfrom {base:,.0f} to {base * spike:,.0f} requests/s in {ramp:.0f} s, {offset} s after a look")
    print(f"  {'second':>6} {'requests/s':>11} {'instances':>9} {'asked for':>9} {'CPU':>6}")
    for second in range(-SYNC_SECONDS, 181):
        load = base * (1 + (spike - 1) * min(1, max(0, second / ramp)))
        ready = sum(second >= start for start in since)
        cpu = load / capacity / ready
        history.append(min(1, cpu))
        total += load
        refused += max(0, load - ready * capacity)
        if (second + offset) % SYNC_SECONDS == 0 and second > -SYNC_SECONDS:
            told = sum(history[-SYNC_SECONDS:]) / len(history[-SYNC_SECONDS:])
            more = wanted(spec, ready, len(since), told)
            if more > len(since) and math.isnan(first):
                first = cpu
            since += [second + startup] * (more - len(since))
            print(f"  {second:>6} {load:>11,.0f} {ready:>9} {len(since):>9} {cpu:>6.0%}")
    return first, refused / total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=float, default=20_000, help="requests/s of one core, as scripts/bench serving measures it")
    parser.add_argument(
        "--startup",
        type=float,
        default=20,
        help="seconds until a new instance answers, most of them to fetch a month (default: %(default)s)",
    )
    parser.add_argument("--base", type=float, help="requests/s before the spike (default: what keeps 3 instances at the target)")
    parser.add_argument("--spike", type=float, default=4.0, help="times the base (default: %(default)s)")
    parser.add_argument("--ramp", type=float, default=60.0, help="seconds that it takes (default: %(default)s)")
    arguments = parser.parse_args()
    spec = autoscaler(MANIFEST)
    base = arguments.base or 3 * arguments.capacity * spec["metrics"][0]["resource"]["target"]["averageUtilization"] / 100
    # Looks of the autoscaler fall anywhere in the ramp.
    ends = [simulate(spec, arguments.capacity, arguments.startup, base, arguments.spike, arguments.ramp, offset) for offset in (0, 5, 10)]
    first, refused = max(first for first, _ in ends), max(refused for _, refused in ends)
    print(f"\nfirst new instance asked for at {first:.0%} CPU at most (bar: 90 %); {refused:.2%} of requests found no core free")
    return 0 if first <= 0.9 and refused == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
