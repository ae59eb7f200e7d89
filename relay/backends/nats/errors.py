"""Everything that can go wrong with NATS, as errors of the relay.

Two tables: one for the exceptions of the client library, one for the numbered errors that a
JetStream server answers with
(https://github.com/nats-io/nats-server/blob/main/server/errors.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import msgspec
from nats import errors as client
from nats.js import errors as jetstream

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    DriverMissing,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.network import mapped_by, of_network

_NO_ROOM = "its JetStream storage is full: raise max_file_store of the server, or remove messages"

# The nearest class of an exception's ancestry decides.
_KINDS: Mapping[type[RelayError], tuple[type[Exception], ...]] = {
    AuthenticationRefused: (client.AuthorizationError, client.InvalidUserCredentialsError),
    ConfigurationError: (
        client.SecureConnRequiredError, client.SecureConnWantedError, client.SecureConnFailedError,
        client.BadSubjectError, client.BadTimeoutError, client.InvalidCallbackTypeError,
        jetstream.BadRequestError,
    ),
    DestinationMissing: (
        client.NoRespondersError, jetstream.NotFoundError, jetstream.NoStreamResponseError,
    ),
    MessageRejected: (client.BadHeaderError,),
    MessageTooLarge: (client.MaxPayloadError,),
    NotConnected: (
        client.StaleConnectionError, client.ConnectionClosedError, client.NoServersError,
        client.ConnectionDrainingError, client.ConnectionReconnectingError, client.ProtocolError,
        client.ServerNotInPoolError,
    ),
    Outage: (
        client.Error, client.OutboundBufferLimitError, client.BadSubscriptionError,
        client.SlowConsumerError, client.JsonParseError, client.NotJSMessageError,
        client.MsgAlreadyAckdError, jetstream.Error, jetstream.APIError,
        jetstream.TooManyStalledMsgsError, jetstream.ConsumerSequenceMismatchError,
    ),
    TimedOut: (client.TimeoutError,),
}  # fmt: skip
CLIENT_ERRORS = {exception: kind for kind, exceptions in _KINDS.items() for exception in exceptions}

# By the server's own number, with a remedy; any other by its HTTP-like code.
JETSTREAM_ERRORS: Mapping[int, tuple[type[RelayError], str]] = {
    10002: (Outage, "raise the account's JetStream limits, or remove messages"),
    10005: (Outage, "start the cluster's servers"),  # no suitable peers for placement
    10008: (Outage, ""),  # JetStream system temporarily unavailable
    10014: (DestinationMissing, ""),  # consumer not found
    10023: (Outage, _NO_ROOM),  # insufficient resources
    10028: (Outage, "raise max_memory_store of the server, or keep the stream in files"),
    10037: (DestinationMissing, ""),  # no message found
    10039: (ConfigurationError, "enable JetStream for this account"),
    10047: (Outage, _NO_ROOM),  # insufficient storage resources
    10054: (MessageTooLarge, ""),  # message size exceeds maximum allowed
    10058: (ConfigurationError, ""),  # stream name in use with another configuration
    10059: (DestinationMissing, "create the stream, or set create_stream"),
    10060: (ConfigurationError, "correct stream, or the subjects of the stream that listens here"),
    10065: (ConfigurationError, "choose other subjects, or name the stream that has them"),
    10076: (ConfigurationError, "start the server with JetStream"),
    10077: (Outage, "raise the stream's limits or remove messages"),
    10097: (MessageTooLarge, ""),  # header size exceeds maximum allowed of 64k
    10109: (ConfigurationError, "unseal the stream or publish to another"),
    # An earlier try of the message is still being stored: soon it is a duplicate.
    10158: (Outage, ""),
    10167: (Outage, ""),  # too many requests
}

_REFUSALS = ("authorization violation", "authentication", "nkey")
_TIGHTER_LIMITS = ("maximum connections exceeded", "maximum account", "maximum subscriptions")


class ApiError(msgspec.Struct, frozen=True):
    """The ``error`` object of a JetStream answer."""

    code: int = 0
    err_code: int = 0
    description: str = ""


def of_jetstream(error: ApiError, doing: str, *, is_publish: bool = False) -> RelayError:
    """The relay's error for a JetStream answer; ``is_publish`` makes a bad request a message's."""
    by_code = (_by_code(error.code, is_publish=is_publish), "")
    kind, remedy = JETSTREAM_ERRORS.get(error.err_code, by_code)
    return kind(f"{doing}: {error.description} (NATS error {error.err_code})", remedy=remedy)


def of_server_text(text: str, doing: str) -> RelayError:
    """The relay's error for what a server says on the connection itself (``-ERR``)."""
    plain = text.removeprefix("nats: ").strip("' ")
    lowered = plain.lower()
    if "authentication timeout" in lowered:
        # A busy server got to our credentials too late: nothing is said of them.
        return NotConnected(f"{doing}: {plain}")
    if "permissions violation" in lowered:
        return AuthenticationRefused(
            f"{doing}: {plain}", remedy="give the user this permission on the NATS server"
        )
    if any(refusal in lowered for refusal in _REFUSALS):
        return AuthenticationRefused(
            f"{doing}: the server says: {plain}",
            remedy="correct user and password, token, creds_file or nkey_seed",
        )
    if any(limit in lowered for limit in _TIGHTER_LIMITS):
        return Outage(f"{doing}: the server says: {plain}")
    return NotConnected(f"{doing}: {plain}")


def of_exception(error: BaseException, doing: str) -> RelayError | None:
    """The relay's error for what the client library, TLS or the network raised; None for others."""
    if isinstance(error, RelayError):
        return error
    if isinstance(error, ImportError):
        return DriverMissing(
            f"{doing}: {error.name or 'a module'} is not installed",
            remedy="pip install 'pgtrickle-relay[nats]'",
        )
    number = getattr(error, "err_code", None)
    if isinstance(error, jetstream.ServiceUnavailableError) and number is None:
        return ConfigurationError(
            f"{doing}: JetStream does not answer",
            remedy="start the server with JetStream and enable it for this account",
        )
    if isinstance(error, jetstream.APIError) and isinstance(number, int):
        answer = ApiError(error.code or 0, number, error.description or "")
        return of_jetstream(answer, doing)
    if type(error) is client.Error:
        return of_server_text(str(error), doing)
    if isinstance(error, client.Error):
        kind = next(CLIENT_ERRORS[one] for one in type(error).__mro__ if one in CLIENT_ERRORS)
        return kind(f"{doing}: {_words(error)}")
    return of_network(error, doing)


mapped = partial(mapped_by, of_exception)


def _by_code(code: int, *, is_publish: bool) -> type[RelayError]:
    match code:
        case 404:
            return DestinationMissing
        case 401 | 403:
            return AuthenticationRefused
        case _ if code == 429 or code >= 500:
            return Outage
    return MessageRejected if is_publish else ConfigurationError


def _words(error: client.Error) -> str:
    """What the library says; some of its errors can't be turned into text."""
    try:
        return str(error).removeprefix("nats: ")
    except (AttributeError, TypeError):
        return type(error).__name__
