"""Models in the lake: saved whole under attempt-unique names, fetched by manifest, and never loaded with a byte changed."""

import contextlib
import hashlib
import importlib.metadata
import pathlib
import platform
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from schemas import lake
from schemas.checksum import crc32c
from schemas.lake import Manifest, Receipt
from schemas.storage import Storage

_PACKAGES = ("apache-beam", "keras", "numpy", "pyarrow", "tensorflow")


# What the files of a model hold, and how they are meant: a model of another format cannot be used by this version.
FORMAT = 3


class ModelError(ValueError):
    """A model that cannot be used, and why."""


def save(storage: Storage, kind: str, version: str, folder: pathlib.Path, info: Mapping[str, Any]) -> tuple[list[Receipt], dict[str, Any]]:
    """Upload a trained model's folder: a receipt a file (unit: its path in the folder), and the manifest's info with the `digest`."""
    attempt = lake.unique(lake.model_folder(kind, version), "files", "")
    digest, receipts = hashlib.sha256(), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        unit, data = path.relative_to(folder).as_posix(), path.read_bytes()
        digest.update(f"{unit}\0{hashlib.sha256(data).hexdigest()}\n".encode())
        storage.upload(path, f"{attempt}/{unit}")
        receipts.append(Receipt(unit, f"{attempt}/{unit}", 0, {"bytes": len(data)}, crc32c(data)))
    return receipts, {**info, "kind": kind, "version": version, "digest": digest.hexdigest()}


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that a model's weights depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def manifest(storage: Storage, kind: str, version: str) -> Manifest:
    """What is kept beside a model.

    Raises:
        ModelError: there is no such model, or it is not complete.
    """
    found = lake.read_manifest(storage, lake.model_folder(kind, version))
    if found is None:
        raise ModelError(f"there is no complete {kind} {version!r} in {storage.url('models/' + kind)}")
    return found


def fetch(storage: Storage, kind: str, version: str, folder: pathlib.Path) -> Manifest:
    """Lay a model's files out in `folder`, checked against their digest; returns its manifest.

    Raises:
        ModelError: no such model, or its files are not those that were saved.
    """
    found = manifest(storage, kind, version)
    digest = hashlib.sha256()
    for receipt in sorted(found.receipts, key=lambda receipt: pathlib.PurePosixPath(receipt.unit)):
        try:
            data = storage.read(receipt.file)
        except FileNotFoundError:
            raise ModelError(f"{kind} {version!r} is damaged: its file {receipt.file} is gone") from None
        digest.update(f"{receipt.unit}\0{hashlib.sha256(data).hexdigest()}\n".encode())
        path = folder / receipt.unit
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if digest.hexdigest() != found.info["digest"]:
        raise ModelError(f"{kind} {version!r} is damaged: its files have digest {digest.hexdigest()}, expected {found.info['digest']}")
    return found


def load(storage: Storage, kind: str, version: str) -> Any:
    """An `Encoder` or a `Ranker`, ready to run; a ranker is held to its golden scores first.

    Raises:
        ModelError: no such model, its files are not those that were saved, it cannot be run here, or it scores otherwise here than where
            it was trained.
    """
    from model import golden, tensorflow
    from model.encoder import Encoder
    from model.ranker import Ranker

    tensorflow.load()
    from tensorflow.errors import OpError

    with local_folder() as folder:
        fetch(storage, kind, version, folder)
        try:
            if kind == "encoder":
                return Encoder(folder)
            ranker = Ranker(folder)
        except OpError as error:
            raise ModelError(f"{kind} {version!r} cannot be run here: {error.message}") from error
        # That there are some is the gate's to see.
        if (folder / golden.FILE).exists() and (wrong := golden.differences(ranker, folder)):
            raise ModelError(f"ranker {version!r} is not what it was: {wrong}; the image or the driver is not what it was trained with")
        return ranker


def prove(storage: Storage, encoder: str, ranker: str) -> None:
    """Make sure that a pair of models is whole, and that the ranker gives its golden scores in a fresh process.

    Raises:
        ModelError: what is wrong with them.
    """
    from model import golden

    with local_folder() as folder, local_folder() as beside:
        fetch(storage, "encoder", encoder, beside)
        fetch(storage, "ranker", ranker, folder)
        if wrong := golden.check(folder):
            raise ModelError(f"ranker {ranker!r} does not do in a fresh process what it did when it was trained: {wrong}")


@contextlib.contextmanager
def local_folder() -> Iterator[pathlib.Path]:
    """A local folder for a model's files; TensorFlow reads and writes nothing else."""
    with tempfile.TemporaryDirectory(prefix="adstocrat-model-") as folder:
        yield pathlib.Path(folder)
