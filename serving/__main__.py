"""`python -m serving --lake LAKE`: answer scores over HTTP from the month that is published in a lake."""

import argparse
import hashlib
import ipaddress
import logging
import os
import pathlib
import signal
import socket
from collections.abc import Sequence

from schemas.storage import Folder, open_storage

EPILOG = """\
The service follows lookup/CURRENT in the lake: it copies the tables of that run into the cache, checks them, answers from them, and
changes to the next run without a restart when one is published. Started on a lake without a published month, it waits for the first.

  python -m serving --lake ./lake
  curl http://127.0.0.1:8080/v1/scores/KEY      a row's score; percent-encode the key (a slash is %2F)
  curl http://127.0.0.1:8080/v1/scores:lookup -d '{"keys": ["KEY", "OTHER"]}'
  curl http://127.0.0.1:8080/v1/status          month, run, rows and age of what is served; /openapi.json describes all
  curl http://127.0.0.1:8081/readyz             200 once a table is loaded, 503 before; /healthz while the process lives; /metrics

  python -m serving.tokens FILE ID              makes a bearer token and adds it to the file that --tokens names

Without --tokens it listens on this machine only, unless --insecure says that whoever reaches it may ask. TLS and compression belong to
the ingress in front of it.
"""


def default_cache(uri: str) -> pathlib.Path:
    """Where copies of a lake's tables are kept unless told: a folder of the user's cache, one for each lake."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home, "adstocrat", hashlib.sha256(uri.encode()).hexdigest()[:16])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line of whichever command serves."""
    parser.add_argument("--lake", required=True, help="gs://bucket[/prefix], or a folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on, 0 for a free one (default: %(default)s)")
    parser.add_argument("--probes-port", type=int, default=8081, help="port of /healthz, /readyz and /metrics (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that answer, one for each core (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=128, help="that a worker takes before it answers 503 (default: %(default)s)")
    parser.add_argument("--tokens", type=pathlib.Path, metavar="FILE", help="bearer tokens, one of which each request must bring")
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine without asking for tokens")
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="for verified copies of tables (default: in the user's cache)")
    parser.add_argument("--poll-seconds", type=float, default=1.0, help="how often to look for a new run (default: %(default)s)")


def serve(arguments: argparse.Namespace) -> None:
    """Serve a lake's published month until the process is told to stop; prints one line with the URLs when connections are accepted.

    Raises:
        ValueError: a setting is none, or would let everybody in unasked.
        OSError: there is no such lake folder or token file, or an address cannot be listened on.
    """
    storage = open_storage(arguments.lake)
    if isinstance(storage, Folder) and not os.path.isdir(storage.uri):
        raise FileNotFoundError(f"there is no lake at {storage.uri}; expected a folder or gs://bucket[/prefix]")
    for name, low, high in (("port", 0, 65535), ("probes_port", 0, 65535), ("workers", 1, 256), ("connections", 1, 65535)):
        value = getattr(arguments, name)
        if not low <= value <= high:  # The resolver would take a port modulo 65536.
            raise ValueError(f"{name} is {value}; expected {low} to {high}")
    if not arguments.poll_seconds > 0:
        raise ValueError(f"poll_seconds is {arguments.poll_seconds}; expected more than 0")

    # Imported here, so that a command line with many commands does not pay for a server at each.
    from serving.supervisor import Options, Supervisor
    from serving.tokens import read

    if arguments.tokens:
        read(arguments.tokens)
    with _listen(arguments.host, arguments.port) as listener, _listen(arguments.host, arguments.probes_port) as probes:
        if not (arguments.tokens or arguments.insecure or ipaddress.ip_address(listener.getsockname()[0]).is_loopback):
            raise ValueError(f"host {arguments.host} would let everybody ask; name a file of --tokens, or say --insecure")
        cache = arguments.cache or default_cache(storage.uri)
        options = Options(cache, arguments.workers, arguments.connections, arguments.poll_seconds, arguments.tokens)
        supervisor = Supervisor(storage, options, listener, probes)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: supervisor.stop.set())
        print(f"Adstocrat serves {storage.uri} at {_url(listener)}, probes at {_url(probes)} (stop with Ctrl-C)", flush=True)
        supervisor.run()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol named, asyncio switches Nagle's delay off on what is accepted.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
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
    add_flags(parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        serve(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
