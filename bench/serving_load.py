"""Servers, each on the first core, and wrk on the last: what `bench.serving` measures with."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

from served import eventually

from bench.harness import TOP
from serving.store import Table

CONNECTIONS, BATCH = 32, 1_000
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


@dataclasses.dataclass
class Measured:
    """A server: where it listens, whose CPU counts, and what all rounds gave so far."""

    port: int
    pid: int
    header: str = ""
    requests: int = 0
    cpu: float = 0.0
    seconds: float = 0.0
    p99s: list[float] = dataclasses.field(default_factory=list)  # Of each round, in milliseconds.

    @property
    def per_cpu_second(self) -> float:
        return self.requests / self.cpu

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    def anew(self) -> "Measured":
        return Measured(self.port, self.pid, self.header)


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

    def __call__(self, server: Measured, script: str, seconds: float) -> None:
        """One round; any answer but 200 ends all."""
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
        server.p99s.append(float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit])
        server.requests, server.cpu, server.seconds = server.requests + requests, server.cpu + cpu, server.seconds + took


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
