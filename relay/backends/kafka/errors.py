"""Everything that can go wrong with Kafka, as errors of the relay.

Two tables: one for the exceptions of the client library, by name, and one for the error codes of
the protocol (https://kafka.apache.org/protocol.html#protocol_error_codes). A code that is not in
it is an outage: Kafka gets new ones with every release, and most pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from aiokafka import errors as client

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    OwnershipLost,
    PositionLost,
    RelayError,
    TimedOut,
)
from relay.network import mapped_by, of_network

# By name, since releases of the library differ in which classes they have.
CLIENT_ERRORS: Mapping[str, type[RelayError]] = {
    "KafkaError": Outage,
    "KafkaConnectionError": NotConnected,
    "NodeNotReadyError": NotConnected,
    "NoBrokersAvailable": NotConnected,
    "ConsumerStoppedError": NotConnected,
    "ProducerClosed": NotConnected,
    "KafkaTimeoutError": TimedOut,
    "AuthenticationFailedError": AuthenticationRefused,
    "AuthenticationMethodNotSupported": AuthenticationRefused,
    "IncompatibleBrokerVersion": ConfigurationError,
    "UnrecognizedBrokerVersion": ConfigurationError,
    "UnsupportedCodecError": ConfigurationError,
    "KafkaConfigurationError": ConfigurationError,
    "IllegalArgumentError": ConfigurationError,
    "CommitFailedError": OwnershipLost,
    "IllegalStateError": OwnershipLost,
    "RecordTooLargeError": MessageTooLarge,
}

# Code to kind and remedy, of those that are more than an outage or worth words.
CODES: Mapping[int, tuple[type[RelayError], str]] = {
    -1: (Outage, "see the broker's log"),
    1: (PositionLost, ""),
    3: (
        DestinationMissing,
        "make it with kafka-topics.sh --create, or let the user describe it",
    ),
    7: (TimedOut, ""),
    10: (MessageTooLarge, "raise max.message.bytes of the topic"),
    17: (ConfigurationError, "choose another topic"),
    18: (MessageTooLarge, "raise segment.bytes of the topic"),
    19: (Outage, "fewer replicas are in sync than min.insync.replicas"),
    20: (Outage, "replicas of the topic fell behind"),
    22: (OwnershipLost, ""),
    23: (ConfigurationError, "the group has members of another kind: choose another group_id"),
    24: (ConfigurationError, "choose another group_id"),
    25: (OwnershipLost, ""),
    26: (
        ConfigurationError,
        "keep session_timeout_ms within group.min and group.max.session.timeout.ms of the broker",
    ),
    27: (OwnershipLost, ""),
    29: (AuthenticationRefused, "allow the user this topic"),
    30: (AuthenticationRefused, "allow the user to read this group"),
    31: (AuthenticationRefused, "allow the user IdempotentWrite on the cluster"),
    32: (MessageRejected, ""),
    33: (AuthenticationRefused, "set sasl_mechanism"),
    34: (AuthenticationRefused, ""),
    35: (ConfigurationError, "Kafka 2.3 or newer is needed"),
    43: (ConfigurationError, ""),
    44: (MessageRejected, ""),
    56: (Outage, "the broker can't use its disk"),
    58: (AuthenticationRefused, "correct sasl_username, sasl_password and sasl_mechanism"),
    72: (ConfigurationError, "a broker advertises no such listener"),
    76: (ConfigurationError, "choose another compression"),
    81: (ConfigurationError, "the group has too many members"),
    82: (OwnershipLost, "somebody else has joined under our name"),
    87: (MessageRejected, "does the topic want another key?"),
}

# What the library does not know it calls UNKNOWN; its table is open to what it lacks.
_LACKING = {
    74: "FENCED_LEADER_EPOCH",
    76: "UNSUPPORTED_COMPRESSION_TYPE",
    78: "OFFSET_NOT_AVAILABLE",
    81: "GROUP_MAX_SIZE_REACHED",
    82: "FENCED_INSTANCE_ID",
    87: "INVALID_RECORD",
    89: "THROTTLING_QUOTA_EXCEEDED",
}
_WORDS = {58: "the login is refused"}
for _code, _name in _LACKING.items():
    # The library tries again by itself what passes.
    _members = {"errno": _code, "message": _name, "retriable": _code in (74, 78, 89)}
    client.kafka_errors.setdefault(_code, type(_name, (client.BrokerResponseError,), _members))


def of_code(code: int, doing: str) -> RelayError:
    """The relay's error for an error code of the protocol."""
    known = client.kafka_errors.get(code)
    name = f"error code {code}" if known is None else _WORDS.get(code, known.message)
    kind, remedy = CODES.get(code, (Outage, ""))
    return kind(f"{doing}: {name}", remedy=remedy)


def of_exception(error: BaseException, doing: str) -> RelayError | None:
    """The relay's error for what the client library, TLS or the network raised; None for others."""
    if isinstance(error, RelayError):
        return error
    if isinstance(error, client.BrokerResponseError):
        return of_code(getattr(error, "errno", -1), doing)
    # The library wraps what the network and TLS say, and loses its kind.
    if not isinstance(error, client.KafkaError) or isinstance(error, client.KafkaConnectionError):
        known = of_network(error, doing)
        if known is not None or type(error).__module__ != client.__name__:
            return known
    names = (one.__name__ for one in type(error).__mro__)
    kind = next((CLIENT_ERRORS[name] for name in names if name in CLIENT_ERRORS), Outage)
    said = str(error).partition("\n")[0].strip()
    return kind(f"{doing}: {said or type(error).__name__}")


mapped = partial(mapped_by, of_exception)
