"""Bearer tokens: `id.secret`, of which a file keeps the id, a salt and a salted hash.

    python -m serving.tokens FILE ID

makes a token, adds its line to the file and prints the token, which is stored nowhere else. Taking a line out revokes its token; services
that run see it within a second. A secret is 256 random bits, so a fast hash is enough.
"""

import argparse
import hashlib
import hmac
import logging
import os
import pathlib
import re
import secrets
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_SCHEME = b"bearer "
_UNKNOWN = (b"", bytes(32))


class Tokens:
    """The tokens of a file, which is read again when it changes.

    Raises:
        OSError, ValueError: the file cannot be read, or a line is none; of a later change, it is logged and the tokens stay as they were.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._known = read(path)

    def poll(self) -> None:
        """Look whether the file changed."""
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen, self._known = stamp, read(self._path)
                logger.info("Tokens of %s: %d.", self._path, len(self._known))
        except (OSError, ValueError) as error:
            logger.error("Tokens stay as they were: %s", error)

    def allows(self, authorization: bytes) -> bool:
        """Whether the value of an Authorization header has a known token."""
        name, _, secret = authorization[len(_SCHEME) :].partition(b".")
        salt, expected = self._known.get(name, _UNKNOWN)
        # One comparison for whoever asks, in a time that tells nothing of where two hashes differ.
        return hmac.compare_digest(hashlib.blake2s(salt + secret).digest(), expected) and authorization[: len(_SCHEME)].lower() == _SCHEME

    def _stamp(self) -> tuple[int, int, int]:
        stat = os.stat(self._path)
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read(path: pathlib.Path) -> dict[bytes, tuple[bytes, bytes]]:
    """Salt and hash by id; `#` begins a comment."""
    known = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            found = re.fullmatch(r"([\w-]+):([0-9a-f]{32}):([0-9a-f]{64})", line.strip(), re.ASCII)
            if not found:
                raise ValueError(f"{path}:{number} is no token; expected ID:SALT:HASH as `python -m serving.tokens` writes it, one a line")
            known[found[1].encode()] = (bytes.fromhex(found[2]), bytes.fromhex(found[3]))
    return known


def add(path: pathlib.Path, name: str) -> str:
    """Add a new token to the file, made for its owner alone where there is none, and return it.

    Raises:
        ValueError: `name` is no id, or taken.
    """
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise ValueError(f"id {name!r} is not made of letters, digits, - and _")
    if path.exists() and name.encode() in read(path):
        raise ValueError(f"id {name!r} is taken in {path}; choose another, or take its line out first")
    salt, secret = secrets.token_bytes(16), secrets.token_urlsafe(32)
    line = f"{name}:{salt.hex()}:{hashlib.blake2s(salt + secret.encode()).hexdigest()}\n"
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as stream:
        stream.write(line)
    return f"{name}.{secret}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serving.tokens", description="Make a bearer token for the score service.")
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("id", help="letters, digits, - and _")
    arguments = parser.parse_args(argv)
    try:
        print(add(arguments.file, arguments.id))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
