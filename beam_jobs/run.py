"""A run of a month: what goes into it, and the id that follows from that alone.

The id is a digest of content: the month's files, the contract, the settings that affect the model, the package's own source, and the
runs and models that it builds on. It does not depend on where the lake lies, how the run is launched, or when. The same inputs are the
same run, which resumes; a late file makes a new one.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import logging
import pathlib
import re
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs import PACKAGES
from beam_jobs.config import ALARMS, Config, ConfigError, suggestion
from model import registry
from model.gate import CHAMPION, EARLIER_CHAMPION
from schemas import contract as contracts
from schemas import lake
from schemas.contract import Contract, ContractError
from schemas.lake import Champion, Manifest
from schemas.parquet import BATCH_ROWS, write_parquet
from schemas.storage import Entry, Storage, open_storage

log = logging.getLogger("adstocrat")

_EARLIER_MONTHS = 6
# The stages whose folders are not called as they are.
_MADE_BY = {"rows": "ingest", "embeddings": "embed", "ranker": "train", "evaluation": "evaluate", "scores": "score"}
# Of a listing, which may be of millions, so many are objects of Python's at a time.
_LISTED_ROWS = 8192
LISTING = pa.schema([("image", pa.string()), ("size", pa.int64()), ("crc32c", pa.string())])


class StageError(RuntimeError):
    """A stage that cannot go on, in one sentence for the person who ran it; the command ends with `status`."""

    status = 1


class AlarmError(StageError):
    """A month that an alarm stops: its data or its last model are not what they were."""

    status = 4


def stage_error(error: BaseException | None) -> StageError | None:
    """A stage's own sentence, which a person needs, in what was raised: Beam wraps what a stage raises."""
    while error is not None and not isinstance(error, StageError):
        error = error.__cause__ or error.__context__
    return error


class HandedOverError(RuntimeError):
    """A job that was built for somebody else to start, so that nothing can follow it here; says what was built."""


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
        earlier_champion: what was published half a year ago, to compare with as well; None where that is the champion, or nothing.
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
    earlier_champion: Champion | None = None
    launch: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12], compare=False)

    @property
    def folder(self) -> str:
        return lake.run_folder(self.month, self.id)

    @property
    def inputs(self) -> dict[str, Any]:
        """What goes into it, as the lake has it: a job carries the run in each of its steps, and there may be many files."""
        return self.document("inputs")

    @property
    def ads(self) -> tuple[Entry, ...]:
        """The month's CSV files."""
        return tuple(Entry(lake.raw_ads(self.month) + name, size, checksum) for name, size, checksum in self.inputs["ads"])

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
    def candidate(self) -> Champion:
        """The pair of models that it makes."""
        return Champion(self.encoder, self.version, self.month, self.id)

    @property
    def spill(self) -> str:
        """Where this launch spills what it brings together; two launches of one run never touch each other's."""
        return f"spill/{self.launch}"

    def stage(self, stage: str, *below: str) -> str:
        """Where a stage of the run keeps its files; `encoder` and `ranker` are the models that it makes, or the encoder that it takes."""
        versions = {"encoder": self.encoder, "ranker": self.version}
        folder = lake.model_folder(stage, versions[stage]) if stage in versions else lake.stage_folder(stage, self.month, self.id)
        return "/".join((folder, *below))

    def left(self, stage: str, *below: str) -> Manifest | None:
        """The manifest of a stage of the run; None while it is not complete."""
        return lake.read_manifest(self.storage, self.stage(stage, *below))

    def document(self, name: str) -> Any:
        """What a stage wrote down beside its files, such as the `ledger`: JSON in the run's folder; None where it has not yet."""
        return self.storage.read_json(f"{self.folder}/{name}.json")

    def manifest(self, folder: str) -> Manifest:
        """A manifest that an earlier stage must have left.

        Raises:
            StageError: it has not.
        """
        manifest = lake.read_manifest(self.storage, folder)
        if manifest is None:
            kind = folder.removeprefix("models/").partition("/")[0]
            made_by = _MADE_BY.get(kind, kind)
            raise StageError(f"{self.storage.url(folder)} is not complete; run `adstocrat {made_by} {self.month}` first")
        return manifest

    def peers(self) -> dict[str, Champion]:
        """Published pairs that can score the month's rows, by what they are to the candidate; one of another contract or format cannot."""
        named = {CHAMPION: self.champion, EARLIER_CHAMPION: self.earlier_champion}
        made = {name: registry.manifest(self.storage, "ranker", pair.ranker).info for name, pair in named.items() if pair}
        wanted = (self.contract.fingerprint, registry.FORMAT)
        return {name: pair for name, pair in named.items() if pair and (made[name]["contract"], made[name].get("format")) == wanted}


def prepare(config: Config, month: str, contract: Contract | None = None) -> MonthRun:
    """Look at the month and settle its run; the run's `inputs.json` is created now unless it is there already. Raises as `derive`."""
    run, inputs, images = derive(config, month, contract)
    if run.document("inputs") is None:
        batches = images.to_batches(BATCH_ROWS) or [pa.RecordBatch.from_pylist([], LISTING)]
        written = write_parquet(run.storage, run.folder, "images", batches)
        run.storage.create(f"{run.folder}/contract.pbtxt", contracts.dumps(run.contract).encode())
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        inputs = {**inputs, "listing": written.file, "created": created}
        run.storage.create(f"{run.folder}/inputs.json", json.dumps(inputs, indent=1).encode())
    return run


def derive(config: Config, month: str, contract: Contract | None = None) -> tuple[MonthRun, dict[str, Any], pa.Table]:
    """The run that the month's inputs make now, those inputs, and its images as `LISTING`; nothing is written.

    Raises:
        StageError: the month has no ads.
        ContractError, ValueError: the contract, the month or the lake cannot be used.
    """
    lake.check_month(month)
    storage = open_storage(config.lake)
    contract = contract or contracts.load(config.contract or contracts.DEFAULT)
    if config.dataset:
        _check_names(contract)
    stops = (*ALARMS, *(column.name for column in contract.kept))
    for name in set(config.monitor_stop) - set(stops):
        raise ConfigError(f"monitor_stop has {name!r}; expected kinds of alarm and columns: {', '.join(stops)}{suggestion(name, stops)}")
    delivered = [entry for entry in storage.entries(lake.raw_ads(month)) if _is_text(entry.name)]
    ads = tuple(entry for entry in delivered if entry.name.lower().endswith((".csv", ".csv.gz")))
    if odd := [entry.name for entry in delivered if entry not in ads]:
        log.info("%s and %d more are left out: neither *.csv nor *.csv.gz", odd[0], len(odd) - 1)
    if not ads:
        raise StageError(
            f"month {month} has no ads: expected *.csv or *.csv.gz in {storage.url(lake.raw_ads(month))}; "
            "deliver them there, or name another month or --lake"
        )
    images = _images(storage, lake.raw_images(month))
    earlier = _published_window(storage, contract, config, month)
    champion = champion_before(storage, month)
    half_a_year_ago = champion and earlier_champion(storage, contract, month, champion)
    # Without pictures there is nothing that another encoder could learn.
    due = champion and contract.image and _is_due(storage, champion.encoder, config.encoder_refresh, month)
    known = champion.encoder if champion and not due else None
    inputs = {
        "ads": [[entry.name.removeprefix(lake.raw_ads(month)), entry.size, entry.crc32c] for entry in ads],
        "images": {"count": len(images), "bytes": pc.sum(images["size"], min_count=0).as_py(), "digest": _digest_of(images)},
        "contract": contract.fingerprint,
        "settings": config.affecting_model(),
        "source": source_digest(),
        "window": earlier,
        "champion": champion and [champion.encoder, champion.ranker],
        "known_encoder": known,
        "earlier_champion": half_a_year_ago and [half_a_year_ago.encoder, half_a_year_ago.ranker],
    }
    run = MonthRun(storage, contract, config, month, _digest([month, inputs]), earlier, champion, known, half_a_year_ago)
    return run, inputs, images


def kept(config: Config, month: str, id: str) -> MonthRun:
    """A run that was prepared before, as what its stages left is used again; not to go on with them.

    Raises:
        StageError: it never was, or it was removed.
    """
    storage = open_storage(config.lake)
    try:
        contract = contracts.parse(storage.read(f"{lake.run_folder(month, id)}/contract.pbtxt").decode())
    except FileNotFoundError:
        raise StageError(
            f"run {id!r} of {month} is not in {storage.uri} with its contract; `adstocrat runs` lists those that are, and the month "
            "of one that an earlier version made is to be run again"
        ) from None
    return MonthRun(storage, contract, config, month, id, (), None, None)


def published_contract(config: Config, month: str) -> Contract | None:
    """The contract that the month was last published with, where the settings name none; None where it never was. Raises as `kept`."""
    last = lake.last_publication(open_storage(config.lake), month)
    return kept(config, month, last.run).contract if last and not config.contract else None


def _images(storage: Storage, prefix: str) -> pa.Table:
    """What lies under `prefix` as `LISTING`, sorted by name; in columns, since it may be millions."""
    entries, batches = (entry for entry in storage.scan(prefix) if _is_text(entry.name)), []
    while some := list(itertools.islice(entries, _LISTED_ROWS)):
        columns = zip(*((entry.name[len(prefix) :], entry.size, entry.crc32c) for entry in some), strict=True)
        arrays = [pa.array(column, type) for column, type in zip(columns, LISTING.types, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=LISTING))
    return pa.Table.from_batches(batches, LISTING).sort_by("image")


def _is_text(name: str) -> bool:
    """Whether a file's name is one that rows could have; a folder's may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        log.info("%r is left out: its name is not UTF-8", name)
        return False
    return True


def joined(listing: Any, *names: str) -> Any:
    """What columns of a `LISTING`, all of them unless some are named, say of each image, as one text."""
    return pc.binary_join_element_wise(*(listing[name].cast(pa.string()) for name in names or LISTING.names), "\0")


def _digest_of(listing: pa.Table) -> str:
    """As `_digest`, of many rows."""
    digest = hashlib.sha256()
    for batch in listing.to_batches(_LISTED_ROWS):
        digest.update("".join(f"{row}\n" for row in joined(batch).to_pylist()).encode())
    return digest.hexdigest()[:16]


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


def earlier_champion(storage: Storage, contract: Contract, month: str, champion: Champion) -> Champion | None:
    """The pair that was champion half a year before, or the oldest since then that is kept; None where it is the champion.

    Without it, every month could lose a little against the month before, and much in a year.
    """
    half = lake.month_number(month) - _EARLIER_MONTHS
    past = {name: lake.month_number(name) - half for name in lake.published_months(storage) if name < month}
    # In a month that was not published, the champion was still that of the month before.
    for earlier in sorted(past, key=lambda name: (past[name] > 0, abs(past[name]))):
        for note in reversed(lake.publications(storage, earlier)):
            judged = lake.read_manifest(storage, lake.stage_folder("evaluation", earlier, note.run))
            made = judged and lake.read_manifest(storage, lake.model_folder("ranker", judged.info["ranker"]))
            if judged and made and made.info["contract"] == contract.fingerprint:
                pair = Champion(judged.info["encoder"], judged.info["ranker"], earlier, note.run)
                return pair if pair.ranker != champion.ranker else None
    return None


def _check_names(contract: Contract) -> None:
    """BigQuery must be able to hold the columns that the score table shows."""
    names, keys = [column.name for column in contract.carried], [column.name for column in contract.key]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,299}", name) or [other.lower() for other in names].count(name.lower()) > 1:
            instead = "" if name in keys else ", or leave out the tag segment"
            raise ContractError(
                f"contract column {name!r} cannot be a column in BigQuery: expected letters, digits and _ alone, and no other column "
                f"of that name in other letter case; rename it in the export and the contract{instead}"
            )


def _is_due(storage: Storage, encoder: str, refresh: str, month: str) -> bool:
    """Whether another encoder is to be trained: there is none but an untrained one, or the setting `encoder_refresh` says so."""
    made = lake.read_manifest(storage, lake.model_folder("encoder", encoder))
    if made is None or made.info["training"]["mode"] == "untrained" or made.info.get("format") != registry.FORMAT:
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
        if readable := [note.run for note in published if note.contract == contract.fingerprint]:
            window.append((earlier, readable[-1]))
        elif published:
            log.info("%s is left out of training: its run %s has another contract", earlier, published[-1].run)
    return tuple(window)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
