"""Everything that can go wrong with Redis, as errors of the relay.

Two tables: one for the exceptions of the client library, one for the word with which an answer of
the server begins (https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from redis import exceptions as client

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    MessageRejected,
    NotConnected,
    Outage,
    PositionLost,
    RelayError,
    TimedOut,
)
from relay.network import mapped_by, of_network

_NAME_THE_NODE = "name the node of the cluster that owns the stream"

REPLY_ERRORS: Mapping[str, tuple[type[RelayError], str]] = {
    "ASK": (ConfigurationError, _NAME_THE_NODE),
    "BUSY": (Outage, ""),
    "CLUSTERDOWN": (Outage, ""),
    "CROSSSLOT": (ConfigurationError, ""),
    "LOADING": (Outage, ""),
    "MASTERDOWN": (NotConnected, ""),
    "MISCONF": (Outage, "the server can't write to its disk"),
    "MOVED": (ConfigurationError, _NAME_THE_NODE),
    "NOAUTH": (AuthenticationRefused, "set username and password"),
    "NOGROUP": (PositionLost, "on the next start the group is made again, from start_id on"),
    "NOPERM": (AuthenticationRefused, "give the user this permission with ACL SETUSER"),
    "NOREPLICAS": (Outage, "too few replicas are connected to the server"),
    "OOM": (Outage, "raise maxmemory, or trim streams"),
    # A replica: after a failover the address may lead elsewhere, but only a new connection does.
    "READONLY": (NotConnected, ""),
    "TRYAGAIN": (Outage, ""),
    # The server is a replica now; the same word is used of a stream that was deleted.
    "UNBLOCKED": (NotConnected, ""),
    "WRONGPASS": (AuthenticationRefused, "correct username and password"),
    "WRONGTYPE": (DestinationMissing, "choose another stream_key, or remove the key"),
}
"""By the first word of an answer, its kind and what can be done."""

CLIENT_ERRORS: Mapping[str, str | type[RelayError]] = {
    "AskError": "ASK",
    "AuthenticationError": "WRONGPASS",
    "AuthenticationWrongNumberOfArgsError": "WRONGPASS",
    "BusyLoadingError": "LOADING",
    "ClusterCrossSlotError": "CROSSSLOT",
    "ClusterDownError": "CLUSTERDOWN",
    "ConnectionError": NotConnected,
    "InvalidResponse": NotConnected,
    "MasterDownError": "MASTERDOWN",
    "MovedError": "MOVED",
    "NoPermissionError": "NOPERM",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "TimeoutError": TimedOut,
    "TryAgainError": "TRYAGAIN",
}
"""By the nearest class, a kind, or the word that the library has taken off the server's text."""

_WORDLESS: Mapping[str, str] = {
    "unknown command": "the commands of Redis 6.2 are needed under their own names",
    "unknown subcommand": "Redis 6.2 or newer is needed",
    "protocol error": "lower max_message_bytes below the server's proto-max-bulk-len",
}
_STREAM_GONE = "UNBLOCKED the stream key no longer exists"
# To a WAIT, where a failover came between an XADD and this.
_IS_REPLICA = "WAIT cannot be used with replica instances"
_ABORTED = "Transaction discarded because of: "
# Behind these a server quotes what it was sent.
_QUOTING = re.compile(r"[,:]")
_LONGEST_TEXT = 300


def of_reply(error: BaseException, doing: str, *, is_publish: bool = False) -> RelayError:
    """The relay's error for an answer of the server that is an error.

    ``is_publish`` blames what has no word of its own on the message.
    """
    text = str(error).removeprefix(_ABORTED).rstrip(".")[:_LONGEST_TEXT]
    known = _known(error) or text.partition(" ")[0]
    if text.startswith(_STREAM_GONE):
        known = "NOGROUP"
    elif _IS_REPLICA in text:
        known = "READONLY"
    elif known == "WRONGPASS" and "required" in text:
        known = "NOAUTH"
    if not isinstance(known, str):
        return known(f"{doing}: {text}")
    if known in REPLY_ERRORS:
        kind, remedy = REPLY_ERRORS[known]
        return kind(f"{doing}: {text}", remedy=remedy)
    said = f"{doing}: {_QUOTING.split(text)[0]}"
    for words, remedy in _WORDLESS.items():
        if words in text.lower():
            return ConfigurationError(said, remedy=remedy)
    return (MessageRejected if is_publish else ConfigurationError)(said)


def of_exception(error: BaseException, doing: str) -> RelayError | None:
    """The relay's error for what the client library, TLS or the network raised; None for others."""
    if isinstance(error, RelayError):
        return error
    if isinstance(error, client.ResponseError):
        return of_reply(error, doing)
    known = _known(error)
    # The library wraps what TLS and the network say, and loses its kind.
    if known in (None, NotConnected, TimedOut) and (ours := of_network(error, doing)) is not None:
        return ours
    if known is not None:
        return of_reply(error, doing)
    is_of_client = type(error).__module__ == client.__name__
    return Outage(f"{doing}: {type(error).__name__}") if is_of_client else None


mapped = partial(mapped_by, of_exception)


def _known(error: BaseException) -> str | type[RelayError] | None:
    names = (one.__name__ for one in type(error).__mro__ if one.__module__ == client.__name__)
    return next((CLIENT_ERRORS[name] for name in names if name in CLIENT_ERRORS), None)
