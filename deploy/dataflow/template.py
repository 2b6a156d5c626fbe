"""Run by the Flex Template's launcher, with the template's parameters and Dataflow's own flags as `--name=value`: one stage of a month."""

import dataclasses
import sys

from beam_jobs.cli import main
from beam_jobs.config import Config


def command(flags: list[str]) -> list[str]:
    """The flags as `adstocrat STAGE MONTH --setting=value -- Beam's flags`."""
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags if "=" in flag)
    # A parameter cannot be empty.
    settings = {field.name: given[field.name] for field in dataclasses.fields(Config) if field.name in given}
    settings |= {"gpu_type": ""} if settings.get("gpu_type") == "none" else {}
    ours = {"stage", "month", *settings}
    own = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    beam = [flag for flag in flags if flag.removeprefix("--").partition("=")[0] not in {*ours, "runner"}]
    return [given["stage"], given["month"], *own, "--", "--runner=DataflowRunner", *beam]


if __name__ == "__main__":
    sys.exit(main(command(sys.argv[1:])))
