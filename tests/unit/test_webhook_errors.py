"""Every exception of the HTTP client, and every status, is the relay's error of the right kind."""

from __future__ import annotations

import errno
import socket
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from relay.backends.webhook.client import seconds_of
from relay.backends.webhook.errors import (
    CLIENT_ERRORS,
    mapped,
    of_exception,
    of_status,
)
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
from relay.network import listening
from tests.contract.webhook_client import driver_exceptions

RETRIED = (408, 425, 429, 500, 502, 503, 504)


def test_every_exception_class_of_the_client_has_a_place_in_the_table() -> None:
    for exception in driver_exceptions():
        ours = of_exception(exception, "calling")
        assert isinstance(ours, RelayError), type(exception)
        if isinstance(exception, httpx.HTTPError):
            expected = next(
                CLIENT_ERRORS[one] for one in type(exception).__mro__ if one in CLIENT_ERRORS
            )
            assert type(ours) is expected


@pytest.mark.parametrize(
    "status, kind",
    [
        (301, ConfigurationError),
        (400, MessageRejected),
        (401, AuthenticationRefused),
        (403, AuthenticationRefused),
        (404, DestinationMissing),
        (405, ConfigurationError),
        (408, Outage),
        (409, MessageRejected),
        (410, DestinationMissing),
        (413, MessageTooLarge),
        (415, ConfigurationError),
        (422, MessageRejected),
        (429, Outage),
        (500, Outage),
        (501, ConfigurationError),
        (503, Outage),
        (505, MessageRejected),
        (507, Outage),
        (522, Outage),
    ],
)
def test_a_status_says_whose_trouble_it_is(status: int, kind: type[RelayError]) -> None:
    error = of_status(status, "host:80", retried=RETRIED, size_bytes=7)

    assert type(error) is kind
    assert str(status) in str(error)


def test_an_unknown_status_of_a_server_is_retried_only_where_500_is() -> None:
    error = of_status(507, "host:80", retried=(503,), size_bytes=7)

    assert type(error) is MessageRejected


def test_every_status_of_success_accepts() -> None:
    for status in (200, 201, 202, 204):
        assert of_status(status, "host:80", retried=RETRIED, size_bytes=7) is None


def test_a_certificate_behind_the_clients_exception_is_found() -> None:
    outer = httpx.ConnectError("no")
    outer.__cause__ = ssl.SSLCertVerificationError(1, "unknown authority")

    assert type(of_exception(outer, "calling")) is ConfigurationError


def test_an_unknown_host_is_said_to_be_unknown() -> None:
    outer = httpx.ConnectError("no")
    outer.__cause__ = socket.gaierror(-2, "Name or service not known")

    error = of_exception(outer, "calling")

    assert isinstance(error, NotConnected)
    assert "name of the host is not known" in str(error)


def test_an_error_of_ours_passes_unchanged_and_a_mistake_is_not_hidden() -> None:
    error = TimedOut("ours")
    with pytest.raises(TimedOut) as caught, mapped("calling"):
        raise error
    assert caught.value is error
    with pytest.raises(ZeroDivisionError), mapped("calling"):
        raise ZeroDivisionError


def test_an_address_that_is_taken_is_for_the_operator_a_shortage_passes() -> None:
    with (
        pytest.raises(ConfigurationError, match="the address is in use"),
        listening("metrics.addr :80", ""),
    ):
        raise OSError(errno.EADDRINUSE, "in use")
    with pytest.raises(Outage, match="Too many open files"), listening("metrics.addr :80", ""):
        raise OSError(errno.EMFILE, "too many")


def test_a_wait_is_read_from_seconds_and_from_a_date() -> None:
    in_a_minute = datetime.now(UTC) + timedelta(seconds=60)

    assert seconds_of("120") == 120.0
    assert 55 < (seconds_of(format_datetime(in_a_minute, usegmt=True)) or 0) < 61
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert seconds_of("Fri, 31 Dec 9999 23:59:59 GMT") is not None
    assert seconds_of("9" * 40) == 999_999_999.0
    assert seconds_of("soon") is None
    assert seconds_of("Mon, 01 Jan 0001 00:00:00 +9959") in (0.0, None)
    assert seconds_of("-1") is None
    assert seconds_of(None) is None
