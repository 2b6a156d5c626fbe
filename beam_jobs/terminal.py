"""What the command shows: reports as text or as JSON, a run in short, and errors in a sentence."""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beam_jobs.report import Summary
    from beam_jobs.run import MonthRun


def worth_showing(record: logging.LogRecord) -> bool:
    """Not what Beam says of a package that only its model manager needs, nor its traceback of an error that is told in a sentence."""
    error = record.exc_info and record.exc_info[0]
    ours = error and (issubclass(error, OSError) or error.__module__.partition(".")[0] in ("beam_jobs", "schemas", "model"))
    return not ours and "Resource module is not available" not in str(record.msg)


def fail(error: BaseException, status: int) -> int:
    # Beam adds the step that it was running, which says nothing to a person.
    print(f"adstocrat: {str(error).partition(' [while running')[0]}", file=sys.stderr)
    return status


def tell_run(arguments: argparse.Namespace, run: "MonthRun", summary: "Summary") -> None:
    """Print a run in short, and where its page is."""
    url = run.storage.url(f"{run.folder}/report.html")
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(summary), "report": url}, indent=1))
    else:
        _show(summary, url)


def tell(arguments: argparse.Namespace, told: Any, as_text: Callable[[Any], str]) -> None:
    """Print what a command reports, as text or as JSON."""
    print(json.dumps(told, indent=1) if arguments.json else as_text(told))


def _show(summary: "Summary", url: str) -> None:
    """The summary on the terminal: what changed first, in colours where there are such."""
    from rich.console import Console
    from rich.text import Text

    from beam_jobs import report

    console = Console(soft_wrap=True, highlight=False)
    style = {report.PUBLISHED: "bold green", report.KEPT: "bold yellow", report.REPLACED: "yellow"}.get(summary.status, "bold red")
    console.print(Text(summary.verdict, style))
    for alarm in summary.alarms:
        console.print(Text(f"  ! {alarm}", "red"))
    for number in summary.numbers:
        console.print(Text.assemble(f"  {number.label:<20} ", (f"{number.value:>12}", "bold"), f"  {number.note}"))
    console.print(Text(f"  {url}", "dim"))
