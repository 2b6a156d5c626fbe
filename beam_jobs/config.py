"""The settings of a run: one frozen dataclass, read from a YAML file and from flags of the same names; flags win."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from schemas.storage import read_text

# Kinds of alarm (beam_jobs/drift.py).
ALARMS = ("drift", "skew", "missing", "faults", "embedding", "churn")


class ConfigError(ValueError):
    """A setting that cannot be used, with its value, what was expected and the fix."""


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a setting's values have to be, in words and as a check."""

    expected: str
    holds: Callable[[Any], bool]


def _whole(least: int) -> _Rule:
    # A bool is an int to `isinstance`.
    return _Rule(f"a whole number of at least {least}", lambda value: type(value) is int and value >= least)


def _number(expected: str, holds: Callable[[float], bool]) -> _Rule:
    return _Rule(expected, lambda value: type(value) in (int, float) and holds(value))


def _share(example: float) -> _Rule:
    return _number(f"a number from 0 to 1, such as {example}", lambda value: 0 <= value <= 1)


def _above_0(example: float) -> _Rule:
    return _number(f"a number above 0, such as {example}", lambda value: value > 0)


def _matching(pattern: str, expected: str) -> _Rule:
    return _Rule(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def _list_of(pattern: str, expected: str) -> _Rule:
    one = _matching(pattern, expected)
    return _Rule(expected, lambda values: isinstance(values, list | tuple) and all(map(one.holds, values)))


def _is_encoding(value: Any) -> bool:
    try:
        "".encode(value)
    except (LookupError, TypeError, ValueError):
        return False
    return True


# Where a setting names no rule, the one of its default's type.
_TEXT = _matching("(?s:.*)", "text")
_OF_TYPE = {
    bool: _Rule("true or false", lambda value: isinstance(value, bool)),
    int: _whole(1),
    float: _number("a number of at least 0", lambda value: value >= 0),
    str: _TEXT,
}


def _setting(help_text: str, default: Any = dataclasses.MISSING, rule: _Rule | None = None, affects_model: bool = False) -> Any:
    """A field of `Config`. None is a value of those alone whose default it is."""
    metadata = {"help": help_text, "rule": rule or _OF_TYPE[type(default)], "affects_model": affects_model}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """What one command runs with.

    Attributes: see each field's help, which the command's `--help` shows as well.

    Raises:
        ConfigError: a value that cannot be used.
    """

    lake: str = _setting(
        "gs://bucket[/prefix] or a folder: where raw months lie and everything is written",
        rule=_matching("(?s:.+)", "gs://bucket[/prefix] or a folder, as --lake or in the config file"),
    )
    dataset: str | None = _setting(
        "PROJECT.DATASET of BigQuery to publish scores to; without it only the lookup is published",
        None,
        _matching(r"[^.]*\.[^.]*", "PROJECT.DATASET, such as my-project.ads"),
    )
    contract: str | None = _setting(
        "contract (a TensorFlow Metadata Schema), a path or gs://bucket/FILE; default: that of the sample months", None, _TEXT
    )
    window_months: int = _setting("months whose labelled rows are trained on, the month itself included", 3, affects_model=True)
    seed: int = _setting("seed of everything random in training", 0, _whole(0), affects_model=True)
    encoder_refresh: str = _setting(
        "when the encoder is trained anew: `never`, `months N` after the last one, or `drift`, when half as many creatives again have come",
        "months 3",
        _matching(r"never|drift|months [1-9]\d*", "`never`, `drift`, or `months` and a number such as 3"),
        affects_model=True,
    )
    encoder_backbone: str = _setting(
        "`NETWORK FILE`: a network of keras.applications that the encoder is built on, and its weights, a file in the lake; '' for none",
        "",
        _matching(r"\s*|\s*\S+\s+\S+\s*", "a network and a file in the lake, such as `MobileNetV3Small backbones/small.weights.h5`"),
        affects_model=True,
    )
    train_mode: str = _setting(
        "`refresh` the champion, from `scratch`, or `auto`: scratch when the contract has changed",
        "auto",
        _matching("refresh|scratch|auto", "refresh, scratch or auto"),
        affects_model=True,
    )
    train_negatives: float = _setting(
        "share of the impressions without a click that is learnt from",
        1.0,
        _number("a number above 0 and up to 1, such as 0.2", lambda value: 0 < value <= 1),
        affects_model=True,
    )
    ingest_ready: str = _setting(
        "when a month may begin: `always`, `marker NAME` (a file in raw/MONTH/), or `quiet 2h` after the last file",
        "always",
        _matching(r"always|marker [^/\s]+|quiet \d+[smhd]", "`always`, `marker NAME`, or `quiet` and a time such as 45s, 30m, 2h or 1d"),
    )
    max_reject_share: float = _setting("share of a month's rows that may be rejected before the month stops", 0.01, _share(0.01))
    max_ne_loss: float = _setting(
        "normalized entropy that a candidate may lose against the champion, relative; twice that against the one of half a year ago",
        0.005,
        _share(0.005),
        affects_model=True,
    )
    min_gate_clicks: int = _setting("clicks on gate rows that a candidate is judged by at least", 1000, affects_model=True)
    require_promotion: bool = _setting("stop before scoring, with an error, where the gate refuses the candidate", False)
    csv_newlines_in_values: bool = _setting(
        "whether a quoted CSV value may hold a line end; where not, big files are read in parts, each by another worker",
        True,
        affects_model=True,
    )
    csv_encoding: str = _setting(
        "encoding of the CSV files, such as latin-1, cp1252 or utf-16",
        "utf-8",
        _Rule("an encoding that Python knows, such as latin-1", _is_encoding),
        affects_model=True,
    )
    publish_max_mean_shift: float = _setting("share by which a month's mean probability may differ from last month's", 0.10, _above_0(0.1))
    publish_gone: tuple[str, ...] = _setting(
        "COLUMN=VALUE: a segment's value that is gone for good; more than one may be given",
        (),
        _list_of("(?s:.*=.*)", "a list of COLUMN=VALUE, such as [device=tv]"),
    )
    accept_shift: bool = _setting("publish although the mean probability differs by more than that", False)
    monitor_missing: float = _setting(
        "share by which missing values of a column, or an image fault, may change from month to month", 0.05, _share(0.05)
    )
    monitor_stop: tuple[str, ...] = _setting(
        f"kinds of alarm ({', '.join(ALARMS)}) and columns that stop the month; more than one may be given",
        (),
        _list_of("(?s:.*)", "a list of kinds of alarm and columns, such as [missing, bid]"),
    )
    monitor_warn: float = _setting("share by which predicted clicks of last month's run may differ from what happened", 0.10, _above_0(0.1))
    monitor_scratch: float = _setting("and from which on the ranker is trained from scratch", 0.25, _above_0(0.25), affects_model=True)
    monitor_abort: float = _setting("and from which on the month stops before anything is trained", 0.50, _above_0(0.5))
    notify: str | None = _setting(
        "URL that is told by POST how a month ended, as JSON (docs/runbook.md)",
        None,
        _matching("https?://(?s:.*)", "a URL that begins with http:// or https://"),
    )
    fetch_threads: int = _setting("images that a worker fetches and decodes at a time", 16)
    # The cheapest GPU that Dataflow has in most regions, and more than enough: thumbnails are 12 KB, and embedding one takes microseconds.
    gpu_type: str = _setting("GPU of the Dataflow workers that embed and train; '' for none", "nvidia-l4")
    gpu_count: int = _setting("GPUs of each of them", 1)
    # An L4 comes with this series alone; 4 vCPUs read and unpack thumbnails as fast as it embeds them.
    gpu_machine_type: str = _setting("machine type of each of them; '' where Dataflow may choose", "g2-standard-4")
    prices_vcpu_hour: float = _setting("price of a Dataflow worker's vCPU for an hour", 0.056)
    prices_gb_hour: float = _setting("price of 1 GB of its memory for an hour", 0.003557)
    prices_disk_gb_hour: float = _setting("price of 1 GB of its disk for an hour", 0.000054)
    prices_gpu_hour: float = _setting("price of a GPU for an hour", 0.672)
    prices_shuffle_gb: float = _setting("price of 1 GB through Dataflow Shuffle", 0.011)
    prices_million_reads: float = _setting("price of a million reads of the bucket", 0.4)
    prices_million_writes: float = _setting("price of a million writes or listings", 5.0)
    bigquery_location: str = _setting("where BigQuery jobs run", "US")
    max_bytes_billed: int = _setting("bytes that one BigQuery job may bill before it is refused", 1 << 40)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata["rule"]
            if not (value is None and field.default is None) and not rule.holds(value):
                raise ConfigError(f"{field.name} is {value!r}; expected {rule.expected}")
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        limits = [self.monitor_warn, self.monitor_scratch, self.monitor_abort]
        if limits != sorted(limits):
            raise ConfigError(f"monitor_warn, monitor_scratch and monitor_abort are {limits}; expected none below the one before")
        if self.dataset is not None and not self.lake.startswith("gs://"):
            raise ConfigError(
                f"dataset is {self.dataset!r} but lake is the folder {self.lake!r}, which BigQuery cannot load from; use gs://…"
            )

    def affecting_model(self) -> dict[str, Any]:
        """The settings that change what a run computes, and so its id."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.metadata["affects_model"]}


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something close is known, else nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def load(path: str | None, flags: Mapping[str, Any]) -> Config:
    """Settings of a YAML file, at a path or at gs://bucket/path, overridden by the flags that were given.

    Raises:
        ConfigError: no such file, not a mapping, an unknown setting, or a value that cannot be used.
        ValueError, OSError: as `read_text`.
    """
    settings: dict[str, Any] = {}
    if path:
        import yaml

        try:
            settings = yaml.safe_load(read_text(path)) or {}
        except FileNotFoundError:
            raise ConfigError(f"config file {path!r} does not exist") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"config file {path!r} is not UTF-8 ({error}); save it as UTF-8") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path!r} is not YAML: {error}") from None
        if not isinstance(settings, dict):
            raise ConfigError(f"config file {path!r} holds a {type(settings).__name__}; expected settings, one `name: value` a line")
    known = [field.name for field in dataclasses.fields(Config)]
    # A section of the file, `csv: {encoding: …}`, is the settings that begin with its name: `csv_encoding`.
    for section in [name for name, value in settings.items() if isinstance(value, dict)]:
        settings |= {f"{section}_{name}": value for name, value in settings.pop(section).items()}
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} in {path}{suggestion(str(name), known)}")
    given = {**settings, **{name: value for name, value in flags.items() if value is not None}}
    return Config(**{"lake": "", **given})
