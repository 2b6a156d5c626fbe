"""Settings come from a file and from flags, flags win, and what cannot be used is refused with the fix."""

import dataclasses
import pathlib
from typing import Any

import pytest

from beam_jobs.config import Config, ConfigError, load, suggestion
from schemas import contract
from schemas.contract import ContractError
from schemas.storage import open_storage


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "month.yaml"


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("lake: ./a", {}, Config("./a")),
        ("lake: ./a\nseed: 3", {"seed": 4, "lake": None}, Config("./a", seed=4)),
        ("lake: ./a\nseed: 3", {"seed": 0}, Config("./a", seed=0)),
        ("lake: ./a", {"lake": "gs://bucket", "dataset": "p.d"}, Config("gs://bucket", dataset="p.d")),
        ("lake: gs://bucket\ndataset: p.d\n", {"window_months": 12}, Config("gs://bucket", dataset="p.d", window_months=12)),
        ("# nothing\n", {"lake": "./a"}, Config("./a")),
        ("", {"lake": "./a"}, Config("./a")),
        (
            "lake: ./a\npublish: {max_mean_shift: 0.2, gone: [device=tv, a=b=c]}",
            {"accept_shift": True},
            Config("./a", publish_max_mean_shift=0.2, publish_gone=("device=tv", "a=b=c"), accept_shift=True),
        ),
        ("lake: ./a\ndataset: null\ncontract: ads.pbtxt", {}, Config("./a", contract="ads.pbtxt")),
    ],
)
def test_flags_win_over_the_file_and_the_file_over_defaults(file: pathlib.Path, text: str, flags: dict[str, Any], expected: Config) -> None:
    file.write_text(text)
    assert load(str(file), flags) == expected


def test_flags_alone_are_enough() -> None:
    assert load(None, {"lake": "./a"}) == Config("./a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lake: ./a\nwindow_month: 2", "unknown setting 'window_month' in {file}; did you mean 'window_months'?"),
        ("lake: ./a\nwindow-months: 2", "unknown setting 'window-months' in {file}; did you mean 'window_months'?"),
        ("lake: ./a\nrunner: flink", "unknown setting 'runner' in {file}"),
        ("lake: ./a\n7: 2", "unknown setting 7 in {file}"),
        ("- lake", "config file '{file}' holds a list; expected settings, one `name: value` a line"),
        ("lake", "config file '{file}' holds a str; expected settings"),
        ("lake: [", "config file '{file}' is not YAML"),
        ("", "lake is ''; expected gs://bucket[/prefix] or a folder, as --lake or in the config file"),
        ("lake: null", "lake is None; expected gs://bucket[/prefix] or a folder"),
        ("lake: 7", "lake is 7; expected gs://bucket[/prefix] or a folder"),
        ("lake: ./a\nseed: three", "seed is 'three'; expected a whole number of at least 0"),
        ("lake: ./a\nseed: -1", "seed is -1; expected a whole number of at least 0"),
        ("lake: ./a\nseed: true", "seed is True; expected a whole number"),
        ("lake: ./a\nseed: 1.5", "seed is 1.5; expected a whole number"),
        ("lake: ./a\nseed: null", "seed is None; expected a whole number"),
        ("lake: ./a\nencoder: {refresh: 3}", "encoder_refresh is 3; expected `never`, `drift`, or `months` and a number"),
        ("lake: ./a\nencoder: {refresh: months 0}", "encoder_refresh is 'months 0'; expected `never`"),
        ("lake: ./a\nencoder: {backbone: ResNet50}", "encoder_backbone is 'ResNet50'; expected a network and a file in the lake"),
        ("lake: ./a\ntrain: {mode: warm}", "train_mode is 'warm'; expected refresh, scratch or auto"),
        ("lake: ./a\ntrain: {negatives: 0}", "train_negatives is 0; expected a number above 0 and up to 1"),
        ("lake: ./a\nwindow_months: 0", "window_months is 0; expected a whole number of at least 1"),
        ("lake: ./a\nfetch_threads: 0", "fetch_threads is 0; expected a whole number of at least 1"),
        ("lake: ./a\nmax_bytes_billed: 0", "max_bytes_billed is 0; expected a whole number of at least 1"),
        ("lake: ./a\npublish: {max_mean_shift: 0}", "publish_max_mean_shift is 0; expected a number above 0, such as 0.1"),
        ("lake: ./a\npublish: {gone: device=tv}", "publish_gone is 'device=tv'; expected a list of COLUMN=VALUE"),
        ("lake: ./a\naccept_shift: 1", "accept_shift is 1; expected true or false"),
        ("lake: gs://bucket\ndataset: ads", "dataset is 'ads'; expected PROJECT.DATASET, such as my-project.ads"),
        ("lake: gs://bucket\ndataset: p.d.t", "dataset is 'p.d.t'; expected PROJECT.DATASET"),
        ("lake: gs://bucket\ndataset: 1.5", "dataset is 1.5; expected PROJECT.DATASET"),
        ("lake: ./a\nmonitor: {missing: 2}", "monitor_missing is 2; expected a number from 0 to 1"),
        ("lake: ./a\nmonitor: {stop: missing}", "monitor_stop is 'missing'; expected a list of kinds of alarm and columns"),
        (
            "lake: ./a\nmonitor: {warn: 0.3}",
            "monitor_warn, monitor_scratch and monitor_abort are [0.3, 0.25, 0.5]; expected none below the one before",
        ),
        ("lake: ./a\nmonitor: {abort: 0}", "monitor_abort is 0; expected a number above 0, such as 0.5"),
        ("lake: ./a\nprices: {gpu_hour: free}", "prices_gpu_hour is 'free'; expected a number of at least 0"),
        ("lake: ./a\nnotify: example.com", "notify is 'example.com'; expected a URL that begins with http:// or https://"),
        ("lake: ./a\nmin_gate_clicks: 0", "min_gate_clicks is 0; expected a whole number of at least 1"),
        ("lake: ./a\nmax_ne_loss: 5 %", "max_ne_loss is '5 %'; expected a number from 0 to 1, such as 0.005"),
        ("lake: ./a\nrequire_promotion: 1", "require_promotion is 1; expected true or false"),
        ("lake: ./a\ncsv_newlines_in_values: 1", "csv_newlines_in_values is 1; expected true or false"),
        ("lake: ./a\ncsv_encoding: latin-9000", "csv_encoding is 'latin-9000'; expected an encoding that Python knows, such as latin-1"),
        ("lake: ./a\ncsv_encoding: base64", "csv_encoding is 'base64'; expected an encoding"),
        ("lake: ./a\ncsv_encoding: 8", "csv_encoding is 8; expected an encoding"),
        ("lake: ./a\ncontract: 7", "contract is 7; expected text"),
        ("lake: ./a\nbigquery_location: null", "bigquery_location is None; expected text"),
        ("lake: ./a\ndataset: p.d", "dataset is 'p.d' but lake is the folder './a', which BigQuery cannot load from; use gs://"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(file: pathlib.Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(str(file), {})
    assert message.format(file=file) in str(refused.value)


def test_a_file_that_is_not_there_is_refused(file: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"month\.yaml' does not exist"):
        load(str(file), {"lake": "./a"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("window_month", "; did you mean 'window_months'?"), ("sead", "; did you mean 'seed'?"), ("colour", ""), ("", "")],
)
def test_a_close_name_is_suggested(name: str, expected: str) -> None:
    assert suggestion(name, ["window_months", "seed"]) == expected


def test_only_settings_that_change_what_is_computed_make_another_run() -> None:
    plain = Config("./a")
    other = Config("gs://bucket", "p.d", "c.pbtxt", fetch_threads=99, bigquery_location="EU", max_bytes_billed=1)
    expected = {
        **{"window_months": 3, "seed": 0, "csv_newlines_in_values": True, "csv_encoding": "utf-8"},
        **{"encoder_refresh": "months 3", "encoder_backbone": "", "train_mode": "auto", "train_negatives": 1.0},
        **{"max_ne_loss": 0.005, "min_gate_clicks": 1000, "monitor_scratch": 0.25},
    }
    assert plain.affecting_model() == other.affecting_model() == expected
    assert Config("./a", seed=1).affecting_model() != plain.affecting_model()


def test_every_setting_says_what_it_is() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(Config))


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "month.yaml"
    path.write_bytes(b"lake: ./gr\xf6\xdfe")
    with pytest.raises(ConfigError, match=r"month.yaml' is not UTF-8 \(.*\); save it as UTF-8"):
        load(str(path), {})


def test_settings_and_contract_may_lie_in_the_bucket(cloud: dict[str, str], tmp_path: pathlib.Path) -> None:
    bucket = open_storage(f"gs://adstocrat/{tmp_path.name}")
    with pytest.raises(ConfigError, match=rf"{tmp_path.name}/month\.yaml' does not exist"):
        load(f"{bucket.uri}/month.yaml", {"lake": bucket.uri})
    bucket.write("month.yaml", f"lake: {bucket.uri}\nseed: 7\ncontract: {bucket.uri}/config/ads.pbtxt\n".encode())
    config = load(f"{bucket.uri}/month.yaml", {})
    assert (config.lake, config.seed) == (bucket.uri, 7)
    with pytest.raises(ContractError, match=r"config/ads\.pbtxt' does not exist; draft one with"):
        contract.load(str(config.contract))
    bucket.write("config/ads.pbtxt", contract.DEFAULT.read_bytes())
    assert contract.load(str(config.contract)) == contract.load(contract.DEFAULT)
    bucket.write("config/ads.pbtxt", b"feature { name: 'gr\xf6\xdfe' }")
    with pytest.raises(ContractError, match="is not UTF-8"):
        contract.load(str(config.contract))
    with pytest.raises(ValueError, match="s3://bucket' has an unknown scheme"):
        load("s3://bucket/month.yaml", {})
