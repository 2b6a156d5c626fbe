"""The command: what it prints, what it refuses and how it ends."""

import pathlib
import subprocess
import sys

import pytest

from beam_jobs import cli
from beam_jobs.config import Config, ConfigError
from beam_jobs.month import STAGES
from beam_jobs.run import StageError
from beam_jobs.runner import checked_options
from schemas import contract as contracts
from schemas import draft

COMMANDS = ["sample-data", "infer-contract", "month", *cli._STAGES, "rollback", "status", "report", "local-cloud", "serve"]
ONE_MONTH = ["month", "2026-10"]
CSV = b"id,slot,photo,bid,n,k\n007,top,p.jpg,0.5,10,1\n7,side,,1,,\n"


def run(*arguments: str) -> int:
    """Exit status, whether it was returned or raised."""
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code


def test_help_names_every_command_and_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for command in (*COMMANDS, *(stage.name for stage in STAGES)):
        assert f"\n    {command}" in shown


def test_the_stages_of_the_command_are_those_of_the_month() -> None:
    assert tuple(stage.name for stage in STAGES) == cli._STAGES


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(command, "--help") == 0
    assert f"usage: adstocrat {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["month", "train"])
def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize("command", ["rollback", "status", "report"])
def test_commands_that_look_take_every_setting_and_tell_those_that_matter(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "--dataset" in shown and "--max-ne-loss" not in shown and "are taken too" in shown
    assert run(command, *(["2026-08"] if command != "status" else []), "--lake", "./lake", "--max-ne-loss", "2") == 2
    assert "max_ne_loss is 2.0; expected a number from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see `adstocrat --help`"),
        (["moth"], "'moth' is none of sample-data, infer-contract, month, "),
        (["moth"], "serve; did you mean 'month'?; see `adstocrat --help`"),
        (["month", "--lake", "./a"], "adstocrat month: the following arguments are required: YYYY-MM; see `adstocrat month --help`"),
        ([*ONE_MONTH, "--lkae", "./a"], "unknown flag or argument '--lkae'; did you mean '--lake'?; see `adstocrat month --help`"),
        ([*ONE_MONTH, "--window-month=2"], "unknown flag or argument '--window-month=2'; did you mean '--window-months'?"),
        ([*ONE_MONTH, "--lake", "./a", "2026-11"], "unknown flag or argument '2026-11'"),
        ([*ONE_MONTH, "--runner", "FlinkRunner"], "unknown flag or argument '--runner'"),
        ([*ONE_MONTH, "--seed", "three"], "argument --seed: invalid int value: 'three'"),
        ([*ONE_MONTH], "lake is ''; expected gs://bucket[/prefix] or a folder, as --lake or in the config file"),
        ([*ONE_MONTH, "--lake", "./a", "--seed", "-1"], "seed is -1; expected a whole number of at least 0"),
        ([*ONE_MONTH, "--lake", "./a", "--config", "none.yaml"], "config file 'none.yaml' does not exist"),
        ([*ONE_MONTH, "--lake", "s3://bucket"], "'s3://bucket' has an unknown scheme"),
        ([*ONE_MONTH, "--lake", "./a", "--contract", "none.pbtxt"], "contract 'none.pbtxt' does not exist; draft one with"),
        (["month", "2026-13", "--lake", "./a"], "month '2026-13' is not a month; expected YYYY-MM, such as 2026-10"),
        (
            [*ONE_MONTH, "--lake", "./a", "--publish-gone", "tv"],
            "publish_gone is ['tv']; expected a list of COLUMN=VALUE, such as [device=tv]",
        ),
        (["rollback", "--lake", "./a"], "adstocrat rollback: the following arguments are required: YYYY-MM"),
        (["status"], "lake is ''; expected gs://bucket[/prefix] or a folder"),
        (["score", "october", "--lake", "./a"], "month 'october' is not a month"),
        (["infer-contract", "a.csv", "--out", "c"], "the following arguments are required: --key"),
        (["infer-contract", "none.csv", "--key", "id", "--out", "c"], "'none.csv' cannot be read as CSV"),
        (["sample-data", "./a", "--months", "2026-10:2026-09"], "months 2026-10:2026-09 run backwards"),
        (["serve", "--lake", "./a", "--prot", "1"], "unknown flag or argument '--prot'; did you mean '--port'?"),
        (["local-cloud", "--state", "./s"], "local-cloud takes start, stop or status, or else a command behind --"),
        (["local-cloud", "start", "--state", "./s", "--", "true"], "local-cloud takes start, stop or status, or else"),
    ],
)
def test_wrong_usage_and_settings_end_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("adstocrat")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["month", "ingest", "publish"])
def test_a_month_that_cannot_go_on_ends_with_1(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, command: str) -> None:
    assert run(command, "2026-10", "--lake", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("adstocrat: month 2026-10 has no ads: expected *.csv or *.csv.gz in ")


def test_a_stage_s_own_sentence_is_shown_from_inside_what_beam_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def fails(*_: object) -> None:
        try:
            raise StageError("the rows are not complete")
        except StageError as error:
            raise RuntimeError("Traceback … while running a step") from error

    monkeypatch.setattr("beam_jobs.run.prepare", fails)
    assert run(*ONE_MONTH, "--lake", str(tmp_path)) == 1
    assert capsys.readouterr().err == "adstocrat: the rows are not complete\n"


def test_what_no_stage_foresaw_is_raised_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("beam_jobs.run.prepare", fails)
    with pytest.raises(RuntimeError, match="unforeseen"):
        cli.main([*ONE_MONTH, "--lake", str(tmp_path)])


@pytest.mark.parametrize(
    ("missing", "status", "told"),
    [
        ("apache_beam", 2, "adstocrat: 'apache_beam', which this command needs, is not installed; run `pip install .[pipeline,serving]`"),
        # What is this package's own is a fault of it.
        ("beam_jobs.models", 1, "Traceback (most recent call last)"),
    ],
)
def test_what_is_not_installed_is_named_with_the_extra_that_has_it(tmp_path: pathlib.Path, missing: str, status: int, told: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from beam_jobs.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "models", "--lake", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == status and done.stderr.startswith(told)


def test_flags_win_over_the_file_and_what_follows_the_dashes_is_beam_s(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "month.yaml").write_text("lake: ./from-file\nseed: 3\nfetch_threads: 5\n")
    prepared: list[Config] = []
    launched: list[list[str]] = []
    monkeypatch.setattr("beam_jobs.run.prepare", lambda config, *_: prepared.append(config))
    monkeypatch.setattr("beam_jobs.month.run_month", lambda run, flags: launched.append(flags))
    monkeypatch.setattr("beam_jobs.terminal.tell_run", lambda *_: None)
    flags = ["--config", str(tmp_path / "month.yaml"), "--seed", "4", "--window-months=2"]
    assert run(*ONE_MONTH, *flags, "--", "--runner=FlinkRunner", "--parallelism", "4") == 0
    assert prepared == [Config("./from-file", seed=4, fetch_threads=5, window_months=2)]
    assert launched == [["--runner=FlinkRunner", "--parallelism", "4"]]


@pytest.mark.parametrize("stage", cli._STAGES)
def test_a_stage_s_command_runs_that_stage_alone(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    ran: list[str] = []
    monkeypatch.setattr("beam_jobs.run.prepare", lambda *_: None)
    monkeypatch.setattr("beam_jobs.month.run_stage", lambda stage, run, flags: ran.append(stage.name))
    assert run(stage, "2026-10", "--lake", "./a") == 0
    assert ran == [stage]


def test_infer_contract_writes_a_contract_that_loads(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    source, out = tmp_path / "a.csv", tmp_path / "c.pbtxt"
    source.write_bytes(CSV)
    roles = ["--key", "id", "--image", "photo", "--clicks", "k", "--impressions", "n", "--segment", "slot"]
    assert run("infer-contract", str(source), *roles, "--out", str(out)) == 0
    contract = contracts.load(out)
    assert contract == draft.infer(
        [str(source)], {"key": ["id"], "image": ["photo"], "clicks": ["k"], "impressions": ["n"], "segment": ["slot"]}
    )
    assert [column.name for column in contract.features] == ["slot", "bid"]
    assert capsys.readouterr().out == f"{out}: 6 columns, 2 of them features; look it through before the first month\n"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["--key", "ad_id"], "--key 'ad_id' is not a column of the files; expected one of id, slot, photo, bid, n, k"),
        (["--key", "id", "--clicks", "k"], "the outcome is either one column tagged 'clicked', or"),
        (["--key", "id", "--clicked", "slot"], "'slot' is an outcome of type 'bytes'; expected INT"),
    ],
)
def test_roles_that_make_no_contract_leave_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, roles: list[str], message: str
) -> None:
    source, out = tmp_path / "a.csv", tmp_path / "c.pbtxt"
    source.write_bytes(CSV)
    assert run("infer-contract", str(source), *roles, "--out", str(out)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--runner=FlinkRunner", "--flink_master=host:8081"],
        ["--runner", "DataflowRunner", "--project=p", "--region=r", "--temp_location=gs://b/t", "--sdk_container_image=i/worker:1"],
        ["--direct_num_workers=1", "--direct_running_mode=in_memory"],
    ],
)
def test_beam_s_own_flags_are_passed_on(flags: list[str]) -> None:
    given = checked_options(flags).get_all_options(drop_default=True)
    assert given.get("runner") == (
        ("FlinkRunner" if "Flink" in flags[0] else "DataflowRunner") if any("runner" in f for f in flags) else None
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runer=FlinkRunner"], "unknown Beam flag '--runer=FlinkRunner'; did you mean '--runner'?"),
        (["--num_worker", "3"], "unknown Beam flag '--num_worker'; did you mean '--num_workers'?"),
        (["--seed=3"], "unknown Beam flag '--seed=3'"),
        (["FlinkRunner"], "unknown Beam flag 'FlinkRunner'"),
        (["--direct_num_workers=2"], "--direct_num_workers=2 is refused: Beam 2.77 loses rows with several local workers"),
        (["--direct_num_workers", "0"], "--direct_num_workers=0 is refused"),
        (["--direct_running_mode=multi_processing"], "--direct_running_mode=multi_processing is refused"),
        (["--direct_running_mode", "multi_threading"], "--direct_running_mode=multi_threading is refused"),
    ],
)
def test_unknown_and_harmful_beam_flags_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        checked_options(flags)
    assert message in str(refused.value)


@pytest.mark.parametrize("command", [["sample-data", "./a", "--months", "2026-10"], ["serve", "--lake", "./a"]])
def test_flags_for_beam_are_refused_where_beam_does_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    for unreached in ("schemas.sample.write_months", "serving.__main__.serve"):
        monkeypatch.setattr(unreached, lambda *_: None)
    assert run(*command, "--", "--runner=FlinkRunner") == 2
    assert "--runner=FlinkRunner" in capsys.readouterr().err
