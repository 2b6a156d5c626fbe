"""A model comes out of the lake as it went in, or not at all."""

import dataclasses
import pathlib

import pytest

from model import registry
from model.registry import ModelError
from schemas import lake
from schemas.lake import Manifest
from schemas.storage import Storage, open_storage

FILES = {
    "model.keras": b"weights",
    "saved/variables/v.data": bytes(range(256)),
    "saved/saved_model.pb": b"",
    "saved-2/a": b"a",
    "features.json": b"{}",
}


@pytest.fixture
def storage(tmp_path: pathlib.Path) -> Storage:
    return open_storage(str(tmp_path / "lake"))


def lay_out(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def laid_out(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(storage: Storage, source: pathlib.Path, version: str = "v1") -> Manifest:
    """Save a model and complete it."""
    receipts, info = registry.save(storage, "ranker", version, source, {"parent": None})
    return lake.commit(storage, lake.model_folder("ranker", version), Manifest("train", tuple(receipts), info))


@pytest.fixture
def saved(storage: Storage, tmp_path: pathlib.Path) -> Manifest:
    return save(storage, lay_out(tmp_path / "trained", FILES))


def test_a_model_is_fetched_as_it_was_saved(storage: Storage, saved: Manifest, tmp_path: pathlib.Path) -> None:
    assert registry.fetch(storage, "ranker", "v1", tmp_path / "fetched") == saved
    assert laid_out(tmp_path / "fetched") == FILES


def test_the_manifest_says_what_the_model_is(storage: Storage, saved: Manifest) -> None:
    found = registry.manifest(storage, "ranker", "v1")
    assert {name: found.info[name] for name in ("kind", "version", "parent")} == {"kind": "ranker", "version": "v1", "parent": None}
    assert {receipt.unit: receipt.counts for receipt in found.receipts} == {name: {"bytes": len(data)} for name, data in FILES.items()}
    assert {entry.name: entry.crc32c for entry in storage.entries("models/ranker/v1/files")} == {r.file: r.crc32c for r in found.receipts}


def test_the_digest_follows_from_the_files_alone(storage: Storage, saved: Manifest, tmp_path: pathlib.Path) -> None:
    assert save(storage, lay_out(tmp_path / "again", FILES), "v2").info["digest"] == saved.info["digest"]


@pytest.mark.parametrize(
    "files",
    [
        {**FILES, "model.keras": b"Weights"},
        {**FILES, "more": b""},
        {name: data for name, data in FILES.items() if name != "saved-2/a"},
        {"renamed" if name == "model.keras" else name: data for name, data in FILES.items()},
    ],
    ids=["changed", "more", "fewer", "renamed"],
)
def test_other_files_have_another_digest(storage: Storage, saved: Manifest, tmp_path: pathlib.Path, files: dict[str, bytes]) -> None:
    assert save(storage, lay_out(tmp_path / "other", files), "v2").info["digest"] != saved.info["digest"]


def test_attempts_that_did_not_complete_are_not_mixed_in(storage: Storage, tmp_path: pathlib.Path) -> None:
    registry.save(storage, "ranker", "v1", lay_out(tmp_path / "lost", {"model.keras": b"lost", "lost": b""}), {})
    save(storage, lay_out(tmp_path / "trained", FILES))
    registry.fetch(storage, "ranker", "v1", tmp_path / "fetched")
    assert laid_out(tmp_path / "fetched") == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_file_with_a_byte_changed_is_refused(storage: Storage, saved: Manifest, tmp_path: pathlib.Path, file: str) -> None:
    (receipt,) = (receipt for receipt in saved.receipts if receipt.unit == file)
    storage.write(receipt.file, storage.read(receipt.file)[:-1] + b"!")
    with pytest.raises(ModelError, match=f"ranker 'v1' is damaged: .* expected {saved.info['digest']}"):
        registry.fetch(storage, "ranker", "v1", tmp_path / "fetched")


def test_a_file_that_is_gone_is_refused(storage: Storage, saved: Manifest, tmp_path: pathlib.Path) -> None:
    storage.delete(saved.receipts[0].file)
    with pytest.raises(ModelError, match=f"ranker 'v1' is damaged: its file {saved.receipts[0].file} is gone"):
        registry.fetch(storage, "ranker", "v1", tmp_path / "fetched")


def test_a_manifest_that_leaves_a_file_out_is_refused(storage: Storage, saved: Manifest, tmp_path: pathlib.Path) -> None:
    fewer = dataclasses.replace(saved, receipts=saved.receipts[1:])
    storage.write(f"models/ranker/v1/{lake.MANIFEST}", fewer.to_json())
    with pytest.raises(ModelError, match="is damaged"):
        registry.fetch(storage, "ranker", "v1", tmp_path / "fetched")


@pytest.mark.parametrize(("kind", "version"), [("ranker", "v2"), ("encoder", "v1")])
def test_a_model_that_is_not_there_is_refused_by_name(
    storage: Storage, saved: Manifest, tmp_path: pathlib.Path, kind: str, version: str
) -> None:
    with pytest.raises(ModelError, match=f"there is no complete {kind} '{version}' in .*models/{kind}"):
        registry.fetch(storage, kind, version, tmp_path)
    with pytest.raises(ModelError, match="there is no complete"):
        registry.load(storage, kind, version)


def test_a_model_without_its_manifest_is_not_there(storage: Storage, tmp_path: pathlib.Path) -> None:
    registry.save(storage, "ranker", "v1", lay_out(tmp_path / "trained", FILES), {})
    with pytest.raises(ModelError, match="there is no complete ranker 'v1'"):
        registry.manifest(storage, "ranker", "v1")
