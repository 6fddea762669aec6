"""The token and the digests that let processes of one training trust each other's messages.

A connection begins with a mutual challenge: each side sends a random number, and proves that it
knows the token by the keyed digest (HMAC-SHA256, RFC 2104) of both numbers. Each direction then has
a key of its own, and each message a digest of its number and content, so one that was changed, left
out, repeated or sent back is noticed before it is read. Nothing is encrypted.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
from functools import partial
from pathlib import Path

from rdd_pipeline.errors import UserError

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "RDD_TOKEN"
MAGIC = b"rdd_pipeline rendezvous 1\n"
"""What both sides begin with; another number if messages ever change."""
DIGEST = 32
"""Bytes of a digest, of a random number, and of what names a server."""
GREETING = len(MAGIC) + 2 * DIGEST
"""Bytes of what the server says first: `MAGIC`, its name, its random number."""
ANSWER = len(MAGIC) + 2 * DIGEST
"""Bytes of what the client says then: `MAGIC`, its random number, its proof."""
REFUSED = bytes(DIGEST)
"""Comes in the place of the server's proof."""
HEAD = 4 + DIGEST
"""Bytes before a message: its length and its digest."""
MAX_MESSAGE = 8 << 20
"""Bytes of the longest one."""


class BadMessageError(ValueError):
    """The other side sent what no process of this training sends; the connection has to end."""


class Sealer:
    """One direction of a connection: all that is sent, or all that is received."""

    def __init__(self, key: bytes) -> None:
        self._key, self._messages = key, 0

    def seal(self, message: bytes) -> bytes:
        """Head and message, as they are sent.

        Raises:
            ValueError: The message is longer than `MAX_MESSAGE`.
        """
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"message of {len(message)} bytes, at most {MAX_MESSAGE}")
        return len(message).to_bytes(4, "big") + self._digest(message) + message

    def check(self, head: bytes, message: bytes) -> bytes:
        """The message, if it is the next one that was sealed.

        Raises:
            BadMessageError: It is not.
        """
        if not hmac.compare_digest(head[4:], self._digest(message)):
            raise BadMessageError("a message was changed, repeated or left out on its way")
        return message

    def _digest(self, message: bytes) -> bytes:
        self._messages += 1
        return hmac.digest(self._key, self._messages.to_bytes(8, "big") + message, "sha256")


def length_of(head: bytes) -> int:
    """Bytes of the message that follows.

    Raises:
        BadMessageError: More than `MAX_MESSAGE`.
    """
    length = int.from_bytes(head[:4], "big")
    if length > MAX_MESSAGE:
        raise BadMessageError(f"a message of {length} bytes was announced, at most {MAX_MESSAGE}")
    return length


def proof(token: str, side: bytes, greeting: bytes, nonce: bytes) -> bytes:
    """What only a side (``b"client"``, ``b"server"``) that has the token can say."""
    return hmac.digest(token.encode(), b"proof of " + side + greeting + nonce, "sha256")


def sealer(token: str, side: bytes, greeting: bytes, nonce: bytes) -> Sealer:
    """What that side sends by, and the other receives by."""
    key = hmac.digest(token.encode(), b"messages of " + side + greeting + nonce, "sha256")
    return Sealer(key)


def new_token() -> str:
    """32 random bytes, fit for a shell."""
    return secrets.token_urlsafe(32)


def find_token(file: str | Path | None, *, make: bool = False) -> str | None:
    """The token of the file, or else of the environment variable `RDD_TOKEN`, if there is one.

    `make`: a file that is not there is written, for this user only.

    Raises:
        UserError: There is no such file, or what is found is no token.
    """
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE)
        return None if token is None else _checked(token, TOKEN_VARIABLE)
    path = Path(file).expanduser()
    try:
        if make and not path.exists():
            # Nobody else's for a moment, either.
            with open(path, "x", opener=partial(os.open, mode=0o600)) as new:
                new.write(new_token())
        with path.open("rb") as stream:
            mode, content = os.fstat(stream.fileno()).st_mode, stream.read(1000)
    except OSError as error:
        raise UserError(
            f"The token file {path} cannot be read ({error.strerror}). Copy the one of the first "
            f"machine (its trainer.token_file), or set {TOKEN_VARIABLE}."
        ) from error
    if mode & 0o077:
        logger.warning("Others may read the token file %s. Make it yours: chmod 600 %s", path, path)
    return _checked(content.decode(errors="replace").strip(), str(path))


def _checked(token: str, source: str) -> str:
    if not re.fullmatch(r"[\w.~+/=-]{32,512}", token, re.ASCII):
        raise UserError(
            f"{source} holds no token: expected 32 to 512 letters, digits or -_.~+/= and found "
            f"{len(token)} characters. Make one by: "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token
