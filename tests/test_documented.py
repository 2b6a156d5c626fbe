"""Each command that README, docs and deploy files tell one to run is run: by a test, by a script that is, or it says what it needs."""

import glob
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from beam_jobs import cli
from schemas import contract
from serving import tokens

TOP = pathlib.Path(__file__).parent.parent
PAGES = sorted([TOP / "README.md", *TOP.glob("docs/*.md"), *(path for path in TOP.glob("deploy/*/*") if path.is_file())])
# Where there is nothing to run these on, the page says what they need, and beside it what is tested without.
ELSEWHERE = {"gcloud": "Google Cloud project", "docker": "container engine", "kubectl": "Kubernetes cluster"}
SHELL = re.compile(
    r'(?:[A-Z]+=\S+ +)*(?:eval "\$\()?(?:adstocrat|python -m|pip|go|curl|gcloud|docker|kubectl|(?:scripts|deploy)/[\w/]*\w)(?= |$)'
)
# A file, and what of it runs the command.
RUN_BY = {
    "adstocrat compare": ("tests/test_models.py", '"compare"'),
    "adstocrat evaluate": ("tests/test_models.py", 'main(["evaluate"'),
    "adstocrat gc": ("tests/test_end_to_end.py", 'adstocrat("gc"'),
    "adstocrat infer-contract": ("tests/test_documented.py", "def test_a_contract_is_drafted"),
    "adstocrat local-cloud": ("tests/test_cluster.py", "def test_the_steps_of_the_readme"),
    "adstocrat models": ("tests/test_models.py", '"models"'),
    "adstocrat month": ("scripts/demo", "adstocrat month"),
    "adstocrat promote": ("tests/test_models.py", '"promote"'),
    "adstocrat publish": ("tests/test_publish.py", '"publish"'),
    "adstocrat report": ("tests/test_report.py", '"report"'),
    "adstocrat rollback": ("tests/test_publish.py", '"rollback"'),
    "adstocrat runs": ("tests/test_end_to_end.py", 'adstocrat("runs"'),
    "adstocrat sample-data": ("scripts/demo", "adstocrat sample-data"),
    "adstocrat serve": ("scripts/demo", "adstocrat serve"),
    "adstocrat show": ("tests/test_end_to_end.py", 'adstocrat("show"'),
    "adstocrat status": ("tests/test_publish.py", '"status"'),
    "curl": ("scripts/demo", "/v1/scores/"),
    "deploy/dataflow/setup": ("tests/test_dataflow.py", 'DEPLOY / "setup"'),
    "go install": ("scripts/test", "go install"),
    "pip install .[pipeline,serving]": ("tests/test_dataflow.py", "[pipeline]"),
    "pip install .[pipeline,tfma]": ("tests/test_tfma.py", "tensorflow_model_analysis"),
    "pip install .[serving]": ("tests/test_serving_load.py", "[serving]"),
    "python -m serving": ("tests/served.py", '"serving"'),
    "python -m serving.tokens": ("tests/test_documented.py", "def test_a_token_is_made"),
    # It measures, for minutes, whenever numbers are wanted: that it is there is all that is tested.
    "scripts/bench": ("bench/serving.py", "scripts/bench serving"),
    "scripts/demo": (".ci/run", "scripts/demo"),
    "scripts/flink": ("tests/test_cluster.py", '"flink"'),
    "scripts/simulate_scaling": ("tests/test_deploy_serving.py", '"simulate_scaling.py"'),
    "scripts/test": (".ci/run", "scripts/test"),
}
FLAG = re.compile(r"--[a-z][a-z_-]+")


def commands(page: pathlib.Path) -> Iterator[str]:
    """Lines of shell blocks and what stands in backquotes; in files that are no pages, the comments that are commands."""
    text = page.read_text()
    if page.suffix == ".md":
        fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
        found = [line for kind, block in fenced.findall(text) if not kind for line in block.replace("\\\n", " ").splitlines()]
        found += re.findall(r"`([^`]+)`", fenced.sub("", text))
    else:
        found = [line for comment in re.findall(r"^# {2,}(.*)", text, re.MULTILINE) for line in comment.split(" && ")]
    yield from (re.sub(r"\s+", " ", line.partition("  #")[0].strip()) for line in found if SHELL.match(line))


def short(command: str) -> str:
    """A command without what differs from call to call."""
    command = re.sub(r'^(?:[A-Z]+=\S+ )*(?:eval "\$\()?', "", command)
    words = command.split()
    keep = {"adstocrat": 2, "go": 2, "pip": 3, "python": 3}.get(words[0], 1)
    return " ".join(words[:keep])


ALL = [(page, command) for page in PAGES for command in commands(page)]


def test_each_command_is_run_or_says_what_it_needs() -> None:
    found = {short(command) for _, command in ALL} - {"adstocrat"}
    assert found - ELSEWHERE.keys() == RUN_BY.keys()
    for page, command in ALL:
        for program in ELSEWHERE.keys() & set(command.split()[:1]):
            assert re.search(rf"[Nn]eeds? a {ELSEWHERE[program]}", page.read_text()), f"{page} does not say what {command} needs"


@pytest.mark.parametrize("command", RUN_BY)
def test_what_runs_a_command_is_there(command: str) -> None:
    file, text = RUN_BY[command]
    assert text in (TOP / file).read_text()


def test_commands_have_their_flags_and_each_is_tried() -> None:
    _, known = cli._parser()
    flags = {name: {flag for action in parser._actions for flag in action.option_strings} for name, parser in known.choices.items()}
    scripts = [path for pattern in ("tests/*.py", "scripts/*", "deploy/dataflow/month") for path in TOP.glob(pattern) if path.is_file()]
    tried = set(FLAG.findall("".join(path.read_text() for path in scripts)))
    for page, command in ALL:
        ours = set(FLAG.findall(command.partition(" -- ")[0]))
        if command.startswith("adstocrat "):
            assert ours <= flags[command.split()[1]], f"{page}: {command}"
        # What is drafted is run as it stands there, below.
        if short(command) not in {*ELSEWHERE, "adstocrat infer-contract"}:
            assert set(FLAG.findall(command)) <= tried, f"{page}: {command}"


def test_a_contract_is_drafted_as_the_readme_says(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ads = tmp_path / "LAKE/raw/2026-10/ads"
    ads.mkdir(parents=True)
    (ads / "a.csv").write_text("ad_id,image,device,position,bid,impressions,clicks\n007,a.jpg,tv,1,0.5,10,1\n8,,mobile,2,0.7,4,0\n")
    monkeypatch.chdir(tmp_path)
    (command,) = (command for page, command in ALL if short(command) == "adstocrat infer-contract")
    words = [name for word in shlex.split(command)[1:] for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    assert cli.main(words) == 0
    drafted = contract.load("ads.pbtxt")
    roles = {tag: column.name for column in drafted.columns for tag in column.tags - {"categorical"}}
    same = {"image", "clicks", "impressions", "position"}
    assert roles == {"key": "ad_id", "segment": "device"} | {name: name for name in same}


def test_a_token_is_made_as_the_readme_says(tmp_path: pathlib.Path) -> None:
    (command,) = {command for _, command in ALL if command == "python -m serving.tokens FILE ID"}
    made = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOP)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.startswith("ID.") and tokens.read(tmp_path / "FILE").keys() == {b"ID"}
