"""How a pipeline is launched: on the local runner in this process, or on the one that Beam's own flags name."""

import argparse
from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_jobs.config import ConfigError, suggestion

_SEVERAL_WORKERS = "Beam 2.77 loses rows with several local workers; leave it out (cores are used by threads), or name a cluster's --runner"


def run_pipeline(define: Callable[[beam.Pipeline], None], flags: Sequence[str]) -> None:
    """Build a pipeline, run it, and wait until it is done.

    Raises:
        ConfigError: a flag is unknown to Beam or refused.
    """
    options = checked_options(flags)
    runner = None if options.get_all_options().get("runner") else FnApiRunner()
    pipeline = beam.Pipeline(runner=runner, options=options)
    define(pipeline)
    pipeline.run().wait_until_finish()


def checked_options(flags: Sequence[str]) -> PipelineOptions:
    """Beam's options from the flags behind `--`.

    Raises:
        ConfigError: a flag that no Beam option knows, or one that makes the local runner lose rows.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for options in PipelineOptions.__subclasses__():
        # Each class adds its own; some of Beam's name the same flag.
        parser.conflict_handler = "resolve"
        if "_add_argparse_args" in options.__dict__:
            options._add_argparse_args(parser)  # type: ignore[arg-type]
    known, unknown = parser.parse_known_args(list(flags))
    if unknown:
        names = [name for action in parser._actions for name in action.option_strings]
        raise ConfigError(f"unknown Beam flag {unknown[0]!r}{suggestion(unknown[0].partition('=')[0], names)}")
    if (known.runner or "").rpartition(".")[2].lower() in ("directrunner", "switchingdirectrunner", "bundlebaseddirectrunner"):
        raise ConfigError(f"--runner={known.runner} is refused: it is one of two runners, as the network allows; leave it out to run here")
    # 0 is as many as there are cores.
    if known.direct_num_workers not in (None, 1):
        raise ConfigError(f"--direct_num_workers={known.direct_num_workers} is refused: {_SEVERAL_WORKERS}")
    if any(flag.startswith("--direct_running_mode") for flag in flags) and known.direct_running_mode != "in_memory":
        raise ConfigError(f"--direct_running_mode={known.direct_running_mode} is refused: {_SEVERAL_WORKERS}")
    return PipelineOptions(list(flags))
