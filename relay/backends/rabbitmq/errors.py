"""Everything that can go wrong with RabbitMQ, as errors of the relay.

A broker closes a channel or a connection with a number and a text
(https://www.rabbitmq.com/amqp-0-9-1-reference#constants). The number decides, except where a text
says more; the texts are those of RabbitMQ 3.8 to 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import aiormq as amqp

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    NotConnected,
    Outage,
    RelayError,
)
from relay.network import of_network

REPLY_CODES: Mapping[type[RelayError], tuple[int, ...]] = {
    # In order: no route, no such virtual host, no such exchange or queue.
    DestinationMissing: (312, 402, 404),
    # Access refused, not allowed.
    AuthenticationRefused: (403, 530),
    # Locked by another connection, precondition failed, command invalid, not implemented.
    ConfigurationError: (405, 406, 503, 540),
    # Closed in order or by an operator; an error of frames, syntax or channels, unexpected frame.
    NotConnected: (200, 320, 501, 502, 504, 505),
    # Too large at present, no consumers, an error of resources or inside of the broker.
    Outage: (311, 313, 506, 541),
}

# The client has a class for some of the numbers, and gives the text alone with it.
_CODES: Mapping[type[BaseException], int] = {
    amqp.ProbableAuthenticationError: 403,
    amqp.ChannelAccessRefused: 403,
    amqp.ChannelNotFoundEntity: 404,
    amqp.ChannelLockedResource: 405,
    amqp.ChannelPreconditionFailed: 406,
    amqp.ConnectionFrameError: 501,
    amqp.ConnectionSyntaxError: 502,
    amqp.ConnectionCommandInvalid: 503,
    amqp.ConnectionChannelError: 504,
    amqp.ConnectionUnexpectedFrame: 505,
    amqp.ConnectionResourceError: 506,
    amqp.ConnectionNotAllowed: 530,
    amqp.ConnectionNotImplemented: 540,
    amqp.ConnectionInternalError: 541,
}


# Number, part of the text, remedy, and a kind where it is not the number's; the first that fits.
_WORDS: Sequence[tuple[int, str, str, type[RelayError] | None]] = (
    (403, "in exclusive use", "stop the queue's other consumer, or set exclusive to false", Outage),
    (403, "login", "correct username and password", None),
    (403, "", "give the user this permission: rabbitmqctl set_permissions", None),
    (404, "no exchange", "create the exchange, or set declare_exchange", None),
    (404, "no queue", "create the queue, or set declare_queue", None),
    (404, "home node", "start the node that holds the queue", Outage),
    (404, "stopped by supervisor", "start the node that holds the queue", Outage),
    (404, "crashed and failed to restart", "see the broker's log", Outage),
    (404, "may be stopping", "", Outage),
    (404, "timed out", "", Outage),
    (404, "due to timeout", "", Outage),
    (405, "", "the queue is another connection's own: choose another one", None),
    (406, "delivery acknowledgement", "raise consumer_timeout: a batch took longer", Outage),
    (406, "unknown delivery tag", "", Outage),
    (406, "inequivalent arg", "it has other properties: let them agree, or declare nothing", None),
    (503, "unknown exchange type", "correct exchange_type, or enable its plugin", None),
    (530, "not found", "correct vhost, or run: rabbitmqctl add_vhost", DestinationMissing),
    (530, "limit", "raise the limit, or close other connections", Outage),
    (530, "is down", "start the virtual host: rabbitmqctl restart_vhost", Outage),
    (530, "", "give the user access to the virtual host: rabbitmqctl set_permissions", None),
)

# An error of frames or inside of the broker is told with the bytes or the state that it is about.
_QUOTING = (501, 502, 505, 541)
# The number's name in front, and a hint for the one who runs the broker behind.
_NOT_OF_THE_MATTER = re.compile(r"^[A-Z_]+ - |\. For details see the broker logfile")
_TOO_LARGE = re.compile(r"message size (\d+)\D+(\d+)")
_PRECONDITION_FAILED = 406
_LONGEST_TEXT = 300


class Unreadable(NotConnected):
    """The client gave the connection up over a frame that it can't decode."""


class SizeRefused(Outage):
    """The broker closed the channel because one message is above its limit, which is known now.

    An outage to all others that were in flight.
    """

    def __init__(self, problem: str, limit_bytes: int) -> None:
        super().__init__(problem)
        self.limit_bytes = limit_bytes


def of_close(code: int, text: str, doing: str) -> RelayError:
    """The relay's error for what a broker says when it closes a channel or the connection."""
    words = _NOT_OF_THE_MATTER.sub("", " ".join(text.split())).rstrip(".")[:_LONGEST_TEXT]
    if code in _QUOTING:
        words = f"{text.partition(' ')[0] or 'error'} ({code})"
    if code == _PRECONDITION_FAILED and (too_large := _TOO_LARGE.search(words)):
        return SizeRefused(f"{doing}: {words}", int(too_large[2]))
    usual = next((kind for kind, codes in REPLY_CODES.items() if code in codes), Outage)
    for known_code, part, remedy, kind in _WORDS:
        if known_code == code and part in words.lower():
            return (kind or usual)(f"{doing}: {words}", remedy=remedy)
    return usual(f"{doing}: {words}")


def not_amqp(doing: str) -> ConfigurationError:
    """What answers is no AMQP broker, or none of this version."""
    return ConfigurationError(
        f"{doing}: what answers there does not speak AMQP 0-9-1",
        remedy="is this the right port, and does it want TLS?",
    )


def of_exception(error: BaseException, doing: str) -> RelayError | None:
    """The relay's error for what the client, TLS or the network raised; None for others."""
    if isinstance(error, RelayError):
        return error
    if type(error) in _CODES:
        return of_close(_CODES[type(error)], str(error.args[0] if error.args else ""), doing)
    match error:
        case (
            amqp.ConnectionClosed(args=(int() as code, text))
            | amqp.ChannelClosed(args=(int() as code, text))
        ):
            return of_close(code, str(text), doing)
        case amqp.AuthenticationError():
            return AuthenticationRefused(
                f"{doing}: the broker does not let anybody log in this way",
                remedy="enable it in the broker's auth_mechanisms (for a certificate alone:"
                " rabbitmq_auth_mechanism_ssl), or set username and password",
            )
        case (
            amqp.ProtocolSyntaxError()
            | amqp.IncompatibleProtocolError()
            | RecursionError()
            | OverflowError()
        ):
            return Unreadable(f"{doing}: a frame can't be read: {type(error).__name__}")
        case amqp.AMQPError() | amqp.ChannelInvalidStateError():
            network = of_network(error.__cause__, doing) if error.__cause__ else None
            return network or NotConnected(f"{doing}: the broker ended the connection")
    return of_network(error, doing)
