import pathlib

import apache_beam as beam
import pytest

from beam_jobs.config import ConfigError
from beam_jobs.runner import checked_options, run_pipeline


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
    options = checked_options([*flags, "--direct_num_workers=1", "--direct_running_mode=in_memory"]).get_all_options()
    assert (options["runner"], options["project"], options["region"], options["max_num_workers"]) == ("DataflowRunner", "p", "r", 50)


def write(number: int, folder: pathlib.Path) -> None:
    (folder / str(number)).touch()


def test_a_pipeline_is_run_to_its_end(tmp_path: pathlib.Path) -> None:
    run_pipeline(lambda root: root | beam.Create([1, 2, 3]) | beam.Map(write, tmp_path), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


def test_a_refused_flag_runs_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError):
        run_pipeline(lambda root: root | beam.Create([1]) | beam.Map(write, tmp_path), ["--direct_num_workers=2"])
    assert not list(tmp_path.iterdir())
