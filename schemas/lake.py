"""The lake's folders, and the small JSON files in them that say what counts: manifests, receipts and pointers.

A stage's folder holds its files under attempt-unique names and, written last and once, `manifest.json`. Readers take the files that
the manifest lists and never a glob; what it does not list is garbage of an attempt that failed or was repeated.
"""

import dataclasses
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from schemas.storage import Storage, parsed

CHAMPION = "models/CHAMPION"
CURRENT = "lookup/CURRENT"
MANIFEST = "manifest.json"


def check_month(month: str) -> str:
    """`month` itself, when it is one.

    Raises:
        ValueError: not of the form YYYY-MM.
    """
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", month):
        raise ValueError(f"month {month!r} is not a month; expected YYYY-MM, such as 2026-10")
    return month


def month_after(month: str, months: int = 1) -> str:
    """The month `months` later (earlier when negative): month_after("2026-12") == "2027-01"."""
    count = month_number(month) - 1 + months
    return f"{count // 12:04d}-{count % 12 + 1:02d}"


def month_number(month: str) -> int:
    """Months since the year 0, so that months can be compared and counted."""
    return 12 * int(month[:4]) + int(month[5:7])


def months_between(first: str, last: str) -> list[str]:
    """All months from first to last, both included.

    Raises:
        ValueError: either is no month, or they are out of order.
    """
    check_month(first), check_month(last)
    if first > last:
        raise ValueError(f"months {first}:{last} run backwards; expected the earlier one first")
    return [month_after(first, months) for months in range(month_number(last) - month_number(first) + 1)]


def raw_ads(month: str) -> str:
    return f"raw/{month}/ads/"


def raw_images(month: str) -> str:
    return f"raw/{month}/images/"


def truth(month: str) -> str:
    return f"truth/{month}.parquet"


def stage_folder(stage: str, month: str, run: str) -> str:
    """Where a stage of a run keeps its files: `rows/2026-10/<run>`."""
    return f"{stage}/{month}/{run}"


def run_folder(month: str, run: str) -> str:
    return f"runs/{month}/{run}"


def model_folder(kind: str, version: str) -> str:
    """Where a model lies; `kind` is `encoder` or `ranker`."""
    return f"models/{kind}/{version}"


def shard_of_unit(name: str) -> int:
    """The shard in a unit's name, the number before its last dot: `shard/00003.000` is of shard 3."""
    return int(name.rpartition("/")[2].partition(".")[0])


def embeddings_folder(encoder: str, month: str, run: str) -> str:
    """Where an encoder's embeddings of a month's images lie, in the shards of its rows."""
    return stage_folder(f"embeddings/{encoder}", month, run)


def unique(folder: str, stem: str, suffix: str) -> str:
    """A file name of this attempt's own, so that repeated work never overwrites what counts."""
    return f"{folder}/{stem}-{uuid.uuid4().hex[:12]}{suffix}"


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What one unit of work has done, told exactly once.

    Attributes:
        unit: the unit's name, unique in the stage (a file, a shard and its part).
        file: the attempt's output, relative to the lake; empty where the unit left none.
        rows: rows in `file`.
        counts: further counts by name, such as rows read or rejects by reason.
        crc32c: checksum of `file`; empty where there is none.
    """

    unit: str
    file: str = ""
    rows: int = 0
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    crc32c: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The receipts of a completed stage, in order of unit, and what else readers need to know of it."""

    stage: str
    receipts: tuple[Receipt, ...]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(receipt.rows for receipt in self.receipts)

    @property
    def files(self) -> list[str]:
        return [receipt.file for receipt in self.receipts if receipt.file]

    def count(self, name: str) -> int:
        """Sum of one count over the receipts."""
        return sum(receipt.counts.get(name, 0) for receipt in self.receipts)

    def counts(self, prefix: str) -> dict[str, int]:
        """Sums of all counts whose name starts with `prefix`, without it."""
        names = sorted({name for receipt in self.receipts for name in receipt.counts if name.startswith(prefix)})
        return {name[len(prefix) :]: self.count(name) for name in names}

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        values = json.loads(data)
        receipts = tuple(Receipt(**receipt) for receipt in values.pop("receipts"))
        return cls(receipts=receipts, **values)


def read_manifest(storage: Storage, folder: str) -> Manifest | None:
    """The manifest of a folder, or None while its stage is not complete.

    Raises:
        ValueError: it is damaged; says where.
    """
    name, expected = f"{folder}/{MANIFEST}", "what its stage wrote; restore it, or remove that folder and run its month again"
    try:
        return parsed(storage.url(name), storage.read(name), Manifest.from_json, expected)
    except FileNotFoundError:
        return None


def pack_receipts(storage: Storage, prefix: str) -> list[Receipt]:
    """The receipts of all complete `packs` folders under `prefix`, of whatever month and run."""
    folders = [name.rpartition("/")[0] for name in storage.names(prefix) if name.endswith(f"/packs/{MANIFEST}")]
    return [receipt for folder in folders if (manifest := read_manifest(storage, folder)) for receipt in manifest.receipts]


def commit(storage: Storage, folder: str, manifest: Manifest) -> Manifest:
    """Complete a stage: create its manifest, or adopt the one that another finaliser created first."""
    storage.create(f"{folder}/{MANIFEST}", manifest.to_json())
    adopted = read_manifest(storage, folder)
    assert adopted is not None
    return adopted


def one_receipt_each(told: Iterable[Receipt]) -> list[Receipt]:
    """Of all that attempts have told, which a runner may repeat, one receipt of each unit: the same whatever the order, by unit."""
    ordered = sorted(told, key=lambda receipt: (receipt.unit, receipt.file))
    return [next(same) for _, same in itertools.groupby(ordered, lambda receipt: receipt.unit)]


@dataclasses.dataclass(frozen=True)
class Champion:
    """`models/CHAMPION`: the pair that the newest published month was scored with, and the run that published it."""

    encoder: str
    ranker: str
    month: str
    run: str


@dataclasses.dataclass(frozen=True)
class Current:
    """`lookup/CURRENT`: the run that the REST service answers from."""

    month: str
    run: str


@dataclasses.dataclass(frozen=True, order=True)
class Publication:
    """One act of publishing: what a month last had of these is what is published of it.

    Attributes:
        published: when, ISO 8601, UTC; the order of publications.
        month, run: what.
        contract: fingerprint of the rows' contract.
        rows: how many.
        dataset: where in BigQuery, PROJECT.DATASET; empty where the lookup alone was published.
        kept_model: whether the champion was left as it was.
    """

    published: str
    month: str
    run: str
    contract: str
    rows: int
    dataset: str
    kept_model: bool = False


Noted = TypeVar("Noted", Champion, Current, Publication)


def _noted(storage: Storage, name: str, data: bytes, kind: type[Noted]) -> Noted:
    fields = ", ".join(field.name for field in dataclasses.fields(kind))
    return parsed(storage.url(name), data, lambda data: kind(**json.loads(data)), f"JSON of {fields}; restore it")


def published_months(storage: Storage) -> list[str]:
    """The months that were ever published, in their order."""
    return sorted({name.split("/")[1] for name in storage.names("publish/") if name.endswith(".json")})


def publications(storage: Storage, month: str) -> list[Publication]:
    """All publications of a month, the last one last."""
    names = [name for name in storage.names(f"publish/{month}/") if name.endswith(".json")]
    return sorted(_noted(storage, name, storage.read(name), Publication) for name in names)


def last_publication(storage: Storage, month: str, contract: str | None = None) -> Publication | None:
    """What is published of a month, or what was last of rows of that contract; None where nothing is."""
    noted = [note for note in publications(storage, month) if contract in (None, note.contract)]
    return noted[-1] if noted else None


def note_publication(storage: Storage, publication: Publication) -> None:
    """Write down that a run was published; nothing is ever taken back, a later note outdoes an earlier one."""
    name = unique(f"publish/{publication.month}", f"{publication.published}-{publication.run}", ".json")
    storage.write_json(name, dataclasses.asdict(publication))
    storage.delete(differs(publication.month))


def differs(month: str) -> str:
    """The name of the mark that the month's tables were seen to be others than the last publication says."""
    return f"publish/{month}/DIFFERS"


Pointer = TypeVar("Pointer", Champion, Current)


def read_pointer(storage: Storage, name: str, kind: type[Pointer]) -> tuple[Pointer | None, str | None]:
    """The pointer's value and version, (None, None) while there is none."""
    data, version = storage.read_versioned(name)
    return (None, None) if data is None else (_noted(storage, name, data, kind), version)


def move_pointer(storage: Storage, name: str, value: Pointer) -> bool:
    """Point to `value` unless the pointer is at a later month; False then. A concurrent move is looked at again, never overwritten."""
    data = json.dumps(dataclasses.asdict(value), indent=1).encode()
    while True:
        there, version = read_pointer(storage, name, type(value))
        if there == value:
            return True
        if there is not None and there.month > value.month:
            return False
        if storage.swap(name, version, data):
            return True
