"""Every error of NATS is one of the relay's, of the right kind."""

from __future__ import annotations

import inspect

import nats.errors
import nats.js.errors
import pytest
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from relay.backends.nats.connection import LineClient
from relay.backends.nats.errors import (
    CLIENT_ERRORS,
    JETSTREAM_ERRORS,
    ApiError,
    mapped,
    of_jetstream,
    of_server_text,
)
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    DriverMissing,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
)


def test_every_exception_class_of_the_library_has_an_entry_of_its_own_or_a_fitting_parent() -> None:
    roots = {nats.errors.Error, nats.js.errors.Error}
    # What the key-value and object stores raise, which the relay does not use.
    unused = {
        name
        for name in dir(nats.js.errors)
        if any(word in name for word in ("Bucket", "Key", "Object", "Link", "Digest"))
    }
    missing = [
        name
        for module in (nats.errors, nats.js.errors)
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, nats.errors.Error)
        and name not in unused
        and not any(parent in CLIENT_ERRORS for parent in member.__mro__ if parent not in roots)
        and member not in CLIENT_ERRORS
    ]

    assert not missing


@pytest.mark.parametrize(
    "number, kind",
    [
        (10002, Outage),
        (10005, Outage),
        (10008, Outage),
        (10014, DestinationMissing),
        (10023, Outage),
        (10028, Outage),
        (10037, DestinationMissing),
        (10039, ConfigurationError),
        (10047, Outage),
        (10054, MessageTooLarge),
        (10058, ConfigurationError),
        (10059, DestinationMissing),
        (10060, ConfigurationError),
        (10065, ConfigurationError),
        (10076, ConfigurationError),
        (10077, Outage),
        (10097, MessageTooLarge),
        (10109, ConfigurationError),
        (10158, Outage),
        (10167, Outage),
    ],
)
def test_a_numbered_error_of_the_server_is_of_its_kind(number: int, kind: type[RelayError]) -> None:
    error = of_jetstream(ApiError(400, number, "words"), "publishing", is_publish=True)

    assert type(error) is kind
    assert str(number) in str(error)
    assert number in JETSTREAM_ERRORS


@pytest.mark.parametrize(
    "code, kind",
    [
        (400, ErrorKind.MESSAGE),
        (403, ErrorKind.CONFIGURATION),
        (404, ErrorKind.CONFIGURATION),
        (429, ErrorKind.OUTAGE),
        (500, ErrorKind.OUTAGE),
        (503, ErrorKind.OUTAGE),
    ],
)
def test_an_unknown_number_is_judged_by_its_code(code: int, kind: ErrorKind) -> None:
    assert of_jetstream(ApiError(code, 19999, "new"), "publishing", is_publish=True).kind is kind


def test_a_bad_request_outside_of_publishing_blames_no_message() -> None:
    error = of_jetstream(ApiError(400, 19999, "new"), "creating")

    assert not isinstance(error, MessageRejected)
    assert error.kind is ErrorKind.CONFIGURATION


@pytest.mark.parametrize(
    "text, kind",
    [
        ("nats: 'Authorization Violation'", AuthenticationRefused),
        ("nats: user authentication expired", AuthenticationRefused),
        ("nats: 'Authentication Timeout'", NotConnected),
        ('nats: permissions violation for publish to "a"', AuthenticationRefused),
        ("nats: maximum connections exceeded", Outage),
        ("nats: maximum payload violation", NotConnected),
    ],
)
def test_what_the_server_says_on_the_connection_is_understood(
    text: str, kind: type[RelayError]
) -> None:
    assert type(of_server_text(text, "connecting")) is kind


def test_a_missing_driver_names_the_extra() -> None:
    with pytest.raises(DriverMissing, match=r"pgtrickle-relay\[nats\]"), mapped("connecting"):
        raise ImportError(name="nkeys")


def test_an_error_of_ours_passes_unchanged() -> None:
    error = Outage("ours")

    with pytest.raises(Outage) as caught, mapped("connecting"):
        raise error

    assert caught.value is error


def test_a_mistake_in_our_own_code_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), mapped("connecting"):
        raise ZeroDivisionError


def test_the_client_library_still_has_the_seams_that_the_connection_uses() -> None:
    for name in ("_process_headers", "_build_message", "_process_info"):
        theirs = inspect.signature(getattr(Client, name))
        ours = inspect.signature(getattr(LineClient, name))
        assert len(ours.parameters) == len(theirs.parameters)
        for client in (Client, LineClient):
            is_coroutine = inspect.iscoroutinefunction(getattr(client, name))
            assert is_coroutine == (name != "_build_message")
    assert vars(Client())["_transport"] is None
    assert "self._io_writer" in inspect.getsource(TcpTransport.connect)
