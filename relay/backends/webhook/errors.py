"""Everything that can go wrong over HTTP, as errors of the relay.

Two tables: the exceptions of the HTTP client, and the statuses that a receiver answers with.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Collection, Mapping
from functools import partial

import httpx

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.network import causes, mapped_by, of_network, words_of

# The nearest class of an exception's ancestry decides.
CLIENT_ERRORS: Mapping[type[Exception], type[RelayError]] = {
    httpx.HTTPError: Outage,
    httpx.TimeoutException: TimedOut,
    httpx.NetworkError: NotConnected,
    httpx.RemoteProtocolError: NotConnected,
    # What we were going to send is not HTTP.
    httpx.LocalProtocolError: MessageRejected,
    httpx.ProxyError: NotConnected,
    httpx.UnsupportedProtocol: ConfigurationError,
    httpx.TooManyRedirects: ConfigurationError,
    httpx.InvalidURL: ConfigurationError,
    httpx.CookieConflict: Outage,
    httpx.StreamError: NotConnected,
}

# A status from 400 on that is not here and not to be retried rejects the messages it is about.
STATUSES: Mapping[int, tuple[type[RelayError], str]] = {
    401: (AuthenticationRefused, "set bearer_token, username and password, or headers"),
    403: (AuthenticationRefused, "ask who runs the receiver for this permission"),
    404: (DestinationMissing, "correct sink.url"),
    405: (ConfigurationError, "set sink.method"),
    407: (AuthenticationRefused, "a proxy on the way asks for a sign-in"),
    410: (DestinationMissing, "the receiver says that it is gone for good: correct sink.url"),
    413: (MessageTooLarge, ""),
    415: (ConfigurationError, "set sink.format or batch_mode to what the receiver reads"),
    501: (ConfigurationError, "set sink.method"),
}

# What a client does not recognize it takes for the first of its class, 500
# (https://www.rfc-editor.org/rfc/rfc9110#section-15): a full disk, a proxy without its origin.
_LAST_DEFINED = 505
_REDIRECTS = range(300, 400)
_ACCEPTED = range(200, 300)


def of_status(
    status: int,
    address: str,
    *,
    retried: Collection[int],
    size_bytes: int,
    retry_after_s: float | None = None,
) -> RelayError | None:
    """What an answer means; None where it accepts. ``retried``: statuses that are outages.

    ``retry_after_s``: what the answer asks for, which means something for an outage only.
    """
    if status in _ACCEPTED:
        return None
    doing = f"{address} answers {status}"
    if status in retried or (status > _LAST_DEFINED and 500 in retried):
        asks = f" and asks for {retry_after_s:.0f} s of patience" if retry_after_s else ""
        return Outage(f"{doing}{asks}", retry_after_s=retry_after_s)
    if status in _REDIRECTS:
        return ConfigurationError(
            f"{doing}, a redirect, which is not followed", remedy="set sink.url to where it leads"
        )
    kind, remedy = STATUSES.get(status, (MessageRejected, ""))
    if kind is MessageTooLarge:
        doing = f"{doing}: {size_bytes} bytes are more than its limit"
    return kind(doing, remedy=remedy)


def of_exception(error: BaseException, doing: str) -> RelayError | None:
    """The relay's error for what the client, TLS or the network raised; None for others."""
    if isinstance(error, RelayError):
        return error
    for cause in causes(error):
        if isinstance(cause, ssl.SSLError | socket.gaierror):
            return of_network(cause, doing)
    kind = next((CLIENT_ERRORS[one] for one in type(error).__mro__ if one in CLIENT_ERRORS), None)
    if kind is None:
        return of_network(error, doing)
    if kind is TimedOut:
        return kind(f"{doing}: no answer in time")
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            reason, remedy = words_of(cause)
            return kind(f"{doing}: {reason}", remedy=remedy)
    if kind is MessageRejected:
        return kind(f"{doing}: the request is not valid HTTP")
    if isinstance(error, httpx.RemoteProtocolError):
        return kind(f"{doing}: the connection was ended without a whole answer")
    if kind is NotConnected:
        return kind(f"{doing}: the connection failed")
    # The library's own words may hold the URL, and with it a secret.
    return kind(f"{doing}: {type(error).__name__}")


mapped = partial(mapped_by, of_exception)
