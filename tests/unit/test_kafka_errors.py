"""Every error of Kafka is one of the relay's, of the right kind."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest
from aiokafka import errors as client

from relay.backends.kafka.errors import mapped, of_code, of_exception
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    OwnershipLost,
    PositionLost,
    RelayError,
    TimedOut,
)
from tests.contract.kafka_broker import driver_exceptions


def test_every_exception_of_the_library_comes_out_as_one_of_ours() -> None:
    for exception in driver_exceptions():
        with pytest.raises(RelayError), mapped("testing"):
            raise exception


@pytest.mark.parametrize("code", [74, 76, 78, 81, 82, 87, 89])
def test_codes_that_the_library_does_not_know_keep_their_names(code: int) -> None:
    assert client.for_code(code).errno == code
    assert "UNKNOWN" not in str(of_code(code, "testing"))


@pytest.mark.parametrize(
    "code,kind",
    [
        (1, PositionLost),
        (3, DestinationMissing),
        (6, Outage),
        (7, TimedOut),
        (10, MessageTooLarge),
        (19, Outage),
        (22, OwnershipLost),
        (26, ConfigurationError),
        (29, AuthenticationRefused),
        (45, Outage),
        (58, AuthenticationRefused),
        (76, ConfigurationError),
        (82, OwnershipLost),
        (87, MessageRejected),
        (9999, Outage),
    ],
)
def test_a_code_is_judged_by_whose_trouble_it_is(code: int, kind: type[RelayError]) -> None:
    error = of_code(code, "testing")

    assert type(error) is kind
    assert str(error).startswith("testing: ")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "error, kind",
    [
        (client.SaslAuthenticationFailed("no"), AuthenticationRefused),
        (client.UnsupportedSaslMechanismError("no"), AuthenticationRefused),
        (client.TopicAuthorizationFailedError("no"), AuthenticationRefused),
        (client.KafkaConnectionError("gone"), NotConnected),
        (client.KafkaTimeoutError("late"), TimedOut),
        (client.IncompatibleBrokerVersion("old"), ConfigurationError),
        (client.UnsupportedCodecError("odd"), ConfigurationError),
        (client.CorrelationIdError("odd"), Outage),
        (ConnectionResetError(), NotConnected),
        (TimeoutError(), TimedOut),
        (EOFError(), NotConnected),
        (ssl.SSLCertVerificationError(1, "unknown"), ConfigurationError),
        (ssl.SSLError(1, "x"), ConfigurationError),
        (ssl.SSLEOFError(8, "x"), NotConnected),
    ],
)
def test_an_exception_is_judged_by_whose_trouble_it_is(
    error: Exception, kind: type[RelayError]
) -> None:
    ours = of_exception(error, "testing")

    assert type(ours) is kind
    assert "\n" not in str(ours)


@pytest.mark.parametrize(
    "error, said",
    [
        (
            client.SaslAuthenticationFailed("[Error 58] SaslAuthenticationFailed: no"),
            "testing: the login is refused"
            " (correct sasl_username, sasl_password and sasl_mechanism)",
        ),
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9092)"),
            "testing: Connection refused (start the server, or correct the address)",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            "testing: the name of the host is not known (correct the address)",
        ),
    ],
)
def test_what_is_met_first_is_said_with_its_remedy(error: Exception, said: str) -> None:
    assert str(of_exception(error, "testing")) == said


def test_what_the_library_wraps_is_judged_by_what_is_inside() -> None:
    error = client.KafkaConnectionError("closed")
    error.__cause__ = ssl.SSLCertVerificationError(1, "unknown")

    ours = of_exception(error, "testing")

    assert ours is not None
    assert ours.kind is ErrorKind.CONFIGURATION


def test_an_exception_of_somebody_else_passes() -> None:
    assert of_exception(KeyError("x"), "testing") is None
    with pytest.raises(KeyError), mapped("testing"):
        raise KeyError("x")
