"""What the runbook and the alert rules name is there in the code, and what the code can say is in the runbook."""

import inspect
import pathlib
import re

import yaml
from prometheus_client import CollectorRegistry, generate_latest

from beam_jobs import drift, realised
from beam_jobs.config import Config
from beam_jobs.notify import payload
from beam_jobs.ready import NotReadyError
from beam_jobs.run import AlarmError, StageError
from serving.counters import BYTES, STATUSES, Counters
from serving.metrics import Served

TOP = pathlib.Path(__file__).parent.parent
RUNBOOK = (TOP / "docs/runbook.md").read_text()
RULES = yaml.safe_load((TOP / "deploy/serving/alerts.yaml").read_text())["groups"][0]["rules"]


class Table:
    month, run, model_version, rows, age_days = "2026-10", "r", "m", 1, 1.0


def firsts(heading: str) -> list[str]:
    """First cells of the table below a heading."""
    part = RUNBOOK.partition(f"## {heading}")[2].partition("\n## ")[0]
    return [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")][1:]


def test_each_exit_status_is_explained() -> None:
    source = (TOP / "beam_jobs/cli.py").read_text()
    written = {int(status) for status in re.findall(r"fail\([^\n]*, (\d+)\)", source)}
    assert "else 3" in source and "fail(cause, cause.status)" in source
    raised = {error.status for error in (StageError, AlarmError, NotReadyError)}
    assert {int(status) for status in firsts("Exit status")} == written | {0, 3} | raised


def test_each_alarm_is_explained() -> None:
    actions = [f"realised {action}" for action in (realised.WARN, realised.SCRATCH, realised.STOP)]
    assert firsts("Alarms of a month") == [*drift.KINDS, *actions]


def test_each_alert_is_explained_and_its_metrics_are_told() -> None:
    assert firsts("Alerts of the service") == [rule["alert"] for rule in RULES]
    registry = CollectorRegistry()
    registry.register(Served([Counters(bytearray(BYTES))], Table()))  # type: ignore[arg-type]
    told = {line.split("{")[0].split(" ")[0] for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")}
    counted = {"adstocrat_requests_total"}  # There once something was asked.
    wanted = {name for rule in RULES for name in re.findall(r"adstocrat_\w+", rule["expr"])}
    assert wanted - counted <= told and len(wanted) >= 6 and any(status >= 500 for status in STATUSES)
    assert set(re.findall(r"`(adstocrat_\w+)`", RUNBOOK)) == wanted
    for what in ("month_timestamp", "age_days) > 35", "tables_differ", "refused_swaps", "5.."):
        assert any(what in rule["expr"] for rule in RULES)


def test_settings_are_there() -> None:
    settings = set(re.findall(r"(?:monitor|ingest|notify|publish)_[a-z]+", RUNBOOK))
    assert settings <= set(Config.__dataclass_fields__) and {"monitor_warn", "monitor_abort", "monitor_missing"} <= settings


def test_the_payload_is_what_is_documented() -> None:
    fields = set(re.findall(r"`(\w+)`", " ".join(firsts("The webhook"))))
    assert fields == set(re.findall(r'^        "(\w+)":', inspect.getsource(payload), re.MULTILINE))
