"""The settings of a run: one frozen dataclass, read from a YAML file and from flags of the same names; flags win."""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

# Kinds of alarm (beam_jobs/drift.py).
ALARMS = ("drift", "skew", "missing", "faults", "embedding", "churn")


class ConfigError(ValueError):
    """A setting that cannot be used, with its value, what was expected and the fix."""


def _setting(help_text: str, default: Any = dataclasses.MISSING, affects_model: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "affects_model": affects_model})


@dataclasses.dataclass(frozen=True)
class Config:
    """What one command runs with.

    Attributes: see each field's help, which the command's `--help` shows as well.
    """

    lake: str = _setting("gs://bucket[/prefix] or a folder: where raw months lie and everything is written")
    dataset: str | None = _setting("PROJECT.DATASET of BigQuery to publish scores to; without it only the lookup is published", None)
    contract: str | None = _setting("contract file (a TensorFlow Metadata Schema); default: the one of the sample months", None)
    window_months: int = _setting("months whose labelled rows are trained on, the month itself included", 3, affects_model=True)
    seed: int = _setting("seed of everything random in training", 0, affects_model=True)
    encoder_refresh: str = _setting(
        "when the encoder is trained anew: `never`, `months N` after the last one, or `drift`, when half as many creatives again have come",
        "months 3",
        affects_model=True,
    )
    encoder_backbone: str = _setting(
        "`NETWORK FILE`: a network of keras.applications that the encoder is built on, and its weights, a file in the lake; '' for none",
        "",
        affects_model=True,
    )
    train_mode: str = _setting("`refresh` the champion, from `scratch`, or `auto`: scratch when the contract has changed", "auto", True)
    train_negatives: float = _setting("share of the impressions without a click that is learnt from", 1.0, affects_model=True)
    ingest_ready: str = _setting(
        "when a month may begin: `always`, `marker NAME` (a file in raw/MONTH/), or `quiet 2h` after the last file", "always"
    )
    max_reject_share: float = _setting("share of a month's rows that may be rejected before the month stops", 0.01)
    max_ne_loss: float = _setting(
        "normalized entropy that a candidate may lose against the champion, relative; twice that against the one of half a year ago",
        0.005,
        affects_model=True,
    )
    min_gate_clicks: int = _setting("clicks on gate rows that a candidate is judged by at least", 1000, affects_model=True)
    require_promotion: bool = _setting("stop before scoring, with an error, where the gate refuses the candidate", False)
    csv_newlines_in_values: bool = _setting(
        "whether a quoted CSV value may hold a line end; where not, big files are read in parts, each by another worker",
        True,
        affects_model=True,
    )
    csv_encoding: str = _setting("encoding of the CSV files, such as latin-1, cp1252 or utf-16", "utf-8", affects_model=True)
    publish_max_mean_shift: float = _setting("share by which a month's mean probability may differ from last month's", 0.10)
    publish_gone: tuple[str, ...] = _setting("COLUMN=VALUE: a segment's value that is gone for good; more than one may be given", ())
    accept_shift: bool = _setting("publish although the mean probability differs by more than that", False)
    monitor_missing: float = _setting("share by which missing values of a column, or an image fault, may change from month to month", 0.05)
    monitor_stop: tuple[str, ...] = _setting(
        f"kinds of alarm ({', '.join(ALARMS)}) and columns that stop the month; more than one may be given", ()
    )
    monitor_warn: float = _setting("share by which predicted clicks of last month's run may differ from what happened", 0.10)
    monitor_scratch: float = _setting("and from which on the ranker is trained from scratch", 0.25, affects_model=True)
    monitor_abort: float = _setting("and from which on the month stops before anything is trained", 0.50)
    notify: str | None = _setting("URL that is told by POST how a month ended, as JSON (docs/runbook.md)", None)
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
        for name in ("window_months", "fetch_threads", "gpu_count", "max_bytes_billed", "min_gate_clicks", "seed"):
            value, least = getattr(self, name), int(name != "seed")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}")
        for name, example in (("max_reject_share", 0.01), ("max_ne_loss", 0.005), ("monitor_missing", 0.05)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value!r}; expected a number from 0 to 1, such as {example}")
        if not isinstance(self.publish_max_mean_shift, int | float) or not self.publish_max_mean_shift > 0:
            raise ConfigError(f"publish_max_mean_shift is {self.publish_max_mean_shift!r}; expected a number above 0, such as 0.1")
        limits = [self.monitor_warn, self.monitor_scratch, self.monitor_abort]
        if not all(isinstance(limit, int | float) and limit > 0 for limit in limits) or limits != sorted(limits):
            raise ConfigError(
                f"monitor_warn, monitor_scratch and monitor_abort are {limits}; expected numbers above 0, none below the one before"
            )
        if not isinstance(self.monitor_stop, list | tuple) or not all(isinstance(name, str) for name in self.monitor_stop):
            raise ConfigError(
                f"monitor_stop is {self.monitor_stop!r}; expected a list of kinds of alarm and columns, such as [missing, bid]"
            )
        object.__setattr__(self, "monitor_stop", tuple(self.monitor_stop))
        if self.notify is not None and not re.match(r"https?://", str(self.notify)):
            raise ConfigError(f"notify is {self.notify!r}; expected a URL that begins with http:// or https://")
        gone = self.publish_gone
        if not isinstance(gone, list | tuple) or not all(isinstance(pair, str) and "=" in pair for pair in gone):
            raise ConfigError(f"publish_gone is {gone!r}; expected a list of COLUMN=VALUE, such as [device=tv]")
        object.__setattr__(self, "publish_gone", tuple(gone))
        for name in (field.name for field in dataclasses.fields(self) if field.name.startswith("prices_")):
            if not isinstance(getattr(self, name), int | float) or not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a price, a number of at least 0")
        if not isinstance(self.encoder_refresh, str) or not re.fullmatch(r"never|drift|months [1-9]\d*", self.encoder_refresh):
            raise ConfigError(f"encoder_refresh is {self.encoder_refresh!r}; expected `never`, `drift`, or `months` and a number such as 3")
        if not isinstance(self.encoder_backbone, str) or len(self.encoder_backbone.split()) not in (0, 2):
            raise ConfigError(
                f"encoder_backbone is {self.encoder_backbone!r}; expected a network and a file in the lake, such as "
                "`MobileNetV3Small backbones/small.weights.h5`"
            )
        if self.train_mode not in ("refresh", "scratch", "auto"):
            raise ConfigError(f"train_mode is {self.train_mode!r}; expected refresh, scratch or auto")
        if isinstance(self.train_negatives, bool) or not isinstance(self.train_negatives, int | float) or not 0 < self.train_negatives <= 1:
            raise ConfigError(f"train_negatives is {self.train_negatives!r}; expected a number above 0 and up to 1, such as 0.2")
        if not isinstance(self.ingest_ready, str) or not re.fullmatch(r"always|marker [^/\s]+|quiet \d+[smhd]", self.ingest_ready):
            raise ConfigError(
                f"ingest_ready is {self.ingest_ready!r}; expected `always`, `marker NAME`, or `quiet` and a time such as 45s, 30m, 2h or 1d"
            )
        for name in ("csv_newlines_in_values", "accept_shift", "require_promotion"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false")
        try:
            "".encode(self.csv_encoding)
        except (LookupError, TypeError, ValueError):
            raise ConfigError(f"csv_encoding is {self.csv_encoding!r}; expected an encoding that Python knows, such as latin-1") from None
        if not self.lake or not isinstance(self.lake, str):
            raise ConfigError(f"lake is {self.lake!r}; expected gs://bucket[/prefix] or a folder, as --lake or in the config file")
        for name in ("dataset", "contract", "bigquery_location", "gpu_type", "gpu_machine_type"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name not in ("dataset", "contract")):
                raise ConfigError(f"{name} is {value!r}; expected text")
        if self.dataset is not None and self.dataset.count(".") != 1:
            raise ConfigError(f"dataset is {self.dataset!r}; expected PROJECT.DATASET, such as my-project.ads")
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
    """Settings of a YAML file, overridden by the flags that were given.

    Raises:
        ConfigError: no such file, not a mapping, an unknown setting, or a value that cannot be used.
    """
    settings: dict[str, Any] = {}
    if path:
        import yaml

        try:
            settings = yaml.safe_load(pathlib.Path(path).read_text("utf-8")) or {}
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
