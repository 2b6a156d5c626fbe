"""Train: the encoder, rarely, and the ranker, every month, each as one element of a pipeline, on a GPU worker where there is one.

    adstocrat encoder 2026-10 --lake gs://bucket
    adstocrat train 2026-10 --lake gs://bucket

Writes `models/encoder/<month>-<run>/` where it is due, and `models/ranker/<month>-<run>/`.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import apache_beam as beam
import pyarrow as pa

from beam_jobs.creatives import pack_files
from beam_jobs.embed import BATCH_THUMBNAILS
from beam_jobs.join import examples
from beam_jobs.run import MonthRun, StageError, source_digest
from beam_jobs.workers import Listed, gpu_hints, on_gpu
from model import golden, registry
from model.gate import CHAMPION
from model.kept import read_once
from model.leakage import LeakageError
from model.survey import NothingToLearnError
from schemas import contract as contracts
from schemas import lake
from schemas.lake import Manifest
from schemas.parquet import read_parquet

log = logging.getLogger("adstocrat")
P = ParamSpec("P")


def define_pipeline(root: beam.Pipeline, run: MonthRun, train: Callable[[MonthRun], Manifest]) -> None:
    """The run → one of its models; the element is the run, so that a GPU worker can take the whole of it."""
    hints = gpu_hints(root, run.config)
    runs = root | "Run" >> Listed(lambda: [run], MonthRun)
    _ = runs | "Train" >> beam.Map(on_gpu(train, hints)).with_output_types(Manifest).with_resource_hints(**hints)


def train_encoder(run: MonthRun) -> Manifest:
    """Train the encoder on the window's creatives, and commit it."""
    from model import encoder_training, tensorflow

    tensorflow.load()
    once = read_once(functools.partial(examples, run, None), run.contract)
    with registry.local_folder() as folder, _backbone(run) as backbone, once as rows:
        summary = _learnt(
            run,
            encoder_training.train_encoder,
            rows,
            functools.partial(thumbnails, run),
            run.contract,
            run.config.seed,
            folder,
            lambda line: log.info("  encoder: %s", line),
            backbone=backbone,
        )
        if summary["mode"] == "none" and run.champion:
            # Rows are embedded and scored all the same, by the champion: this is its encoder once more.
            registry.fetch(run.storage, "encoder", run.champion.encoder, folder)
        return _commit(run, "encoder", folder, {"training": summary})


@contextlib.contextmanager
def _backbone(run: MonthRun) -> Iterator[tuple[str, pathlib.Path] | None]:
    if not run.config.encoder_backbone:
        yield None
        return
    name, file = run.config.encoder_backbone.split()
    if file not in run.storage.names(file):
        raise StageError(f"encoder_backbone is {run.config.encoder_backbone!r}, and {run.storage.url(file)} is not there")
    with run.storage.local(file) as path:
        yield name, path


def train_ranker(run: MonthRun) -> Manifest:
    """Train or refresh the ranker on the window's rows, and commit it."""
    from model import tensorflow, training

    tensorflow.load()
    encoder = run.encoder
    digest = registry.manifest(run.storage, "encoder", encoder).info["digest"]
    once = read_once(functools.partial(examples, run, encoder), run.contract)
    with registry.local_folder() as folder, registry.local_folder() as parent, once as rows:
        from_champion = run.champion and registry.manifest(run.storage, "ranker", run.champion.ranker).info.get("format") == registry.FORMAT
        if run.champion and from_champion:
            registry.fetch(run.storage, "ranker", run.champion.ranker, parent)
        elif run.champion:
            why = f"the champion {run.champion.ranker!r} has another model format"
            if run.config.train_mode == "refresh":
                raise StageError(f"{why}, so it cannot be refreshed; set train_mode to auto or scratch")
            log.info("  train: %s, so training starts from scratch", why)
        summary = _learnt(
            run,
            training.train_ranker,
            rows,
            run.contract,
            run.config.seed,
            folder,
            encoder,
            digest,
            parent if from_champion else None,
            lambda line: log.info("  train: %s", line),
            training.Settings(negatives=run.config.train_negatives),
            run.config.train_mode,
        )
        if summary["mode"] != "none":
            golden.write(folder, examples(run, encoder, 0))
        champion = run.champion and dataclasses.asdict(run.champion)
        return _commit(run, "ranker", folder, {"training": summary, "parent": champion, "encoder": encoder, "encoder_digest": digest})


def thumbnails(run: MonthRun) -> Iterator[pa.RecordBatch]:
    """`creative` and `thumbnail` of all images that were ever looked at, in an order that depends on their content alone."""
    for pack in pack_files(run.storage):
        yield from read_parquet(run.storage, pack, ["creative", "thumbnail"], BATCH_THUMBNAILS)


def _learnt(run: MonthRun, train: Callable[P, dict[str, Any]], *arguments: P.args, **named: P.kwargs) -> dict[str, Any]:
    """What training says of itself; where there is nothing to learn from and a champion to go on with, that there is no candidate."""
    try:
        return train(*arguments, **named)
    except NothingToLearnError as error:
        why = f"nothing could be learnt from {', '.join(month for month, _ in run.window)}: {error}"
        if CHAMPION in run.peers():
            return {"mode": "none", "why": why, "rows": 0, "clicks": 0, "impressions": 0}
        raise StageError(why) from error
    except LeakageError as error:
        raise StageError(f"nothing is trained on {', '.join(month for month, _ in run.window)}: {error}") from error


def _commit(run: MonthRun, kind: str, folder: pathlib.Path, info: dict[str, Any]) -> Manifest:
    (folder / "contract.pbtxt").write_text(contracts.dumps(run.contract))
    info |= {"month": run.month, "run": run.id, "contract": run.contract.fingerprint, "window": run.window, "source": source_digest()}
    info["format"] = registry.FORMAT
    info |= {"settings": run.config.affecting_model(), "packages": registry.packages()}
    receipts, info = registry.save(run.storage, kind, run.version, folder, info)
    return lake.commit(run.storage, lake.model_folder(kind, run.version), Manifest(kind, tuple(receipts), info))
