"""Creatives: the stages that fetch, decode and embed beside bare loops and Ray Data, from a folder and from the storage emulator.

    scripts/bench creatives [-- --images 20000 --slice 4000 --rounds 2 --work FOLDER]

JPEGs of 1200 x 628 (bench/pictures.py). The bare loop has the same fetch pool, decoder and encoder, and writes embeddings: without Beam,
the digest that a creative is known by, thumbnails, or anything that lets a month go on where it stopped. Ray Data and the emulator get
`--slice` images. The encoder is that of a small month that is run for it.
"""

import argparse
import itertools
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench import harness, pictures
from bench.harness import ADSTOCRAT, Bar, Clock, Told
from bench.score import fresh
from model.features import embedding_column, embedding_matrix

MONTH, BATCH = "2026-08", 1024


def lay_out(
    lake: str, images: int, ads: int, months: list[str], size: tuple[int, int] = pictures.SIZE, noise: float = pictures.NOISE
) -> None:
    """Sample months with pictures of that size, a tenth of them new in each month."""
    from schemas import sample
    from schemas.storage import open_storage

    def write(storage: Any, some: Any) -> Iterator[int]:
        # What was there last month is the same picture.
        return pictures.write(storage, some, size, noise)

    with mock.patch.multiple(sample, write_pictures=write, NEW_CREATIVES=0.1, MISSING_IMAGES=0.0):
        sample.write_months(open_storage(lake), months, ads, images, 0, lambda line: None)


def _prepared(lake: str) -> Any:
    from beam_jobs.config import Config
    from beam_jobs.run import prepare

    return prepare(Config(lake=lake), MONTH)


def _put_encoder(flags: argparse.Namespace, lake: str) -> str:
    """Put the small month's encoder into the lake; returns its version."""
    from bench import lakes
    from model import registry
    from schemas.lake import commit, model_folder
    from schemas.storage import open_storage

    run, storage = lakes.month_of(flags.encoder_lake), open_storage(lake)
    version = run.manifest(run.stage("evaluation")).info["encoder"]
    made = registry.manifest(run.storage, "encoder", version)
    for receipt in made.receipts:
        storage.write(receipt.file, run.storage.read(receipt.file))
    commit(storage, model_folder("encoder", version), made)
    return version


def ours(flags: argparse.Namespace) -> Told:
    clock = Clock()
    from beam_jobs import creatives, embed
    from beam_jobs.runner import run_pipeline
    from bench import lakes
    from model import registry, tensorflow

    tensorflow.load()
    clock.lap("imports")
    run = _prepared(flags.of)
    version = _put_encoder(flags, flags.of)
    for folder in ("creatives/", "embeddings/"):
        run.storage.delete(folder)
    clock.lap("listing")
    with lakes.models_kept():
        registry.load(run.storage, "encoder", version)
        clock.lap("model")
        run_pipeline(lambda root: creatives.define_pack_pipeline(root, run), [])
        packs = clock.lap("packs")
        run_pipeline(lambda root: embed.define_pack_pipeline(root, run, version), [])
        embedded = clock.lap("embed")
    run.storage.delete(f"{run.spill}/")
    found = run.manifest(run.stage("creatives") + "/packs")
    start = {name: clock.laps[name] for name in ("imports", "listing", "model")}
    cpu = clock.cpu["packs"] + clock.cpu["embed"]
    return {"units": found.count("decoded"), "seconds": packs + embedded, "cpu": cpu, "start": start, "packs": packs, "embed": embedded}


def bare(flags: argparse.Namespace) -> Told:
    clock = Clock()
    from model import images, registry, tensorflow

    tensorflow.load()
    clock.lap("imports")
    run = _prepared(flags.of)
    version = _put_encoder(flags, flags.of)
    names = run.storage.names(f"raw/{MONTH}/images/")
    clock.lap("listing")
    encoder = registry.load(run.storage, "encoder", version)
    clock.lap("model")

    def look(name: str) -> np.ndarray:
        return images.decode(run.storage.read(name))[0]

    writer, left, out = None, iter(names), fresh(flags.work / "bare-embeddings")
    with ThreadPoolExecutor(run.config.fetch_threads) as pool:
        # All are asked for at once, as the fetch pool of the stage is.
        looked = pool.map(look, names)
        while some := list(itertools.islice(left, BATCH)):
            vectors = encoder.embed(np.stack(list(itertools.islice(looked, len(some)))))
            table = pa.table({"image": some, "embedding": embedding_column(vectors)})
            writer = writer or pq.ParquetWriter(out / "embeddings.parquet", table.schema)
            writer.write_table(table)
    assert writer
    writer.close()
    seconds = clock.lap("loop")
    start = {name: clock.laps[name] for name in ("imports", "listing", "model")}
    return {"units": len(names), "seconds": seconds, "cpu": clock.cpu["loop"], "start": start}


class RayEncoder:
    def __init__(self, lake: pathlib.Path) -> None:
        from bench import lakes
        from model import registry, tensorflow

        tensorflow.load()
        run = lakes.month_of(lake)
        self._encoder = registry.load(run.storage, "encoder", run.manifest(run.stage("evaluation")).info["encoder"])

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        vectors = self._encoder.embed(np.stack(list(batch["thumbnail"])))
        return pa.table({"image": batch["path"], "embedding": embedding_column(vectors)})


def ray_decode(batch: dict[str, Any]) -> dict[str, Any]:
    from model import images

    return {"path": batch["path"], "thumbnail": np.stack([images.decode(data)[0] for data in batch["bytes"]])}


def ray_data(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    clock.lap("Ray")
    folder = pathlib.Path(flags.of) / "raw" / MONTH / "images"
    out = fresh(flags.work / "ray-embeddings")
    paths = [str(path) for path in sorted(folder.iterdir())]

    def run(some: list[str]) -> None:
        data = ray.data.read_binary_files(some, include_paths=True)
        # Decoding and embedding share the two cores; half a core each lets both run.
        decoded = data.map_batches(ray_decode, batch_size=64, num_cpus=0.5)
        done = decoded.map_batches(RayEncoder, fn_constructor_args=(flags.encoder_lake,), batch_size=256, concurrency=1, num_cpus=0.5)
        done.write_parquet(str(out))

    run(paths[:64])
    start = clock.lap("actors and model")
    shutil.rmtree(out)
    run(paths)
    seconds = clock.lap("run") - start
    ray.shutdown()
    return {"units": len(paths), "seconds": seconds, "start": {"Ray": clock.laps["Ray"], "actors and model": start}}


def check(lake: str, *theirs: pathlib.Path) -> float:
    """The largest difference of an embedding of theirs from ours, by what each image's content is; they must have one of each image."""
    import hashlib

    from schemas.storage import open_storage

    storage = open_storage(lake)
    mine = {}
    for name in (name for name in storage.names("embeddings/") if name.endswith(".parquet")):
        with storage.local(name) as path:
            mine |= _vectors(pq.read_table(path), "creative")
    contents = {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.names(f"raw/{MONTH}/images/")}
    worst = 0.0
    for folder in theirs:
        found = {
            f"raw/{MONTH}/images/{name.rpartition('/')[2]}": vector for name, vector in _vectors(pq.read_table(folder), "image").items()
        }
        assert found.keys() == contents.keys(), f"{folder.name} has {len(found):,} images of {len(contents):,}"
        worst = max(worst, *(float(np.abs(vector - mine[contents[name]]).max()) for name, vector in found.items()))
    return worst


def _vectors(table: pa.Table, by: str) -> dict[str, np.ndarray]:
    return dict(zip(table[by].to_pylist(), embedding_matrix(table["embedding"].combine_chunks()), strict=True))


def bench(flags: argparse.Namespace) -> None:
    from bench import lakes

    flags.encoder_lake = flags.encoder_lake or lakes.month_lake(flags.work, 20_000, 500)
    if flags.of:
        return in_emulator(flags)
    big, few = str(flags.work / f"images-{flags.images}"), str(flags.work / f"images-{flags.slice}")
    for lake, images in ((big, flags.images), (few, flags.slice)):
        if not pathlib.Path(lake, "raw").exists():
            lay_out(lake, images, images, [MONTH])
    turns = harness.take_turns(flags, ["ours", "bare"], of=big)
    off = check(big, flags.work / "bare-embeddings")
    one = {f"{side}, 1 core": [harness.turn(flags, side, cores=1, of=few)] for side in ("ours", "bare")}
    turns |= {"ray": harness.take_turns(flags, ["ray"], rounds=1, of=few)["ray"]}
    off = max(off, check(few, flags.work / "bare-embeddings", flags.work / "ray-embeddings"))
    assert off < 1e-5, off
    rates = {side: harness.rate(some) for side, some in turns.items()}
    gain = {side: rates[side] / harness.rate(one[f"{side}, 1 core"]) for side in ("ours", "bare")}
    bars = [
        Bar("images/s from a folder, of a bare loop's", rates["ours"] / rates["bare"], 0.85),
        Bar("images/s from a folder, of Ray Data's", rates["ours"] / rates["ray"], 1.3),
        Bar("bar 10: gain by the second core, of the bare loop's", gain["ours"] / gain["bare"], 0.9),
    ]
    stages = ", ".join(
        f"{name} {harness.median(turns['ours'], lambda one, name=name: one.told[name]):.1f} s" for name in ("packs", "embed")
    )
    parts = [
        f"{flags.images:,} JPEGs; Ray and one core on {flags.slice:,} of them. Of ours: {stages}. Embeddings differ by up to {off:.1g}.",
        harness.table({**turns, **one}, "images"),
    ]
    harness.report("4", "creatives from a folder", parts, bars, ["tensorflow", "ray", "pillow"])
    if flags.emulator:
        cloud = [*ADSTOCRAT, "local-cloud", "--state", str(flags.work / "cloud"), "--"]
        again = [sys.executable, "-m", "bench.creatives", "--work", str(flags.work), "--rounds", str(flags.rounds)]
        again += ["--slice", str(flags.slice), "--encoder-lake", str(flags.encoder_lake), "--of", "gs://adstocrat/bench"]
        subprocess.run([*cloud, *again], check=True)
        shutil.rmtree(flags.work / "cloud")
    return None


def in_emulator(flags: argparse.Namespace) -> None:
    """The same beside the storage emulator, which runs already."""
    lay_out(flags.of, flags.slice, flags.slice, [MONTH])
    turns = harness.take_turns(flags, ["ours", "bare"], of=flags.of)
    off = check(flags.of, flags.work / "bare-embeddings")
    assert off < 1e-5, off
    bars = [Bar("images/s from the emulator, of a bare loop's", harness.rate(turns["ours"]) / harness.rate(turns["bare"]), 0.85)]
    parts = [f"{flags.slice:,} JPEGs. Embeddings differ by up to {off:.1g}.", harness.table(turns, "images")]
    harness.report("4b", "creatives from the storage emulator", parts, bars, ["tensorflow", "pillow"])


SIDES = {"ours": ours, "bare": bare, "ray": ray_data}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--slice", type=int, default=4_000, help="images for Ray Data, one core and the emulator (default: %(default)s)")
    parser.add_argument("--encoder-lake", type=pathlib.Path, help="a lake with a month that was run; default: one is made")
    parser.add_argument("--emulator", type=int, default=1, help="whether to go on with the emulator")
    parser.add_argument("--of", help=argparse.SUPPRESS)


if __name__ == "__main__":
    harness.run_bench(__doc__, SIDES, bench, add_flags)
