"""Every error of RabbitMQ is one of the relay's, of the right kind."""

from __future__ import annotations

import inspect
import ssl

import aiormq
import pamqp.exceptions
import pytest

from relay.backends.rabbitmq.errors import (
    REPLY_CODES,
    SizeRefused,
    Unreadable,
    of_close,
    of_exception,
)
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from tests.contract.rabbitmq_broker import driver_exceptions, mapped


def test_every_reply_code_of_the_protocol_has_a_kind() -> None:
    codes = {
        member.value
        for _, member in inspect.getmembers(pamqp.exceptions, inspect.isclass)
        if isinstance(getattr(member, "value", None), int)
    }

    assert codes <= {code for ours in REPLY_CODES.values() for code in ours}


def test_every_exception_of_the_client_comes_out_as_one_of_ours() -> None:
    for exception in driver_exceptions():
        with pytest.raises(RelayError), mapped("testing"):
            raise exception


@pytest.mark.parametrize(
    "code, text, kind, words",
    [
        (
            403,
            "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.",
            AuthenticationRefused,
            "correct username and password",
        ),
        (
            403,
            "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'",
            AuthenticationRefused,
            "set_permissions",
        ),
        (
            403,
            "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use",
            Outage,
            "set exclusive to false",
        ),
        (404, "NOT_FOUND - no exchange 'e' in vhost '/'", DestinationMissing, "declare_exchange"),
        (404, "NOT_FOUND - no queue 'q' in vhost '/'", DestinationMissing, "declare_queue"),
        (
            404,
            "NOT_FOUND - home node 'rabbit@a' of durable queue 'q' is down or inaccessible",
            Outage,
            "start the node",
        ),
        *(
            (404, f"NOT_FOUND - {text}", Outage, "testing: ")
            for text in (
                "queue 'q' in vhost '/' process is stopped by supervisor",
                "queue 'q' in vhost '/' crashed and failed to restart",
                "leader of queue 'q' in vhost '/' may be stopping or being demoted",
                "timed out while declaring queue 'q' in vhost '/'",
                "failed to perform operation on queue 'q' in vhost '/' due to timeout",
            )
        ),
        (405, "RESOURCE_LOCKED - cannot obtain exclusive access", ConfigurationError, "another"),
        (
            406,
            "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q'",
            ConfigurationError,
            "other properties",
        ),
        (
            406,
            "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value"
            " used: 1800000 ms. This timeout value can be configured",
            Outage,
            "consumer_timeout",
        ),
        (406, "PRECONDITION_FAILED - unknown delivery tag 7", Outage, "unknown delivery tag"),
        (320, "CONNECTION_FORCED - broker forced connection closure", NotConnected, "forced"),
        (530, "NOT_ALLOWED - vhost nowhere not found", DestinationMissing, "add_vhost"),
        (
            530,
            "NOT_ALLOWED - access to vhost 'v' refused for user 'u'",
            AuthenticationRefused,
            "set_permissions",
        ),
        (
            530,
            "NOT_ALLOWED - access to vhost 'v' refused for user 'u': connection limit (1) is"
            " reached",
            Outage,
            "limit",
        ),
        (541, "INTERNAL_ERROR", Outage, "INTERNAL_ERROR"),
        (999, "SOMETHING NEW", Outage, "SOMETHING NEW"),
    ],
)
def test_a_close_is_of_its_kind_and_says_what_to_do(
    code: int, text: str, kind: type[RelayError], words: str
) -> None:
    error = of_close(code, text, "testing")

    assert type(error) is kind
    assert words in str(error)
    assert "\n" not in str(error)


def test_what_the_broker_says_is_told_without_what_is_not_of_the_matter() -> None:
    text = (
        "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see"
        " the broker logfile."
    )

    assert str(of_close(403, text, "connecting")) == (
        "connecting: Login was refused using authentication mechanism PLAIN"
        " (correct username and password)"
    )


@pytest.mark.parametrize(
    "code, text, said",
    [
        (501, 'FRAME_ERROR - type 1, first 16 octets = <<"card 4111">>: x', "FRAME_ERROR (501)"),
        (541, 'INTERNAL_ERROR - {badmatch,<<"card 4111">>}', "INTERNAL_ERROR (541)"),
        (502, "", "error (502)"),
    ],
)
def test_the_bytes_that_an_error_of_the_protocol_quotes_are_not_repeated(
    code: int, text: str, said: str
) -> None:
    assert str(of_close(code, text, "testing")) == f"testing: {said}"


def test_of_a_long_text_only_the_beginning_is_told() -> None:
    assert len(str(of_close(320, f"CONNECTION_FORCED - {'x' * 9000}", "testing"))) < 400


@pytest.mark.parametrize(
    "text",
    [
        "PRECONDITION_FAILED - message size 25165825 is larger than configured max size 25165824",
        "PRECONDITION_FAILED - message size 25165825 larger than max size 25165824",
    ],
)
def test_a_size_that_is_refused_teaches_the_limit_and_is_an_outage_to_the_others(
    text: str,
) -> None:
    error = of_close(406, text, "publishing")

    assert isinstance(error, SizeRefused)
    assert error.limit_bytes == 25165824
    assert error.kind is ErrorKind.OUTAGE


@pytest.mark.parametrize(
    "error, kind",
    [
        (ConnectionResetError(), NotConnected),
        (TimeoutError(), TimedOut),
        (EOFError(), NotConnected),
        (ssl.SSLCertVerificationError(1, "unknown authority"), ConfigurationError),
        (aiormq.ChannelNotFoundEntity("no queue"), DestinationMissing),
        (aiormq.ChannelClosed(403, "access refused"), AuthenticationRefused),
        (aiormq.ChannelClosed(None, None), NotConnected),
        (aiormq.AuthenticationError(["PLAIN"], ["EXTERNAL"]), AuthenticationRefused),
        (aiormq.InvalidFrameError("broken"), Unreadable),
        (RecursionError(), Unreadable),
    ],
)
def test_an_exception_is_of_its_kind(error: Exception, kind: type[RelayError]) -> None:
    assert type(of_exception(error, "testing")) is kind


def test_an_error_of_ours_passes_unchanged() -> None:
    error = Outage("ours")

    with pytest.raises(Outage) as caught, mapped("connecting"):
        raise error

    assert caught.value is error


def test_a_mistake_in_our_own_code_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), mapped("connecting"):
        raise ZeroDivisionError
