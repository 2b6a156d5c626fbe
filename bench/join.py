"""Bringing rows and embeddings together: `Repartition` by spill files beside CoGroupByKey of single rows.

    scripts/bench join [-- --millions 1,3,10 --slice 100000 --rounds 3 --work FOLDER]

Rows have a key, six columns and an image of 200,000; each embedding is 64 floats. Both read Parquet, find each row its embedding, and write
how many rows they joined and a sum that a wrong embedding would change. CoGroupByKey gets `--slice` rows, and as many fewer embeddings.
"""

import argparse
import functools
import json
import pathlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench import harness
from bench.harness import Bar, Clock, Told
from bench.score import fresh
from model.features import embedding_column, embedding_matrix

CREATIVES, WIDTH, MILLION, FEW = 200_000, 64, 1_000_000, 100


def lay_out(folder: pathlib.Path, rows: int, creatives: int) -> None:
    """Rows and embeddings, in files of a million rows; the same arguments give the same."""
    if folder.exists():
        return
    making, rng = fresh(folder.with_suffix(".part")), np.random.default_rng(0)
    names = pa.array([f"cr{number:08d}.jpg" for number in range(creatives)])
    vectors = embedding_column(rng.standard_normal((creatives, WIDTH), np.float32))
    pq.write_table(pa.table({"image": names, "embedding": vectors}), making / "embeddings.parquet", row_group_size=1 << 16)
    for start in range(0, rows, MILLION):
        count = min(MILLION, rows - start)
        numbers = np.arange(start, start + count)
        columns = {"key": pa.array([f"ad{number:09d}" for number in numbers.tolist()]), "number": pa.array(numbers)}
        for name, values in (("advertiser", 20_000), ("campaign", 80_000), ("placement", 48), ("device", 4)):
            texts = pa.array([f"{name[:3]}{number:06d}" for number in range(values)])
            columns[name] = texts.take(pa.array(rng.integers(0, values, count)))
        columns["bid"] = pa.array(rng.random(count))
        columns["image"] = names.take(pa.array((creatives * rng.random(count) ** 2).astype(np.int64)))
        pq.write_table(pa.table(columns), making / f"rows-{start:09d}.parquet", row_group_size=1 << 16)
    making.rename(folder)


def ours(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import apache_beam as beam

    from beam_jobs.arrow import Repartition, ShardPair, Unit, pair_shards, read_table, shards_for
    from beam_jobs.ingest import shard_of_image
    from beam_jobs.runner import run_pipeline
    from beam_jobs.threads import InThreads
    from schemas.parquet import read_parquet
    from schemas.storage import Storage, open_storage

    clock.lap("imports")
    storage, shards = open_storage(str(flags.work)), shards_for(flags.rows)

    def assign(batch: pa.RecordBatch) -> np.ndarray:
        return shard_of_image(batch["image"], shards)

    def joined(pair: ShardPair, storage: Storage) -> tuple[int, float]:
        right = read_table(storage, pair.right).combine_chunks()
        images, vectors = right["image"].combine_chunks(), right["embedding"].combine_chunks()
        rows = read_table(storage, pair.left)
        # As the product does it: all rows of a unit find their images at once.
        found = pa.table({"number": rows["number"], "at": pc.index_in(rows["image"], images)})
        return total(summed(batch["number"], vectors.take(batch["at"])) for batch in found.to_batches())

    def tell(units: list[Unit], side: str) -> None:
        # Bytes in spill files, and those that went through the shuffle.
        sections = [(unit.shard, section) for unit in units for section in unit.sections]
        told = sum(section.length for _, section in sections), sum(len(pickle.dumps(one)) for one in sections)
        storage.write(f"told-{side}.json", json.dumps(told).encode())

    def define(root: beam.Pipeline, folder: str) -> None:
        sides = {}
        for side, files in (("rows", storage.names(f"{folder}/rows-")), ("embeddings", [f"{folder}/embeddings.parquet"])):
            sides[side] = (
                root
                | f"Files{side}" >> beam.Create(files)
                | f"Read{side}" >> beam.FlatMap(functools.partial(read_parquet, storage)).with_output_types(pa.RecordBatch)
                | f"Shard{side}" >> Repartition(storage, "spill", shards, assign, *(() if side == "rows" else (None,)))
            )
            if flags.count_bytes:
                _ = sides[side] | f"All{side}" >> beam.combiners.ToList() | f"Tell{side}" >> beam.Map(tell, side)
        pairs = pair_shards(sides["rows"], sides["embeddings"])
        told = pairs | "Join" >> beam.ParDo(InThreads(joined, storage)) | "Sum" >> beam.CombineGlobally(total)
        _ = told | "Write" >> beam.Map(lambda told: storage.write("ours.json", json.dumps(told).encode()))

    def prepare(rows: int) -> Callable[[], int]:
        storage.delete("spill/")

        def joined_all() -> int:
            run_pipeline(lambda root: define(root, f"rows-{rows}"), [])
            return rows

        return joined_all

    return harness.beyond_start(clock, prepare, FEW, flags.rows)


def stock(flags: argparse.Namespace) -> Told:
    clock = Clock()
    import apache_beam as beam
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    clock.lap("imports")

    def joined(image: str, sides: Any) -> Iterator[tuple[int, float]]:
        vectors = list(sides["embeddings"])
        for row in sides["rows"]:
            yield 1, float(np.frombuffer(vectors[0], "<f4").sum(dtype=np.float64)) * (row["number"] % 1009)

    def prepare(count: int) -> Callable[[], int]:
        folder = flags.work / f"rows-{count}"

        def joined_all() -> int:
            with beam.Pipeline(FnApiRunner()) as root:
                read = root | "Rows" >> beam.io.ReadFromParquet(str(folder / "rows-*.parquet"))
                rows = read | "KeyRows" >> beam.Map(lambda row: (row["image"], row))
                embeddings = (
                    root
                    | "Embeddings" >> beam.io.ReadFromParquet(str(folder / "embeddings.parquet"))
                    | "KeyEmbeddings" >> beam.Map(lambda row: (row["image"], row["embedding"]))
                )
                sides = {"rows": rows, "embeddings": embeddings}
                told = sides | beam.CoGroupByKey() | beam.FlatMapTuple(joined) | beam.CombineGlobally(total)
                _ = told | "Write" >> beam.Map(lambda told: (flags.work / "stock.json").write_text(json.dumps(told)))
            return count

        return joined_all

    return harness.beyond_start(clock, prepare, FEW, flags.rows)


def summed(numbers: pa.Array, vectors: pa.Array) -> tuple[int, float]:
    matrix = embedding_matrix(vectors)
    return len(matrix), float(matrix.sum(axis=1, dtype=np.float64) @ (numbers.to_numpy() % 1009))


def total(parts: Any) -> tuple[int, float]:
    parts = list(parts)
    return sum(rows for rows, _ in parts), sum(value for _, value in parts)


def expected(folder: pathlib.Path) -> tuple[int, float]:
    """What both sides should tell, by NumPy."""
    embeddings = pq.read_table(folder / "embeddings.parquet")
    images, sums = embeddings["image"].combine_chunks(), embedding_matrix(embeddings["embedding"].combine_chunks()).sum(1, np.float64)
    tables = (pq.read_table(path, columns=["number", "image"]) for path in sorted(folder.glob("rows-*.parquet")))
    parts = ((len(one), sums[pc.index_in(one["image"], images).to_numpy()] @ (one["number"].to_numpy() % 1009)) for one in tables)
    return total(parts)


def check(flags: argparse.Namespace, side: str, rows: int) -> None:
    told, wanted = json.loads((flags.work / f"{side}.json").read_text()), expected(flags.work / f"rows-{rows}")
    assert told[0] == wanted[0] == rows and np.isclose(told[1], wanted[1], rtol=1e-6), (side, told, wanted)


def bench(flags: argparse.Namespace) -> None:
    sizes, parts, bars = [int(float(size) * MILLION) for size in flags.millions.split(",")], [], []
    lay_out(flags.work / f"rows-{FEW}", FEW, FEW)
    lay_out(flags.work / f"rows-{flags.slice}", flags.slice, max(1000, CREATIVES * flags.slice // MILLION))
    small = harness.take_turns(flags, ["ours", "stock"], rows=flags.slice)
    for side in small:
        check(flags, side, flags.slice)
    turns = {f"CoGroupByKey, {flags.slice:,} rows": small["stock"], f"ours, {flags.slice:,}": small["ours"]}
    for rows in sizes:
        lay_out(flags.work / f"rows-{rows}", rows, CREATIVES)
        some = harness.take_turns(flags, ["ours"], rows=rows)["ours"]
        check(flags, "ours", rows)
        harness.turn(flags, "ours", rows=rows, count_bytes=1)
        told = [json.loads((flags.work / f"told-{side}.json").read_text()) for side in ("rows", "embeddings")]
        turns[f"ours, {rows:,}"] = some
        bars.append(Bar(f"rows/s at {rows:,}", harness.rate(some), 500_000))
        bars.append(Bar(f"peak memory at {rows:,}, GB", harness.median(some, lambda one: one.peak / 1e9), 1.0, at_least=False))
        spilled, shuffled = (sum(one[i] for one in told) for i in (0, 1))
        parts.append(f"{rows:,} rows: {spilled / rows:.0f} bytes a row spilled (embeddings included), {shuffled / rows:.3f} shuffled.")
        ratio = harness.rate(some) / harness.rate(small["stock"])
        bars.append(Bar(f"rows/s at {rows:,}, of CoGroupByKey's of single rows", ratio, 20))
    parts.append("No image bytes are in either: an image is its name and its embedding.")
    harness.report("3", "repartition and join", [harness.table(turns, "rows"), " ".join(parts)], bars, [])


SIDES = {"ours": ours, "stock": stock}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--millions", default="1,3,10", help="millions of rows (default: %(default)s)")
    parser.add_argument("--slice", type=int, default=100_000, help="rows for CoGroupByKey (default: %(default)s)")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count-bytes", type=int, default=0, help=argparse.SUPPRESS)


if __name__ == "__main__":
    harness.run_bench(__doc__, SIDES, bench, add_flags)
