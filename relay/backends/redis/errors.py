"""Everything that can go wrong with Redis, as errors of the relay.

Two tables: one for the exceptions of the client library, one for the word with which an answer of
the server begins (https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
from relay.network import not_connected

# By name, since releases of the library differ in which classes they have. The nearest class of
# an exception's ancestry decides.
CLIENT_ERRORS: Mapping[str, type[RelayError]] = {
    "RedisError": Outage,
    "ConnectionError": NotConnected,
    "TimeoutError": TimedOut,
    "AuthenticationError": AuthenticationRefused,
    "AuthorizationError": AuthenticationRefused,
    "AuthenticationWrongNumberOfArgsError": AuthenticationRefused,
    "ExternalAuthProviderError": Outage,
    "BusyLoadingError": Outage,
    "MaxConnectionsError": Outage,
    "InvalidResponse": NotConnected,
    "OutOfMemoryError": Outage,
    # A replica: after a fail-over the address may lead elsewhere, but only a new connection does.
    "ReadOnlyError": NotConnected,
    "NoPermissionError": AuthenticationRefused,
    "ClusterError": Outage,
    "ClusterDownError": Outage,
    "MasterDownError": NotConnected,
    "TryAgainError": Outage,
    "AskError": ConfigurationError,
    "MovedError": ConfigurationError,
    "ClusterCrossSlotError": ConfigurationError,
    "RedisClusterException": ConfigurationError,
    "DataError": ConfigurationError,
    "ModuleError": ConfigurationError,
    "NoScriptError": ConfigurationError,
    "ChildDeadlockedError": Outage,
    "IncorrectPolicyType": ConfigurationError,
}

REPLY_ERRORS: Mapping[str, type[RelayError]] = {
    "ASK": ConfigurationError,
    "BUSY": Outage,
    "CLUSTERDOWN": Outage,
    "CROSSSLOT": ConfigurationError,
    "LOADING": Outage,
    "MASTERDOWN": NotConnected,
    "MISCONF": Outage,
    "MOVED": ConfigurationError,
    "NOAUTH": AuthenticationRefused,
    "NOGROUP": PositionLost,
    "NOPERM": AuthenticationRefused,
    "NOREPLICAS": Outage,
    "OOM": Outage,
    "READONLY": NotConnected,
    "TRYAGAIN": Outage,
    # The server is a replica now; said in the same word of a stream that was deleted.
    "UNBLOCKED": NotConnected,
    "WRONGPASS": AuthenticationRefused,
    "WRONGTYPE": DestinationMissing,
}

_REMEDIES: Mapping[type[RelayError] | str, str] = {
    "MOVED": "name the node of the cluster that owns the stream",
    "ASK": "name the node of the cluster that owns the stream",
    "NOAUTH": "set username and password",
    "WRONGPASS": "correct username and password",
    "NOPERM": "give the user this permission with ACL SETUSER",
    "WRONGTYPE": "choose another stream_key, or remove the key",
    "NOGROUP": "the group is made anew on the next start and begins where start_id says",
    "OOM": "raise maxmemory, or trim streams",
    "MISCONF": "the server can't write to its disk",
    "NOREPLICAS": "too few replicas are connected to the server",
}

_WORD_OF: Mapping[str, str] = {
    "AskError": "ASK",
    "MovedError": "MOVED",
    "NoPermissionError": "NOPERM",
    "OutOfMemoryError": "OOM",
}
_STREAM_GONE = "UNBLOCKED the stream key no longer exists"
_ABORTED = "Transaction discarded because of: "


def of_reply(error: Exception, doing: str, *, is_publish: bool = False) -> RelayError:
    """The relay's error for an answer of the server that is an error.

    ``is_publish`` blames what has no word of its own on the message.
    """
    text = str(error)
    word = _WORD_OF.get(type(error).__name__) or text.partition(" ")[0]
    if isinstance(error, client.ExecAbortError):
        # The word stands behind, and the library has taken its own off in front.
        text = text.removeprefix(_ABORTED)
        word = text.partition(" ")[0]
    if text.startswith(_STREAM_GONE):
        word = "NOGROUP"
    kind = REPLY_ERRORS.get(word) or _by_class(error)
    if kind is None:
        kind, remedy = _without_word(text, is_publish=is_publish)
    else:
        remedy = _REMEDIES.get(word, "")
    return kind(f"{doing}: {text.rstrip('.')}", remedy=remedy)


def of_exception(error: BaseException, doing: str) -> RelayError | None:
    """The relay's error for what the client library, TLS or the network raised; None for others."""
    if isinstance(error, RelayError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"{doing}: the server's certificate is not trusted:"
            f" {getattr(error, 'verify_message', 'it does not verify')}",
            remedy="point tls_ca at the authority that signed it",
        )
    if isinstance(error, ssl.SSLError):
        return _of_tls(error, doing)
    if type(error).__module__ == client.__name__:
        return _of_client(error, doing)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return TimedOut(f"{doing}: no answer in time")
    if isinstance(error, EOFError):
        return NotConnected(f"{doing}: the server ended the connection")
    if isinstance(error, OSError):
        return not_connected(error, doing)
    return None


@contextmanager
def mapped(doing: str) -> Iterator[None]:
    """Turn whatever the client library raises inside into an error of the relay."""
    try:
        yield
    except Exception as error:
        ours = of_exception(error, doing)
        if ours is None or ours is error:
            raise
        raise ours from error


def _of_client(error: BaseException, doing: str) -> RelayError:
    below = error.__cause__ or error.__context__
    if isinstance(error, client.ConnectionError | client.TimeoutError) and isinstance(
        below, OSError
    ):
        # The library wraps what the network and TLS say, and loses its kind.
        known = of_exception(below, doing)
        if known is not None:
            return known
    if isinstance(error, client.ResponseError):
        return of_reply(error, doing)
    kind = _by_class(error) or Outage
    remedy = ""
    if kind is AuthenticationRefused:
        remedy = _REMEDIES["NOAUTH" if "required" in str(error) else "WRONGPASS"]
    return kind(f"{doing}: {str(error).rstrip('.')}", remedy=remedy)


def _by_class(error: BaseException) -> type[RelayError] | None:
    return next(
        (CLIENT_ERRORS[one.__name__] for one in type(error).__mro__ if _is_telling(one)), None
    )


def _is_telling(kind: type[object]) -> bool:
    return kind.__module__ == client.__name__ and (
        kind.__name__ in CLIENT_ERRORS and kind is not client.RedisError
    )


def _without_word(text: str, *, is_publish: bool) -> tuple[type[RelayError], str]:
    lowered = text.lower()
    if "unknown command" in lowered or "unknown subcommand" in lowered:
        return ConfigurationError, "Redis 6.2 or newer is needed"
    if "protocol error" in lowered:
        return ConfigurationError, "lower max_message_bytes below the server's proto-max-bulk-len"
    return (MessageRejected if is_publish else ConfigurationError), ""


def _of_tls(error: ssl.SSLError, doing: str) -> RelayError:
    reason = str(getattr(error, "reason", None) or "the handshake failed").replace("_", " ").lower()
    if "certificate" in reason or "unknown ca" in reason:
        return AuthenticationRefused(
            f"{doing}: the server refuses our certificate: {reason}",
            remedy="set tls_cert and tls_key to a certificate that the server trusts",
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return NotConnected(f"{doing}: TLS was ended by the server")
    return ConfigurationError(
        f"{doing}: TLS failed: {reason}", remedy="is this the server's TLS port?"
    )
