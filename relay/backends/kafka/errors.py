"""Everything that can go wrong with Kafka, as errors of the relay.

Two tables: one for the exceptions of the client library, by name, and one for the error codes of
the protocol (https://kafka.apache.org/protocol.html#protocol_error_codes). A code that is in
neither is an outage: Kafka gets new ones with every release, and most pass.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
from relay.network import not_connected

# By name, since releases of the library differ in which classes they have.
CLIENT_ERRORS: Mapping[str, type[RelayError]] = {
    "KafkaError": Outage,
    "KafkaConnectionError": NotConnected,
    "NodeNotReadyError": NotConnected,
    "NoBrokersAvailable": NotConnected,
    "KafkaTimeoutError": TimedOut,
    "AuthenticationFailedError": AuthenticationRefused,
    "AuthenticationMethodNotSupported": AuthenticationRefused,
    "IncompatibleBrokerVersion": ConfigurationError,
    "UnrecognizedBrokerVersion": ConfigurationError,
    "UnsupportedCodecError": ConfigurationError,
    "KafkaConfigurationError": ConfigurationError,
    "IllegalArgumentError": ConfigurationError,
    "CommitFailedError": OwnershipLost,
    "RecordTooLargeError": MessageTooLarge,
    "ConsumerStoppedError": NotConnected,
    "IllegalOperation": Outage,
}


_UNKNOWN = -1
OFFSET_OUT_OF_RANGE = 1
UNKNOWN_TOPIC_OR_PARTITION = 3
MESSAGE_TOO_LARGE = 10
COORDINATOR_LOAD_IN_PROGRESS = 14
COORDINATOR_NOT_AVAILABLE = 15
RECORD_LIST_TOO_LARGE = 18
ILLEGAL_GENERATION = 22
UNKNOWN_MEMBER_ID = 25
REBALANCE_IN_PROGRESS = 27
DUPLICATE_SEQUENCE_NUMBER = 46
MEMBER_ID_REQUIRED = 79
FENCED_INSTANCE_ID = 82

# Code to name, kind and remedy. What is here besides the codes that pass is worth words.
CODES: Mapping[int, tuple[str, type[RelayError], str]] = {
    -1: ("UNKNOWN_SERVER_ERROR", Outage, "see the broker's log"),
    1: ("OFFSET_OUT_OF_RANGE", PositionLost, ""),
    2: ("CORRUPT_MESSAGE", Outage, ""),
    3: (
        "UNKNOWN_TOPIC_OR_PARTITION",
        DestinationMissing,
        "make it with kafka-topics.sh --create, or let the user describe it",
    ),
    5: ("LEADER_NOT_AVAILABLE", Outage, ""),
    6: ("NOT_LEADER_OR_FOLLOWER", Outage, ""),
    7: ("REQUEST_TIMED_OUT", TimedOut, ""),
    8: ("BROKER_NOT_AVAILABLE", Outage, ""),
    9: ("REPLICA_NOT_AVAILABLE", Outage, ""),
    10: ("MESSAGE_TOO_LARGE", MessageTooLarge, "raise max.message.bytes of the topic"),
    13: ("NETWORK_EXCEPTION", Outage, ""),
    14: ("COORDINATOR_LOAD_IN_PROGRESS", Outage, ""),
    15: ("COORDINATOR_NOT_AVAILABLE", Outage, ""),
    16: ("NOT_COORDINATOR", Outage, ""),
    17: ("INVALID_TOPIC_EXCEPTION", ConfigurationError, "choose another topic"),
    18: ("RECORD_LIST_TOO_LARGE", MessageTooLarge, "raise segment.bytes of the topic"),
    19: ("NOT_ENOUGH_REPLICAS", Outage, "fewer replicas are in sync than min.insync.replicas"),
    20: ("NOT_ENOUGH_REPLICAS_AFTER_APPEND", Outage, "replicas of the topic fell behind"),
    22: ("ILLEGAL_GENERATION", OwnershipLost, ""),
    23: (
        "INCONSISTENT_GROUP_PROTOCOL",
        ConfigurationError,
        "the group has members of another kind: choose another group_id",
    ),
    24: ("INVALID_GROUP_ID", ConfigurationError, "choose another group_id"),
    25: ("UNKNOWN_MEMBER_ID", OwnershipLost, ""),
    26: (
        "INVALID_SESSION_TIMEOUT",
        ConfigurationError,
        "keep session_timeout_ms within group.min and group.max.session.timeout.ms of the broker",
    ),
    27: ("REBALANCE_IN_PROGRESS", OwnershipLost, ""),
    29: ("TOPIC_AUTHORIZATION_FAILED", AuthenticationRefused, "allow the user this topic"),
    30: ("GROUP_AUTHORIZATION_FAILED", AuthenticationRefused, "allow the user to read this group"),
    31: (
        "CLUSTER_AUTHORIZATION_FAILED",
        AuthenticationRefused,
        "allow the user IdempotentWrite on the cluster",
    ),
    32: ("INVALID_TIMESTAMP", MessageRejected, ""),
    33: ("UNSUPPORTED_SASL_MECHANISM", AuthenticationRefused, "set sasl_mechanism"),
    34: ("ILLEGAL_SASL_STATE", AuthenticationRefused, ""),
    35: ("UNSUPPORTED_VERSION", ConfigurationError, "Kafka 2.3 or newer is needed"),
    43: ("UNSUPPORTED_FOR_MESSAGE_FORMAT", ConfigurationError, ""),
    44: ("POLICY_VIOLATION", MessageRejected, ""),
    45: ("OUT_OF_ORDER_SEQUENCE_NUMBER", Outage, ""),
    47: ("INVALID_PRODUCER_EPOCH", Outage, ""),
    56: ("KAFKA_STORAGE_ERROR", Outage, "the broker can't use its disk"),
    58: (
        "the login is refused",
        AuthenticationRefused,
        "correct sasl_username, sasl_password and sasl_mechanism",
    ),
    59: ("UNKNOWN_PRODUCER_ID", Outage, ""),
    72: ("LISTENER_NOT_FOUND", ConfigurationError, "a broker advertises no such listener"),
    74: ("FENCED_LEADER_EPOCH", Outage, ""),
    76: ("UNSUPPORTED_COMPRESSION_TYPE", ConfigurationError, "choose another compression"),
    78: ("OFFSET_NOT_AVAILABLE", Outage, ""),
    81: ("GROUP_MAX_SIZE_REACHED", ConfigurationError, "the group has too many members"),
    82: ("FENCED_INSTANCE_ID", OwnershipLost, "somebody else has joined under our name"),
    87: ("INVALID_RECORD", MessageRejected, "does the topic want another key?"),
    89: ("THROTTLING_QUOTA_EXCEEDED", Outage, ""),
}


def of_code(code: int, doing: str) -> RelayError:
    """The relay's error for an error code of the protocol."""
    name, kind, remedy = CODES.get(code, (f"error code {code}", Outage, ""))
    return kind(f"{doing}: {name}", remedy=remedy)


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
    if isinstance(error, client.BrokerResponseError):
        return of_code(getattr(error, "errno", _UNKNOWN), doing)
    if type(error).__module__ == client.__name__:
        return _of_client(error, doing)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return TimedOut(f"{doing}: no answer in time")
    if isinstance(error, EOFError):
        return NotConnected(f"{doing}: the broker ended the connection")
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
    if isinstance(error, client.KafkaConnectionError) and isinstance(below, OSError | EOFError):
        # The library wraps what the network and TLS say, and loses its kind.
        known = of_exception(below, doing)
        if known is not None:
            return known
    kind = next(
        (
            CLIENT_ERRORS[one.__name__]
            for one in type(error).__mro__
            if one.__module__ == client.__name__ and one.__name__ in CLIENT_ERRORS
        ),
        Outage,
    )
    said = str(error).partition("\n")[0]
    return kind(f"{doing}: {said or type(error).__name__}")


def _of_tls(error: ssl.SSLError, doing: str) -> RelayError:
    reason = str(getattr(error, "reason", None) or "the handshake failed").replace("_", " ").lower()
    if "certificate" in reason or "unknown ca" in reason:
        return AuthenticationRefused(
            f"{doing}: the broker refuses our certificate: {reason}",
            remedy="set tls_cert and tls_key to a certificate that the broker trusts",
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return NotConnected(f"{doing}: TLS was ended by the broker")
    return ConfigurationError(
        f"{doing}: TLS failed: {reason}", remedy="is this the broker's TLS port?"
    )
