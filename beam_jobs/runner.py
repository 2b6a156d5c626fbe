"""How a pipeline is launched: on the local runner in this process, or on the one that Beam's own flags name.

A job on Dataflow is known by its name, which follows from the run and the step. A launcher that dies is run again, finds the job that goes
on without it, and waits for that one.
"""

import argparse
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    TestOptions,
    WorkerOptions,
)
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.worker import statesampler

from beam_jobs import workers
from beam_jobs.config import ConfigError, suggestion
from beam_jobs.run import HandedOverError, MonthRun, StageError
from schemas import lake

log = logging.getLogger("adstocrat")
Define = Callable[[beam.Pipeline], None]

# Each bundle's end waits for a thread that looks now and then at which step is busy: every 200 ms, if nothing else is said.
_SAMPLING_MS = 10
_SEVERAL_WORKERS = "Beam 2.77 loses rows with several local workers; leave it out (cores are used by threads), or name a cluster's --runner"


# What the service says that a job used in all; what it says while the job still runs has a context of `tentative`.
_TOTALS = ("TotalVcpuTime", "TotalMemoryUsage", "TotalPdUsage", "TotalSsdUsage", "TotalGpuTime", "TotalShuffleDataProcessed")


def run_pipeline(define: Define, flags: Sequence[str]) -> None:
    """Build a pipeline, run it, and wait until it is done.

    Raises:
        ConfigError: a flag is unknown to Beam or refused, or nothing answers at the job server's address.
        StageError: the job ended otherwise than done, on another runner than the local one.
    """
    _run(define, checked_options(flags))


def _run(define: Define, options: PipelineOptions) -> None:
    runner = None if options.get_all_options().get("runner") else FnApiRunner()
    if runner:
        statesampler.StateSampler.__init__.__defaults__ = (_SAMPLING_MS,)
    pipeline = beam.Pipeline(runner=runner, options=options)
    define(pipeline)
    try:
        result = pipeline.run()
    except (grpc.FutureTimeoutError, grpc.RpcError) as error:
        where = options.view_as(PortableOptions).job_endpoint
        raise ConfigError(f"no job server takes jobs at --job_endpoint={where}; start it, or name the address of one ({error})") from error
    try:
        result.wait_until_finish()
    except KeyboardInterrupt:
        # What this launch spilled is removed, so the job could not go on.
        result.cancel()
        raise
    except (grpc.RpcError, RuntimeError) as error:
        raise StageError(_reason(str(error))) from error


def _reason(told: str) -> str:
    """What a worker raised, in its own sentence if it is one of ours, out of what a cluster tells of a job that failed."""
    ours = re.findall(r"^(?:beam_jobs|model|schemas)\.\w+\.\w+: (.+?)(?: \[while running .*)?$", told, re.MULTILINE)
    return ours[-1] if ours else f"the job came to nothing: {told}"


def run_step(define: Define, flags: Sequence[str], run: MonthRun, step: str) -> None:
    """Run a pipeline of a month, remove what it spilled, and note what it used in the run's folder.

    Args:
        define: builds it.
        flags: Beam's.
        run: of the month.
        step: the stage, and which of its pipelines: lower-case letters, digits and dashes.

    Raises:
        ConfigError: a flag is unknown to Beam or refused.
        StageError: the job ended otherwise than done.
        HandedOverError: flags asked for the job alone (`--dry_run`, `--template_location`).
    """
    options, started = checked_options(flags), time.time()
    used: dict[str, Any] = {}
    if workers.on_dataflow(options):
        used = _run_on_dataflow(define, options, run, step)
    else:
        cloud = options.view_as(GoogleCloudOptions)
        cloud.job_name = cloud.job_name or job_name(run, step)
        try:
            _run(define, options)
        finally:
            run.storage.delete(f"{run.spill}/")
    note = {"step": step, "seconds": round(time.time() - started, 1), **used}
    run.storage.write(lake.unique(f"{run.folder}/used", step, ".json"), json.dumps(note).encode())


def job_name(run: MonthRun, step: str) -> str:
    return f"adstocrat-{run.month}-{run.id}-{step}"


def dataflow_pipeline(define: Define, options: PipelineOptions, run: MonthRun, step: str, runner: Any) -> beam.Pipeline:
    """A pipeline as the job that Dataflow gets; `options` are settled in passing."""
    cloud = options.view_as(GoogleCloudOptions)
    # A template's launcher gives the name; all others are known by theirs.
    if not cloud.template_location:
        cloud.job_name = job_name(run, step)
    cloud.labels = [*(cloud.labels or []), f"month={run.month}", f"run={run.id}", f"step={step}", f"launch={run.launch}"]
    pipeline = beam.Pipeline(runner=runner, options=options)
    define(pipeline)
    environments = pipeline.to_runner_api().components.environments.values()
    uses_gpu = any("beam:resources:accelerator:v1" in environment.resource_hints for environment in environments)
    workers.set_defaults(pipeline.options, uses_gpu)
    return pipeline


def _run_on_dataflow(define: Define, options: PipelineOptions, run: MonthRun, step: str) -> dict[str, Any]:
    """Submit the step's job, or find it running already, and wait for it; returns what it used, as the service says."""
    from apache_beam.runners.dataflow.dataflow_runner import DataflowPipelineResult, DataflowRunner, DataflowRuntimeException
    from apache_beam.runners.dataflow.internal import apiclient

    cloud, runner = options.view_as(GoogleCloudOptions), DataflowRunner()
    alone = bool(cloud.template_location or options.view_as(TestOptions).dry_run)
    job, launch = None, run.launch
    if not alone:
        runner.dataflow_client = apiclient.DataflowApplicationClient(options)
        job = _active_job(runner.dataflow_client, cloud, job_name(run, step))
    if job is None:
        pipeline = dataflow_pipeline(define, options, run, step, runner)
        try:
            result: Any = pipeline.run()
        except apiclient.DataflowJobAlreadyExistsError:
            # Another launcher was faster by moments: wait with it.
            return _run_on_dataflow(define, options, run, step)
        if alone:
            graph = len(pipeline.to_runner_api().SerializeToString())
            where = f"written to {cloud.template_location}" if cloud.template_location else "not sent"
            raise HandedOverError(f"the job of {step} is built and {where}: a graph of {graph:,} bytes")
        log.info("  %s: submitted as Dataflow job %s (%s)", step, cloud.job_name, result.job_id())
    else:
        launch = dict(job.labels).get("launch", launch)
        log.info("  %s: Dataflow job %s (%s) is there already; waiting for it", step, job.name, job.id)
        result = DataflowPipelineResult(job, runner, options)
    try:
        state = result.wait_until_finish()
    except DataflowRuntimeException as error:
        raise StageError(f"Dataflow job {job_name(run, step)} ({result.job_id()}) came to nothing: {error}") from error
    finally:
        # Of a job that this launcher leaves behind, nothing may be taken away.
        if result.is_in_terminal_state():
            run.storage.delete(f"spill/{launch}/")
    if state != "DONE":
        raise StageError(f"Dataflow job {job_name(run, step)} ({result.job_id()}) is {state}; the same command submits it anew")
    return {"job": result.job_id(), "metrics": _totals(runner.dataflow_client, result.job_id())}


def _active_job(client: Any, cloud: GoogleCloudOptions, name: str) -> Any:
    """The job of that name that has not ended, or None; the service lets no two of one name run at a time."""
    from google.cloud import dataflow_v1beta3 as dataflow

    active = dataflow.ListJobsRequest.Filter.ACTIVE
    request = dataflow.ListJobsRequest(project_id=cloud.project, location=cloud.region, filter=active, name=name)
    return next((job for job in client._jobs_client.list_jobs(request) if job.name == name), None)


def _totals(client: Any, job: str) -> dict[str, float]:
    found = {}
    for metric in client.get_job_metrics(job).metrics:
        if metric.name.name in _TOTALS and "tentative" not in metric.name.context:
            found[metric.name.name] = float(metric.scalar)
    return found


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
    checked = PipelineOptions(list(flags))
    # Workers have this package, so nothing is staged. Beam would pickle the launcher's main module unless it is told not to, and list what
    # is installed beside it, which takes seconds a job and says nothing of the workers.
    setup = checked.view_as(SetupOptions)
    setup.save_main_session = bool(setup.save_main_session)
    checked.view_as(DebugOptions).add_experiment("disable_logging_submission_environment")
    if workers.on_dataflow(checked):
        _check_dataflow(checked)
    return checked


def _check_dataflow(options: PipelineOptions) -> None:
    setup, cloud = options.view_as(SetupOptions), options.view_as(GoogleCloudOptions)
    if not options.view_as(WorkerOptions).sdk_container_image:
        raise ConfigError(
            "--sdk_container_image is missing; expected the image built from deploy/dataflow/Dockerfile, which holds this package"
        )
    for name in ("save_main_session", "setup_file", "requirements_file", "extra_packages"):
        if getattr(setup, name):
            raise ConfigError(f"--{name} is refused: workers run what --sdk_container_image holds, and nothing is staged; leave it out")
    if cloud.job_name and not cloud.template_location:
        raise ConfigError(
            f"--job_name={cloud.job_name} is refused: a job is found again by the name that follows from its run; leave it out"
        )
    if any(option.startswith("worker_accelerator") for option in cloud.dataflow_service_options or []):
        raise ConfigError("worker_accelerator is refused: only some steps need a GPU, and get it by resource hints; set gpu_type instead")
