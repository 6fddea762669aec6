"""Passwords and tokens in the addresses of databases and servers, kept out of whatever is shown.

An address is taken apart as requests and SQLAlchemy do it, not matched up to the first ``@``: a
password may hold ``@``, ``/``, ``?`` or ``#``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"

_ADDRESS = re.compile(r"([A-Za-z][\w+.\-]*://)([^\s'\"<>]+)")
_HOST = re.compile(r"(\[[^\]]*\]|[^:@\[\]]*)(:\d*)?")
_QUERY = re.compile(r"[?#][\w.\-~%+]+(=|$)")
# What a query may say openly; of everything else only the name is shown.
_HARMLESS = {"sslmode", "charset", "driver", "timeout", "connect_timeout", "mode", "cache"}

_ADDRESSES = {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_S3_ENDPOINT_URL", "HF_ENDPOINT"}
_LOGINS = {"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"}

_secrets: set[str] = set()


def remember_secrets(address: str) -> None:
    """Hide the secrets of this address from now on wherever `without_secrets` finds them.

    Libraries cut an address in pieces, which their messages show without what was around them.
    """
    _, found, rest = address.partition("://")
    if not found:
        return
    user, _, query = _parts(rest)
    name, _, password = user.partition(":")
    values = [value for _, value, harmless in _items(query) if not harmless]
    # Where the password is empty, the name is a token.
    for secret in (user, password or name, *values):
        for form in (secret, unquote(secret), unquote_plus(secret)):
            _secrets.update({form, quote(form, safe=""), quote_plus(form)})
            _secrets.update({repr(form)[1:-1], json.dumps(form)[1:-1]})
    # Pieces as a parser cuts them that takes some character of the password for its own.
    _secrets.update(
        piece for piece in re.split(r"[@/?#:'\"\s]", password or name) if len(piece) >= 4
    )


def remember_secrets_in(values: Any) -> None:
    """`remember_secrets` for every address in nested mappings and lists."""
    if isinstance(values, Mapping):
        values = values.values()
    for value in values:
        if isinstance(value, str):
            remember_secrets(value)
        elif isinstance(value, Mapping | list | tuple):
            remember_secrets_in(value)


def remember_secrets_of_environment() -> None:
    """Hide the logins of MLflow and of proxies that the environment holds."""
    for name, value in os.environ.items():
        if name.upper().endswith("_PROXY") or name in _ADDRESSES:
            remember_secrets(value if "://" in value else f"http://{value}")
        if name in _LOGINS and value:
            _secrets.update({value, quote(value, safe=""), quote_plus(value)})


def without_secrets(text: str) -> str:
    """The text with every address in it as it may be shown and stored.

    Args:
        text: One address or a message.

    Returns:
        The same without user, password and the values of query parameters, except harmless ones.
    """
    if _is_one_address(text):
        scheme, _, rest = text.partition("://")
        text = f"{scheme}://{_shown(rest)}"
    else:
        text = _ADDRESS.sub(lambda found: found[1] + _shown(found[2]), text)
    for secret in sorted(_secrets, key=len, reverse=True):
        # One or two characters would be found in every word.
        if len(secret) > 2:
            text = text.replace(secret, HIDDEN)
    return text


class HideSecrets(logging.Filter):
    """Keeps secrets out of what any library logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record's message, never drop it."""
        message = record.getMessage()
        shown = without_secrets(message)
        if shown != message:
            record.msg, record.args = shown, ()
        return True


def hide_secrets_in_logs() -> None:
    """Put one `HideSecrets` before every handler that shows what libraries log."""
    handlers = [*logging.getLogger().handlers, *logging.getLogger("mlflow").handlers]
    for handler in filter(None, [*handlers, logging.lastResort]):
        if not any(isinstance(known, HideSecrets) for known in handler.filters):
            handler.addFilter(HideSecrets())


def _is_one_address(text: str) -> bool:
    """Whether the whole text is an address, whose password may hold blanks and quotes."""
    scheme, found, rest = text.partition("://")
    return bool(found and re.fullmatch(r"[A-Za-z][\w+.\-]*", scheme) and "://" not in rest)


def _shown(rest: str) -> str:
    """What follows ``://``, as it may be shown."""
    _, place, query = _parts(rest)
    items = [
        f"{name}={value if harmless else HIDDEN}" if value else name
        for name, value, harmless in _items(query)
    ]
    return place + ("?" + "&".join(items) if items else "")


def _parts(rest: str) -> tuple[str, str, str]:
    """User with password, host with path, query with its ``?``, of what follows ``://``."""
    if rest.startswith("/"):  # a file: no host, nobody to log in
        start = _QUERY.search(rest)
        cut = start.start() if start else len(rest)
        return "", rest[:cut], rest[cut:]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    start = _QUERY.search(rest)
    head = rest[: start.start()] if start else rest
    if "@" in head:
        end = head.rindex("@")
    elif "@" in rest and not _HOST.fullmatch(authority):
        # user:pass?word@host: what looks like a host with a port is none.
        end = rest.rindex("@")
    else:
        return "", head, rest[len(head) :]
    user, place = rest[:end], rest[end + 1 :]
    start = _QUERY.search(place)
    cut = start.start() if start else len(place)
    return user, place[:cut], place[cut:]


def _items(query: str) -> Iterator[tuple[str, str, bool]]:
    """Name, value and whether it is harmless, of each parameter of a query."""
    for item in re.split(r"[&;]", query[1:]) if query else ():
        name, _, value = item.partition("=")
        yield name, value, name.lower() in _HARMLESS
