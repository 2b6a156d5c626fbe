"""The flags of the command: one for each setting, and a suggestion where one is mistyped."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection
from typing import Any, NoReturn

from beam_jobs.config import Config, suggestion


class Parser(argparse.ArgumentParser):
    """Wrong flags are errors with a suggestion."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            self.error(f"{value!r} is none of {', '.join(action.choices)}{suggestion(value, action.choices)}")

    def known_flags(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]


def add_settings(parser: argparse.ArgumentParser, told: Collection[str] = ()) -> None:
    """A flag for each setting; where only some matter these are `told`, and the others are taken all the same."""
    parser.add_argument(
        "--config", metavar="FILE", help="settings in YAML, one `name: value` a line, at a path or gs://bucket/FILE; flags win"
    )
    for field in dataclasses.fields(Config):
        add_setting(parser, field.name, not told or field.name in told)
    if told:
        parser.epilog = "The settings of `adstocrat month` are taken too, so that one --config serves all commands."


def add_setting(parser: argparse.ArgumentParser, name: str, told: bool = True) -> None:
    """A flag for one setting; in the help if it is `told`."""
    field = next(field for field in dataclasses.fields(Config) if field.name == name)
    kind = typing.get_type_hints(Config)[name]
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    flag, text = f"--{name.replace('_', '-')}", field.metadata["help"] if told else argparse.SUPPRESS
    if field.default is False:
        parser.add_argument(flag, action="store_const", const=True, help=text)
        return
    if field.default == ():
        parser.add_argument(flag, action="append", metavar="TEXT", help=text)
        return
    if field.default not in (dataclasses.MISSING, None, "") and told:
        text += f" (default: {field.default})"
    read = _true_or_false if kind is bool else kind
    parser.add_argument(flag, type=read, metavar=kind.__name__.upper(), help=text)


def _true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"
