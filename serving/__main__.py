"""`python -m serving --lake LAKE`: answer scores over HTTP from the month that is published in a lake."""

import argparse
import contextlib
import hashlib
import logging
import os
import pathlib
import socket
from collections.abc import Sequence

from schemas.storage import Folder, open_storage

EPILOG = """\
The service follows lookup/CURRENT in the lake: it copies the tables of that run into the cache, checks them, answers from them, and
changes to the next run without a restart when one is published. Started on a lake without a published month, it waits for the first.

  python -m serving --lake ./lake
  curl http://127.0.0.1:8080/v1/scores/KEY      a row's score; percent-encode the key (a slash is %2F)
  curl http://127.0.0.1:8080/v1/status          month, run, rows and age of what is served
  curl http://127.0.0.1:8080/readyz             200 once a table is loaded, 503 before; /healthz while the process lives

It listens on this machine only unless --host says otherwise (0.0.0.0: every network), and asks callers for no credentials.
"""


def default_cache(uri: str) -> pathlib.Path:
    """Where copies of a lake's tables are kept unless told: a folder of the user's cache, one for each lake."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home, "adstocrat", hashlib.sha256(uri.encode()).hexdigest()[:16])


def serve(lake: str, host: str = "127.0.0.1", port: int = 8080, cache: pathlib.Path | None = None, poll_seconds: float = 5.0) -> None:
    """Serve a lake's published month until the process is told to stop; prints one line with the URL when requests are accepted.

    Args:
        lake: `gs://bucket[/prefix]` or a folder.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        cache: folder for copies of the tables; None for `default_cache`.
        poll_seconds: how often to look for a newly published run.

    Raises:
        ValueError: the lake's URI, the port or `poll_seconds` is none.
        OSError: there is no such lake folder, or the address cannot be listened on.
    """
    storage = open_storage(lake)
    if isinstance(storage, Folder) and not os.path.isdir(storage.uri):
        raise FileNotFoundError(f"there is no lake at {storage.uri}; expected a folder or gs://bucket[/prefix]")
    if not 0 <= port <= 65535:  # The resolver would take it modulo 65536.
        raise ValueError(f"port is {port}; expected 0 to 65535")
    if not poll_seconds > 0:
        raise ValueError(f"poll_seconds is {poll_seconds}; expected more than 0")

    # Imported here, so that a command line with many commands does not pay for a server at each.
    import uvicorn

    from serving.app import create_app

    app = create_app(storage, cache or default_cache(storage.uri), poll_seconds)
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="on", log_config=None, log_level="warning", access_log=False, server_header=False
    )
    with _listen(host, port, config.backlog) as listener:
        bound = listener.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        print(f"Adstocrat serves {storage.uri} at http://{shown}:{bound[1]} (stop with Ctrl-C)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol named, asyncio switches Nagle's delay off on what is accepted.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error
    return listener


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a wrong call ends the process with status 2 and a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description="Answer scores over HTTP from the month that is published in a lake.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lake", required=True, help="gs://bucket[/prefix], or a folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on, 0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--cache", type=pathlib.Path, help="folder for copies of the tables (default: one for each lake in the user's cache)"
    )
    parser.add_argument("--poll-seconds", type=float, default=5.0, help="how often to look for a new run (default: %(default)s)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        serve(arguments.lake, arguments.host, arguments.port, arguments.cache, arguments.poll_seconds)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
