import inspect
import pathlib
import re

import apache_beam as beam
import pytest
from apache_beam.runners.worker.statesampler import StateSampler

from beam_jobs.config import Config, ConfigError
from beam_jobs.run import MonthRun
from beam_jobs.runner import checked_options, run_pipeline, run_step
from schemas import contract as contracts
from schemas.storage import Folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--direct_num_workers=2"],
        ["--direct_num_workers", "16"],
        ["--direct_num_workers=0"],
        ["--direct_running_mode=multi_threading"],
        ["--direct_running_mode", "multi_processing"],
        ["--runner=FnApiRunner", "--direct_num_workers=1", "--direct_running_mode=multi_processing"],
    ],
)
def test_what_loses_rows_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"is refused: Beam .* loses rows .* --runner"):
        checked_options(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runer=DataflowRunner"], "unknown Beam flag '--runer=DataflowRunner'; did you mean '--runner'"),
        (["--runner=FnApiRunner", "--tempp_location=gs://b/t"], "'--tempp_location=gs://b/t'; did you mean '--temp_location'"),
        (["--direct_num_worker=4"], "unknown Beam flag '--direct_num_worker=4'; did you mean '--direct_num_workers'"),
        (["stray"], "unknown Beam flag 'stray'"),
    ],
)
def test_unknown_flags_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_options(flags)


def test_known_flags_arrive() -> None:
    flags = ["--runner=DataflowRunner", "--project=p", "--region=r", "--temp_location=gs://b/t", "--max_num_workers=50", "--dry_run=True"]
    flags.append("--sdk_container_image=r-docker.pkg.dev/p/adstocrat/worker:1")
    options = checked_options([*flags, "--direct_num_workers=1", "--direct_running_mode=in_memory"]).get_all_options()
    assert (options["runner"], options["project"], options["region"], options["max_num_workers"]) == ("DataflowRunner", "p", "r", 50)


def write(number: int, folder: pathlib.Path) -> None:
    (folder / str(number)).touch()


@pytest.fixture
def run(tmp_path: pathlib.Path) -> MonthRun:
    config = Config(lake=str(tmp_path / "lake"))
    return MonthRun(Folder(config.lake), contracts.load(contracts.DEFAULT), config, "2026-10", "r", (), None, None)


def test_a_pipeline_is_run_to_its_end_and_what_it_used_is_noted(run: MonthRun, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    run.storage.write(f"{run.spill}/section", b"spilled")
    run_step(lambda root: root | beam.Create([1, 2, 3]) | beam.Map(write, folder), [], run, "step-of-it")
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]
    assert not run.storage.names(f"{run.spill}/")
    (note,) = run.storage.names("runs/2026-10/r/used/")
    used = run.storage.read_json(note)
    assert used.pop("seconds") > 0 and used == {"step": "step-of-it"}


def test_bundles_end_without_waiting_for_a_sample(run: MonthRun) -> None:
    run_pipeline(lambda root: root | beam.Create([1]), [])
    defaults = {
        name: part.default for name, part in inspect.signature(StateSampler.__init__).parameters.items() if part.default != part.empty
    }
    assert defaults == {"sampling_period_ms": 10}


def test_a_refused_flag_runs_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError):
        run_pipeline(lambda root: root | beam.Create([1]) | beam.Map(write, tmp_path), ["--direct_num_workers=2"])
    assert not list(tmp_path.iterdir())


DATAFLOW = ["--runner=DataflowRunner", "--project=p", "--region=r", "--temp_location=gs://b/t"]
IMAGE = "--sdk_container_image=r-docker.pkg.dev/p/adstocrat/worker:1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--sdk_container_image is missing; expected the image built from deploy/dataflow/Dockerfile"),
        ([IMAGE, "--save_main_session"], "--save_main_session is refused: workers run what --sdk_container_image holds"),
        ([IMAGE, "--setup_file=./setup.py"], "--setup_file is refused"),
        ([IMAGE, "--requirements_file=requirements.txt"], "--requirements_file is refused"),
        ([IMAGE, "--extra_package=a.tar.gz"], "--extra_packages is refused"),
        ([IMAGE, "--job_name=mine"], "--job_name=mine is refused: a job is found again by the name that follows from its run"),
        ([IMAGE, "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1"], "worker_accelerator is refused: only some steps"),
    ],
)
def test_what_a_dataflow_job_cannot_use_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        checked_options([*DATAFLOW, *flags])
