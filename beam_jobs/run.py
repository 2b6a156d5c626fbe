"""A run of a month: what goes into it, and the id that follows from that alone.

The id is a digest of content: the month's files, the contract, the settings that affect the model, the package's own source, and the
runs and models that it builds on. It does not depend on where the lake lies, how the run is launched, or when. The same inputs are the
same run, which resumes; a late file makes a new one.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import pathlib
import re
import uuid
from typing import Any

import pyarrow as pa

from beam_jobs.config import Config
from schemas import contract as contracts
from schemas import lake
from schemas.contract import Contract, ContractError
from schemas.lake import Champion, Manifest
from schemas.parquet import write_parquet
from schemas.storage import Entry, Storage, open_storage

log = logging.getLogger("adstocrat")

PACKAGES = ("schemas", "model", "beam_jobs", "serving")
LISTING = pa.schema([("image", pa.string()), ("size", pa.int64()), ("crc32c", pa.string())])


class StageError(RuntimeError):
    """A stage that cannot go on, in one sentence for the person who ran it."""


@dataclasses.dataclass(frozen=True)
class MonthRun:
    """One run of one month, as every stage gets it; small, and pickled to workers.

    Attributes:
        storage: the lake.
        contract: of the month's rows.
        config: settings.
        month: YYYY-MM.
        id: digest of the inputs.
        earlier: (month, run) of the window's months before this one that are published, oldest first.
        champion: the pair to refresh from and to compare with; None for a first model.
        known_encoder: the champion's encoder, if it is to be kept; None where one is to be trained.
        ads: the month's CSV files.
        launch: unique to this launch of the run; no part of what it is.
    """

    storage: Storage
    contract: Contract
    config: Config
    month: str
    id: str
    earlier: tuple[tuple[str, str], ...]
    champion: Champion | None
    known_encoder: str | None
    ads: tuple[Entry, ...]
    launch: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12], compare=False)

    @property
    def folder(self) -> str:
        return lake.run_folder(self.month, self.id)

    @property
    def window(self) -> tuple[tuple[str, str], ...]:
        """(month, run) of all months that are trained on, oldest first, this one last."""
        return (*self.earlier, (self.month, self.id))

    @property
    def version(self) -> str:
        """What models made by this run are called."""
        return f"{self.month}-{self.id}"

    @property
    def encoder(self) -> str:
        """The encoder of the run's models: the champion's, or one of its own."""
        return self.known_encoder or self.version

    @property
    def spill(self) -> str:
        """Where this launch spills what it brings together; two launches of one run never touch each other's."""
        return f"spill/{self.launch}"

    def stage(self, stage: str) -> str:
        return lake.stage_folder(stage, self.month, self.id)

    def manifest(self, folder: str, made_by: str) -> Manifest:
        """A manifest that an earlier stage must have left.

        Raises:
            StageError: it has not.
        """
        manifest = lake.read_manifest(self.storage, folder)
        if manifest is None:
            raise StageError(f"{self.storage.url(folder)} is not complete; run `adstocrat {made_by} {self.month}` first")
        return manifest


def prepare(config: Config, month: str) -> MonthRun:
    """Look at the month and settle its run; the run's `inputs.json` is created now unless it is there already.

    Raises:
        StageError: the month has no ads.
        ContractError, ValueError: the contract, the month or the lake cannot be used.
    """
    lake.check_month(month)
    storage = open_storage(config.lake)
    contract = contracts.load(config.contract or contracts.DEFAULT)
    if config.dataset:
        _check_names(contract)
    delivered = storage.entries(lake.raw_ads(month))
    ads = tuple(entry for entry in delivered if entry.name.lower().endswith((".csv", ".csv.gz")))
    if odd := [entry.name for entry in delivered if entry not in ads]:
        log.info("%s and %d more are left out: neither *.csv nor *.csv.gz", odd[0], len(odd) - 1)
    if not ads:
        raise StageError(
            f"month {month} has no ads: expected *.csv or *.csv.gz in {storage.url(lake.raw_ads(month))}; "
            "deliver them there, or name another month or --lake"
        )
    prefix = lake.raw_images(month)
    images = [(entry.name[len(prefix) :], entry.size, entry.crc32c) for entry in storage.entries(prefix)]
    earlier = _published_window(storage, contract, config, month)
    champion = champion_before(storage, month)
    known = champion.encoder if champion and not _is_due(storage, champion.encoder, config.encoder_refresh, month) else None
    inputs = {
        "ads": [[entry.name.removeprefix(lake.raw_ads(month)), entry.size, entry.crc32c] for entry in ads],
        "images": {"count": len(images), "bytes": sum(size for _, size, _ in images), "digest": _digest(images)},
        "contract": contract.fingerprint,
        "settings": config.affecting_model(),
        "source": source_digest(),
        "window": earlier,
        "champion": champion and [champion.encoder, champion.ranker],
        "known_encoder": known,
    }
    run = MonthRun(storage, contract, config, month, _digest([month, inputs]), earlier, champion, known, ads)
    if storage.read_json(f"{run.folder}/inputs.json") is None:
        columns = [
            pa.array(column, type)
            for column, type in zip(zip(*images, strict=True) if images else ((), (), ()), LISTING.types, strict=True)
        ]
        listing = pa.RecordBatch.from_arrays(columns, schema=LISTING)
        written = write_parquet(storage, run.folder, "images", [listing])
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        storage.create(f"{run.folder}/inputs.json", json.dumps({**inputs, "listing": written.file, "created": created}, indent=1).encode())
    return run


def listing_file(run: MonthRun) -> str:
    """The Parquet file that lists the month's images, as `LISTING`."""
    return run.storage.read_json(f"{run.folder}/inputs.json")["listing"]


def champion_before(storage: Storage, month: str) -> Champion | None:
    """The champion as the runs before `month` left it.

    Models of the month itself and of later ones are passed over, each to its parent: a month that is run again must not learn
    from its own future, nor change its id because it promoted its own model.
    """
    champion, _ = lake.read_pointer(storage, lake.CHAMPION, Champion)
    while champion is not None:
        made = lake.read_manifest(storage, lake.model_folder("ranker", champion.ranker))
        if made is None:
            raise StageError(f"ranker {champion.ranker!r} is gone, so what was champion before {month} cannot be told; restore its folder")
        if made.info["month"] < month:
            return champion
        parent = made.info["parent"]
        champion = Champion(**parent) if parent else None
    return None


def _check_names(contract: Contract) -> None:
    """BigQuery must be able to hold the columns that the score table shows."""
    names = [column.name for column in contract.carried]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,299}", name) or [other.lower() for other in names].count(name.lower()) > 1:
            raise ContractError(
                f"contract column {name!r} cannot be a column in BigQuery: expected letters, digits and _ alone, and no other column "
                "of that name in other letter case; rename it in the export, or leave out the tag segment"
            )


def _is_due(storage: Storage, encoder: str, refresh: str, month: str) -> bool:
    """Whether another encoder is to be trained: there is none but an untrained one, or the setting `encoder_refresh` says so."""
    made = lake.read_manifest(storage, lake.model_folder("encoder", encoder))
    if made is None or made.info["training"]["mode"] == "untrained":
        return True
    if refresh.startswith("months"):
        return lake.month_number(month) - lake.month_number(made.info["month"]) >= int(refresh.removeprefix("months"))
    if refresh == "never":
        return False
    first = later = 0
    for receipt in lake.pack_receipts(storage, f"embeddings/{encoder}/"):
        embedded_for = receipt.file.split("/")[2]
        first += receipt.rows if embedded_for == made.info["month"] else 0
        later += receipt.rows if made.info["month"] < embedded_for < month else 0
    return later > first / 2


@functools.cache
def source_digest() -> str:
    """Digest of the package's own files: other code is another run."""
    top = pathlib.Path(__file__).resolve().parent.parent
    files = sorted(path for package in PACKAGES for path in (top / package).rglob("*") if path.suffix in (".py", ".pbtxt", ".json", ".sql"))
    return _digest([[str(path.relative_to(top)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files])


def _published_window(storage: Storage, contract: Contract, config: Config, month: str) -> tuple[tuple[str, str], ...]:
    """The run last published of each earlier month of the window, of those whose rows have this contract."""
    window = []
    for earlier in (lake.month_after(month, -back) for back in range(config.window_months - 1, 0, -1)):
        published = lake.publications(storage, earlier)
        readable = [note.run for note in published if note.contract == contract.fingerprint]
        if readable:
            window.append((earlier, readable[-1]))
        elif published:
            log.info("%s is left out of training: its run %s has another contract", earlier, published[-1].run)
    return tuple(window)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
