"""A cloud on one machine: emulators of Cloud Storage and BigQuery as child processes on loopback.

    eval "$(adstocrat local-cloud start --state build/cloud)"       # … work with gs://adstocrat/ and BigQuery … then `stop`
    adstocrat local-cloud --state build/cloud -- COMMAND…           # the same around one command

The same code runs against them as against Google Cloud; only the environment differs. Objects and tables stay under the state folder
from one start to the next. Whether a server runs is decided by the lock on its `.lock` file, which it inherits and holds for as long as
it lives, so a process id that was used again is never taken for one of ours.
"""

import contextlib
import ctypes
import fcntl
import http.client
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

PROJECT = "adstocrat-local"
BUCKET = "adstocrat"
SERVERS = ("storage", "bigquery")
START_SECONDS = 90
STOP_SECONDS = 30
PR_SET_PDEATHSIG = 1
TOKEN = {"client_id": "local", "client_secret": "local", "refresh_token": "local", "token": "local", "expiry": "9999-01-01T00:00:00Z"}

# Kept so that a child of this very process is reaped when it is stopped, and no zombie of it remains.
_children: dict[int, subprocess.Popen[bytes]] = {}


def start(state: pathlib.Path, tied: bool = False) -> dict[str, str]:
    """Start both servers unless they run, wait until they answer, and return the environment that points every client at them.

    Args:
        state: folder for objects, tables, logs and the throw-away credentials; made if absent.
        tied: let the servers end when this process does, however it ends (Linux only).

    Raises:
        RuntimeError: an emulator is not installed, or did not come up; the message ends with its log's last lines.
    """
    for package in ("gcp_storage_emulator", "bqemulator", "duckdb_extensions"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"the local cloud needs the package {package}; install it with: pip install 'adstocrat[local]'")
    state = state.resolve()
    state.mkdir(parents=True, exist_ok=True)
    with _turn(state):
        try:
            if not _all_run(state):
                _stop(state)
                _launch_both(state, os.getpid() if tied else 0)
            for name in SERVERS:
                _wait_for(state, name)
        except BaseException:
            _stop(state)
            raise
        return _saved(state)["environment"]


def stop(state: pathlib.Path) -> None:
    """Stop both servers, which write out everything first; nothing happens where none runs."""
    state = state.resolve()
    if state.is_dir():
        with _turn(state):
            _stop(state)


def status(state: pathlib.Path) -> dict[str, str] | None:
    """The environment if both servers run and answer, else None."""
    state = state.resolve()
    good = _all_run(state) and all(_answers(state, name) for name in SERVERS)
    return _saved(state)["environment"] if good else None


def run(state: pathlib.Path, command: list[str]) -> int:
    """Run `command` inside a local cloud and return its exit status, 128 + signal if it was killed.

    The servers end with the command, or with this process if that is killed first. Only servers that were running before are left.
    """
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        # A Ctrl-C at the terminal has reached the command already: it is in the same foreground group.
        if process is not None and not (signum == signal.SIGINT and _in_foreground()):
            process.send_signal(signum)

    ours = not _all_run(state.resolve())
    handlers = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        environment = start(state, tied=True)
        if received:
            return 128 + received[0]
        try:
            process = subprocess.Popen(command, env={**os.environ, **environment})
        except OSError as error:
            print(f"cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
            return 127
        for signum in received:  # what came between the fork and the assignment above
            process.send_signal(signum)
        code = process.wait()
        return code if code >= 0 else 128 - code
    finally:
        if ours:
            stop(state)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def export_lines(environment: dict[str, str]) -> str:
    """Shell lines that set the environment, for `eval`."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())


def die_with(parent: int) -> None:
    """Have SIGTERM sent to this process when its parent ends, on Linux; 0 means never."""
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # It ended before the call above.
            sys.exit(1)


@contextlib.contextmanager
def _turn(state: pathlib.Path) -> Iterator[None]:
    """Starts and stops of one state take turns."""
    with open(state / "turn.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _launch_both(state: pathlib.Path, parent: int) -> None:
    storage, bigquery, grpc = _free_ports(state)
    _save(state, storage, bigquery, grpc)
    objects = state / "storage"
    _launch(state, "storage", ["beam_jobs.local_storage", storage, objects, parent], {"STORAGE_DIR": objects.name})
    # Avro would be fetched from the network at each start, and nothing here loads it.
    settings = {"BQEMU_GCS_LOCAL_ROOT": str(objects), "BQEMU_ENABLE_FORMAT_EXTENSIONS": "false"}
    _launch(state, "bigquery", ["beam_jobs.local_cloud", bigquery, grpc, state / "bigquery", parent], settings)


def _launch(state: pathlib.Path, name: str, module: list[object], settings: dict[str, str]) -> None:
    with open(state / f"{name}.lock", "w") as lock, open(state / f"{name}.log", "wb") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, module)],
            env={**os.environ, **settings},
            cwd=state,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            # A Ctrl-C at the terminal is for the command; the servers are stopped after it.
            start_new_session=True,
        )
        lock.write(str(process.pid))
    _children[process.pid] = process


def _wait_for(state: pathlib.Path, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(state, name):
        ended = not _runs(state, name)
        if ended or time.monotonic() > deadline:
            what = "ended" if ended else f"did not answer in {START_SECONDS} s"
            log = state / f"{name}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"the {name} emulator {what}; the end of {log}:\n{tail}")
        time.sleep(0.05)


def _stop(state: pathlib.Path) -> None:
    running = [name for name in SERVERS if _runs(state, name)]
    for signum in (signal.SIGTERM, signal.SIGKILL):
        pids = {name: int((state / f"{name}.lock").read_text()) for name in running}
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        deadline = time.monotonic() + STOP_SECONDS
        while (running := [name for name in running if _runs(state, name)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in (pid for name, pid in pids.items() if name not in running and pid in _children):
            _children.pop(pid).wait()


def _all_run(state: pathlib.Path) -> bool:
    return all(_runs(state, name) for name in SERVERS)


def _runs(state: pathlib.Path, name: str) -> bool:
    try:
        with open(state / f"{name}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _answers(state: pathlib.Path, name: str) -> bool:
    """Whether the server of that name answers with 200; asked without any proxy."""
    variable, path = {"storage": ("STORAGE_EMULATOR_HOST", "/"), "bigquery": ("BIGQUERY_EMULATOR_HOST", "/readyz")}[name]
    address = urlsplit(_saved(state)["environment"][variable]).netloc
    with (
        contextlib.closing(http.client.HTTPConnection(address, timeout=5)) as connection,
        contextlib.suppress(OSError, http.client.HTTPException),
    ):
        connection.request("GET", path)
        return connection.getresponse().status == 200
    return False


def _saved(state: pathlib.Path) -> dict[str, Any]:
    return json.loads((state / "cloud.json").read_text())


def _free_ports(state: pathlib.Path) -> list[int]:
    """Three free ports, those of the last start if possible, so that an environment exported then holds again."""
    try:
        wanted = _saved(state)["ports"]
    except FileNotFoundError:
        wanted = [0, 0, 0]
    with contextlib.ExitStack() as held:
        return [_bind(held, port) for port in wanted]


def _bind(held: contextlib.ExitStack, port: int) -> int:
    try:
        probe = socket.create_server(("127.0.0.1", port))
    except OSError:
        probe = socket.create_server(("127.0.0.1", 0))
    return held.enter_context(probe).getsockname()[1]


def _save(state: pathlib.Path, storage: int, bigquery: int, grpc: int) -> None:
    url = f"http://127.0.0.1:{storage}"
    credentials = state / "credentials.json"
    # Clients find these default credentials at once, where they would search for 20 s. Python's take the token as it is, Arrow's ask
    # token_uri for one. A service account instead would have google-auth look up its regions at Google, in every process.
    credentials.write_text(json.dumps({"type": "authorized_user", **TOKEN, "token_uri": f"{url}/token"}))
    environment = {
        "STORAGE_EMULATOR_HOST": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "BIGQUERY_EMULATOR_HOST": f"http://127.0.0.1:{bigquery}",
        "GOOGLE_CLOUD_PROJECT": PROJECT,
        "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
    }
    (state / "cloud.json").write_text(json.dumps({"environment": environment, "ports": [storage, bigquery, grpc]}))


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _serve_bigquery(port: int, grpc_port: int, folder: str) -> None:
    """The BigQuery emulator, with the DuckDB extension that it insists on taken from its package instead of the network."""
    from bqemulator.cli import main
    from duckdb_extensions import import_extension

    import_extension("spatial")
    address = ["--rest-host", "127.0.0.1", "--rest-port", str(port), "--grpc-host", "127.0.0.1", "--grpc-port", str(grpc_port)]
    main(["start", *address, "--data-dir", folder, "--project", PROJECT, "--log-level", "warning"])


if __name__ == "__main__":
    die_with(int(sys.argv[4]))
    _serve_bigquery(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
