"""The command `adstocrat`."""

import argparse
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from beam_jobs import PACKAGES, terminal
from beam_jobs.config import Config, ConfigError, load, suggestion
from beam_jobs.flags import Parser, add_setting, add_settings
from schemas.lake import check_month, months_between
from schemas.storage import open_storage
from serving.__main__ import add_flags, serve

_EPILOG = """\
a first month on this machine:
  adstocrat sample-data ./lake --months 2026-08:2026-10 --ads 20000 --creatives 2000
  adstocrat month 2026-08 --lake ./lake
  adstocrat serve --lake ./lake

one's own data: put CSV files in LAKE/raw/2026-10/ads/ and images in LAKE/raw/2026-10/images/, then
  adstocrat infer-contract LAKE/raw/2026-10/ads/*.csv --key ad_id --image image --clicks clicks --impressions impressions --out ads.pbtxt
  adstocrat month 2026-10 --lake LAKE --contract ads.pbtxt

`adstocrat COMMAND --help` tells more of each."""
_STAGES = ("ingest", "creatives", "realised", "encoder", "embed", "drift", "train", "evaluate", "score", "lookup", "publish")
# What one column of a contract may be, beside keys and segments.
_ROLES = {
    "image": "name of the ad's image in the month's images folder",
    "clicked": "0 or 1, the outcome of one impression",
    "clicks": "clicks of the ad, with --impressions",
    "impressions": "impressions of the ad, with --clicks",
    "position": "where the ad was shown, 1 being the reference",
}
_CSV = ("csv_newlines_in_values", "csv_encoding")
# The settings that matter to commands which look at what is there.
_WHERE = ("lake", "dataset", "bigquery_location", "max_bytes_billed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0 done, 1 the month cannot go on, 2 wrong usage or settings, 3 what is published differs, 4 an alarm
    stopped the month, 75 not ready yet, 130 interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    arguments, behind = given[:at], given[at + 1 :]
    parser, commands = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = commands.choices[parsed.command]
        command.error(f"unknown flag or argument {unknown[0]!r}{suggestion(unknown[0].partition('=')[0], command.known_flags())}")
    if behind and parsed.run not in (_month, _stage, _local_cloud):
        commands.choices[parsed.command].error(f"takes nothing behind --, but was given {behind[0]!r}")
    progress = sys.stderr if getattr(parsed, "json", False) else sys.stdout
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=progress)
    logging.getLogger().handlers[0].addFilter(terminal.worth_showing)
    for name in ("adstocrat", "serving"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return parsed.run(parsed, behind) or 0
    except KeyboardInterrupt:
        return terminal.fail(InterruptedError("interrupted; the same command goes on where it stopped"), 130)
    except (ValueError, OSError) as error:
        return terminal.fail(error, 2)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        # Of others, an extra was not installed.
        if package in PACKAGES:
            raise
        wanted = f"{package!r}, which this command needs, is not installed; run `pip install .[pipeline,serving]` in this package's source"
        return terminal.fail(ConfigError(wanted), 2)
    except RuntimeError as error:
        from beam_jobs.run import HandedOverError, stage_error

        if isinstance(error, HandedOverError):
            print(error)
            return 0
        if parsed.run is _local_cloud:
            return terminal.fail(error, 1)
        # Beam wraps what a stage raises; its own sentence is what a person needs.
        cause = stage_error(error)
        if cause is None:
            raise
        return terminal.fail(cause, cause.status)
    except Exception as error:
        # What Google's clients raise is a sentence; importing them to name it would cost every command a second.
        if type(error).__module__.partition(".")[0] != "google":
            raise
        return terminal.fail(error, 1)


def _parser() -> tuple[Parser, Any]:
    parser = Parser(prog="adstocrat", description="Monthly click probabilities for an inventory of ads.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace, list[str]], int | None], help: str, **options: Any) -> Parser:
        made: Parser = commands.add_parser(name, help=help, **options)
        made.set_defaults(run=run)
        return made

    sample = command("sample-data", _sample_data, "lay out sample months with a known truth")
    sample.add_argument("lake", help="gs://bucket[/prefix] or a folder")
    sample.add_argument("--months", required=True, metavar="FIRST:LAST", help="such as 2026-08:2026-10")
    sample.add_argument("--ads", type=int, default=20_000, help="rows a month (default: %(default)s)")
    sample.add_argument("--creatives", type=int, default=2_000, help="images a month (default: %(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="other seeds are other worlds (default: %(default)s)")

    infer = command("infer-contract", _infer_contract, "draft a contract from CSV files")
    infer.add_argument("files", nargs="+", metavar="FILE")
    infer.add_argument("--key", action="append", required=True, metavar="COLUMN", help="names an ad; more than one may be given")
    for tag, text in _ROLES.items():
        infer.add_argument(f"--{tag}", metavar="COLUMN", help=text)
    infer.add_argument("--segment", action="append", metavar="COLUMN", help="sliced by in reports; more than one may be given")
    for name in _CSV:
        add_setting(infer, name)
    infer.add_argument("--out", required=True, metavar="FILE", help="where the contract is written")

    behind = "Beam's own flags, the runner too, follow --."
    month = command("month", _month, "run a month, all stages in order", epilog=behind)
    stages = [command(stage, _stage, f"run the stage {stage} of a month alone", epilog=behind) for stage in _STAGES]
    rollback = command("rollback", _rollback, "make an earlier run of a month current again")
    for of_a_month in (month, *stages, rollback):
        of_a_month.add_argument("month", metavar="YYYY-MM")
        add_settings(of_a_month, _WHERE if of_a_month is rollback else ())
    month.add_argument("--plan", action="store_true", help="tell what it will take and cost, and run nothing")
    commands.choices["evaluate"].add_argument(
        "--write-tfma", metavar="DIR", help="write the results in the format of TensorFlow Model Analysis too; needs the extra `tfma`"
    )
    rollback.add_argument("--to", metavar="RUN", help="default: the last one published that is not current")
    rollback.add_argument("--keep-model", action="store_true", help="leave the champion, which the next month builds on")
    status = command("status", _status, "what BigQuery, the pointers and servers say is published; 3 where they differ")
    add_settings(status, _WHERE)
    status.add_argument(
        "--url", nargs="+", default=[], help="servers to ask, such as http://localhost:8080; ADSTOCRAT_TOKEN is sent if set"
    )

    report = command("report", _report, "make the page of a run again, and the one of all runs")
    report.add_argument("id", metavar="RUN")
    report.add_argument("--open", action="store_true", help="show it in a browser")
    add_settings(report, _WHERE)
    runs = command("runs", _runs, "list the runs of a lake")
    show = command("show", _show, "a run's inputs, verdict and ledger, as JSON")
    show.add_argument("id", metavar="RUN")
    gc = command("gc", _gc, "remove what no kept run and no pointer needs")
    gc.add_argument("--keep", type=int, required=True, metavar="N", help="newest runs of each month to keep, with all that they build on")
    gc.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    models = command("models", _models, "list the models of a lake, and what the gate said of them")
    promote = command("promote", _promote, "make a kept ranker the champion, so that the next run builds on it")
    promote.add_argument("version", metavar="VERSION")
    compare = command("compare", _compare, "two kept rankers on the same gate rows of the newest labelled month")
    compare.add_argument("versions", nargs=2, metavar="VERSION")
    for of_a_lake in (runs, show, gc, models, promote, compare):
        of_a_lake.add_argument("--lake", required=True, help="gs://bucket[/prefix] or a folder")
    for reporting in (month, status, report, runs, show, gc, models, compare):
        reporting.add_argument("--json", action="store_true", help="tell it as JSON, and progress on standard error")

    cloud = command(
        "local-cloud",
        _local_cloud,
        "emulators of Cloud Storage and BigQuery",
        description="Emulators of Cloud Storage, with the bucket gs://adstocrat, and of BigQuery. `start` and `status` print the way "
        'there: eval "$(adstocrat local-cloud start --state build/cloud)". Behind -- they last for one command.',
        usage="%(prog)s [start|stop|status] --state DIR [-- COMMAND…]",
    )
    cloud.add_argument("action", nargs="?", choices=("start", "stop", "status"))
    cloud.add_argument("--state", type=pathlib.Path, required=True, metavar="DIR", help="where objects, tables and logs are kept")

    add_flags(command("serve", lambda arguments, _: serve(arguments), "answer scores over HTTP from the current lookup"))
    return parser, commands


def _config(arguments: argparse.Namespace) -> Config:
    return load(arguments.config, {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Config)})


def _prepared(arguments: argparse.Namespace, flags: list[str]) -> Any:
    from beam_jobs.ready import check_delivery
    from beam_jobs.run import prepare, published_contract

    config = _config(arguments)
    if flags:
        from beam_jobs.runner import checked_options

        checked_options(flags)
    check_delivery(open_storage(config.lake), check_month(arguments.month), config.ingest_ready)
    # What is published again is what was made, whatever contract this command would begin with.
    return prepare(config, arguments.month, published_contract(config, arguments.month) if arguments.command == "publish" else None)


def _month(arguments: argparse.Namespace, flags: list[str]) -> None:
    run = _prepared(arguments, flags)
    if arguments.plan:
        from beam_jobs import plan

        terminal.tell(arguments, plan.numbers(run), plan.show)
        return
    from beam_jobs import report
    from beam_jobs.month import run_month
    from beam_jobs.run import stage_error

    try:
        summary = run_month(run, flags)
    except RuntimeError as error:
        if stage_error(error) and (stopped := report.read(run.storage, run.month, run.id)):
            terminal.tell_run(arguments, run, stopped)
        raise
    terminal.tell_run(arguments, run, summary)


def _stage(arguments: argparse.Namespace, flags: list[str]) -> None:
    from beam_jobs import report
    from beam_jobs.month import STAGES, run_stage

    folder = getattr(arguments, "write_tfma", None)
    if folder:
        from beam_jobs import tfma
        from beam_jobs.runner import run_pipeline

        tfma.check_installed()
    run = _prepared(arguments, flags)
    if run_stage(next(stage for stage in STAGES if stage.name == arguments.command), run, flags) and arguments.command == "publish":
        report.refresh(run)
    if folder:
        run_pipeline(lambda root: tfma.define_pipeline(root, run, folder), flags)


def _rollback(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs import report
    from beam_jobs.publish import rollback

    run = rollback(_config(arguments), arguments.month, arguments.to, arguments.keep_model)
    report.refresh(run)
    print(f"{run.month} is run {run.id} now")


def _status(arguments: argparse.Namespace, _: list[str]) -> int:
    from beam_jobs.status import lines, status

    told = status(_config(arguments), arguments.url)
    terminal.tell(arguments, told, lines)
    return 0 if told["agree"] else 3


def _sample_data(arguments: argparse.Namespace, _: list[str]) -> None:
    from schemas.sample import write_months

    first, _colon, last = arguments.months.partition(":")
    months = months_between(first, last or first)
    write_months(
        open_storage(arguments.lake), months, arguments.ads, arguments.creatives, arguments.seed, logging.getLogger("adstocrat").info
    )


def _infer_contract(arguments: argparse.Namespace, _: list[str]) -> None:
    from schemas import contract, draft
    from schemas.csv_records import Layout

    # No setting but those of CSV files matters, but a lake there must be.
    config = load(None, {"lake": ".", **{name: getattr(arguments, name) for name in _CSV}})
    layout = Layout(config.csv_newlines_in_values, config.csv_encoding)
    roles = {tag: [name] for tag in _ROLES if (name := getattr(arguments, tag))}
    drafted = draft.infer(arguments.files, {"key": arguments.key, "segment": arguments.segment or [], **roles}, layout)
    pathlib.Path(arguments.out).write_text(contract.dumps(drafted))
    print(
        f"{arguments.out}: {len(drafted.columns)} columns, {len(drafted.features)} of them features; look it through before the first month"
    )


def _report(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs import report

    run = report.of_run(_config(arguments), arguments.id)
    terminal.tell_run(arguments, run, report.write(run))
    if arguments.open:
        import tempfile
        import webbrowser

        # A copy, as what `local` fetches from a bucket is gone before a browser has read it.
        path = pathlib.Path(tempfile.mkdtemp(prefix="adstocrat-")) / "report.html"
        path.write_bytes(run.storage.read(f"{run.folder}/report.html"))
        webbrowser.open(path.as_uri())


def _runs(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs.runs import listed, table

    terminal.tell(arguments, listed(open_storage(arguments.lake)), table)


def _show(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs.runs import show

    print(show(open_storage(arguments.lake), arguments.id))


def _gc(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs.report import write_index
    from beam_jobs.runs import garbage

    storage = open_storage(arguments.lake)
    urls = []
    for name in garbage(storage, arguments.keep):
        urls.append(storage.url(name))
        if not arguments.dry_run:
            storage.delete(name)
    if not arguments.dry_run:
        write_index(storage)
    did = f"{len(urls):,} objects {'would be' if arguments.dry_run else 'were'} removed"
    terminal.tell(arguments, {"objects": urls, "dry_run": arguments.dry_run}, lambda told: "\n".join([*told["objects"], did]))


def _models(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs.models import listed, table

    terminal.tell(arguments, listed(open_storage(arguments.lake)), table)


def _promote(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs.models import promote

    champion = promote(open_storage(arguments.lake), arguments.version)
    print(f"champion: ranker {champion.ranker} with encoder {champion.encoder}")


def _compare(arguments: argparse.Namespace, _: list[str]) -> None:
    from beam_jobs.models import compare, side_by_side

    terminal.tell(arguments, compare(open_storage(arguments.lake), *arguments.versions), side_by_side)


def _local_cloud(arguments: argparse.Namespace, command: list[str]) -> int:
    from beam_jobs import local_cloud

    if bool(arguments.action) == bool(command):
        raise ConfigError("local-cloud takes start, stop or status, or else a command behind --")
    if command:
        return local_cloud.run(arguments.state, command)
    if arguments.action == "stop":
        local_cloud.stop(arguments.state)
        return 0
    environment = local_cloud.start(arguments.state) if arguments.action == "start" else local_cloud.status(arguments.state)
    if environment is None:
        print(f"no local cloud runs in {arguments.state}", file=sys.stderr)
        return 1
    print(local_cloud.export_lines(environment), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
