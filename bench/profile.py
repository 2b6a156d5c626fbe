"""A stage's flame graph, by py-spy, with Beam's own counters below it, as one SVG.

    scripts/profile STAGE MONTH --lake LAKE [--out FILE.svg]

The stage runs as `adstocrat STAGE MONTH --lake LAKE` runs it, so it must be one that is still to do. Samples are of threads that have work.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any
from unittest import mock
from xml.sax.saxutils import escape

LINE, MARGIN = 16, 10
_ELEMENTS, _MILLISECONDS = "beam:metric:element_count:v1", "beam:metric:ptransform_execution_time:total_msecs:v1"


def run_stage(arguments: list[str], told: pathlib.Path) -> int:
    """Run the stage in this process, and write what its pipelines counted."""
    import apache_beam as beam
    from apache_beam.metrics import monitoring_infos

    from beam_jobs import cli

    lines: list[str] = []
    real = beam.Pipeline.run

    def run(pipeline: beam.Pipeline, *given: Any, **named: Any) -> Any:
        result = real(pipeline, *given, **named)
        seconds, elements = dict[str, float](), dict[str, int]()
        for info in result.monitoring_infos():
            if info.urn == _MILLISECONDS:
                step = info.labels["PTRANSFORM"]
                seconds[step] = seconds.get(step, 0.0) + monitoring_infos.extract_counter_value(info) / 1000
            if info.urn == _ELEMENTS:
                elements[info.labels["PCOLLECTION"]] = monitoring_infos.extract_counter_value(info)
        transforms = pipeline.to_runner_api().components.transforms.values()
        out = {one.unique_name: sum(elements.get(made, 0) for made in one.outputs.values()) for one in transforms}
        told = [
            f"{value:9.2f} s, {out.get(step, 0):>9,} elements out of {step}"
            for step, value in sorted(seconds.items(), key=lambda one: -one[1])
            if value >= 0.005
        ]
        counted = result.metrics().query()
        told += [f"{one.committed:>11,} {one.key.metric.namespace} {one.key.metric.name}" for one in counted["counters"]]
        told += [
            f"{one.committed.mean:>11,.1f} mean, {one.committed.max:,} most, of {one.committed.count:,}: {one.key.metric.name}"
            for one in counted["distributions"]
        ]
        lines.extend(["Beam's counters of a pipeline:", *told])
        return result

    with mock.patch.object(beam.Pipeline, "run", run):
        status = cli.main(arguments)
    told.write_text(json.dumps(lines))
    return status


def with_lines(svg: str, lines: list[str]) -> str:
    """The picture with lines of text below it."""
    size = re.search(r'<svg[^>]* width="(\d+)" height="(\d+)"[^>]* viewBox="0 0 \d+ \d+"', svg)
    assert size, "py-spy's SVG is not as it was; expected width, height and viewBox"
    width, height = int(size[1]), int(size[2])
    taller = height + LINE * len(lines) + 2 * MARGIN
    head = size[0].replace(f'height="{height}"', f'height="{taller}"')
    head = re.sub(r'viewBox="[^"]*"', f'viewBox="0 0 {width} {taller}"', head)
    style = 'font-family="monospace" font-size="12" xml:space="preserve"'
    texts = [
        f'<text x="{MARGIN}" y="{height + MARGIN + LINE * number}" {style}>{escape(line)}</text>' for number, line in enumerate(lines, 1)
    ]
    return svg.replace(size[0], head, 1).replace("</svg>", "\n".join([*texts, "</svg>"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage")
    parser.add_argument("month")
    parser.add_argument("--lake", required=True)
    parser.add_argument("--out", type=pathlib.Path, help="default: profile-STAGE.svg")
    parser.add_argument("--inside", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    arguments = [flags.stage, flags.month, "--lake", flags.lake]
    if flags.inside:
        return run_stage(arguments, flags.inside)
    out = flags.out or pathlib.Path(f"profile-{flags.stage}.svg")
    spy = next(path for entry in sys.path if (path := pathlib.Path(entry) / "bin" / "py-spy").exists())
    with tempfile.TemporaryDirectory() as temporary:
        told = pathlib.Path(temporary) / "told.json"
        command = [str(spy), "record", "--output", str(out), "--rate", "100", "--threads", "--", sys.executable, "-m", "bench.profile"]
        done = subprocess.run([*command, "--inside", str(told), *arguments], check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        lines = json.loads(told.read_text()) if told.exists() else []
    if not lines:
        print(f"nothing ran: {flags.stage} of {flags.month} failed, or was complete already", file=sys.stderr)
        return done.returncode or 1
    out.write_text(with_lines(out.read_text(), lines))
    print(*lines, f"the flame graph is {out}", sep="\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
