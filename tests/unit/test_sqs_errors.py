"""Every error of SQS is one of the relay's, of the right kind, on one line and without secrets."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest
from botocore import exceptions as client

from relay.backends.sqs.errors import CODES, mapped, of_answer, of_entry, of_exception
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    MessageRejected,
    MessageTooLarge,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from tests.contract.sqs_broker import client_error, driver_exceptions


def test_every_exception_of_the_library_comes_out_as_one_of_ours() -> None:
    for exception in driver_exceptions():
        with pytest.raises(RelayError) as caught, mapped("testing"):
            raise exception
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error, kind",
    [
        (client_error("AWS.SimpleQueueService.NonExistentQueue"), DestinationMissing),
        (client_error("QueueDoesNotExist"), DestinationMissing),
        (client_error("InvalidClientTokenId", status=403), AuthenticationRefused),
        (client_error("SignatureDoesNotMatch", status=403), AuthenticationRefused),
        (client_error("AccessDenied", status=403), AuthenticationRefused),
        (client_error("ExpiredToken", status=403), AuthenticationRefused),
        (client_error("RequestThrottled"), Outage),
        (client_error("OverLimit"), Outage),
        (client_error("InternalError", status=500), Outage),
        (client_error("KmsDisabled"), ConfigurationError),
        (client_error("Unheard", status=503), Outage),
        (client_error("Unheard", status=429), Outage),
        (client_error("Unheard", status=403), AuthenticationRefused),
        (client_error("Unheard", status=404), DestinationMissing),
        (client_error("Unheard", status=400), ConfigurationError),
        (client.EndpointConnectionError(endpoint_url="http://h"), NotConnected),
        (client.ConnectionClosedError(endpoint_url="http://h"), NotConnected),
        (client.ConnectTimeoutError(endpoint_url="http://h"), TimedOut),
        (client.ReadTimeoutError(endpoint_url="http://h"), TimedOut),
        (client.NoCredentialsError(), AuthenticationRefused),
        (client.PartialCredentialsError(provider="a", cred_var="b"), AuthenticationRefused),
        (client.CredentialRetrievalError(provider="a", error_msg="b"), Outage),
        (client.NoRegionError(), ConfigurationError),
        (client.ProfileNotFound(profile="p"), ConfigurationError),
        (socket.gaierror(-2, "unknown"), NotConnected),
        (ConnectionResetError(), NotConnected),
        (TimeoutError(), TimedOut),
    ],
)
def test_an_error_is_of_its_kind(error: Exception, kind: type[RelayError]) -> None:
    assert type(of_exception(error, "testing")) is kind


@pytest.mark.parametrize("code", sorted(CODES))
def test_a_code_is_understood_as_older_and_newer_servers_spell_it(code: str) -> None:
    newer = code.replace("Kms", "KMS.") + "Exception"
    for spelled in (code, newer, f"AWS.SimpleQueueService.{code}"):
        assert type(of_answer(client_error(spelled), "x", is_publish=True)) is CODES[code]


def test_what_is_wrong_with_a_parameter_blames_a_message_only_while_publishing() -> None:
    error = client_error("InvalidParameterValue", "no")

    assert of_answer(error, "sending", is_publish=True).kind is ErrorKind.MESSAGE
    assert of_answer(error, "asking").kind is ErrorKind.CONFIGURATION


@pytest.mark.parametrize(
    "code, is_ours, kind",
    [
        ("InvalidMessageContents", True, MessageRejected),
        ("Whatever", True, MessageRejected),
        ("Whatever", False, Outage),
        ("InternalError", False, Outage),
        ("InvalidParameterValue", False, Outage),
        ("RequestThrottled", True, Outage),
        ("MessageTooLong", True, MessageTooLarge),
        ("AccessDenied", True, AuthenticationRefused),
    ],
)
def test_an_entry_is_refused_for_good_by_the_senders_fault_and_else_for_now(
    code: str, *, is_ours: bool, kind: type[RelayError]
) -> None:
    entry = {"Id": "1", "Code": code, "SenderFault": is_ours, "Message": "m"}

    assert type(of_entry(entry, "sending")) is kind


@pytest.mark.parametrize(
    "error, said",
    [
        (
            client_error("AWS.SimpleQueueService.NonExistentQueue", "for this wsdl version"),
            "asking: there is no such queue (create it, or correct queue_url and region)",
        ),
        (
            client_error("InvalidClientTokenId", status=403),
            "asking: access is refused: InvalidClientTokenId"
            " (correct access_key_id, secret_access_key, session_token and region)",
        ),
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed"),
            "asking: Connection refused (start the server, or correct the address)",
        ),
    ],
)
def test_what_is_met_first_is_said_with_its_remedy(error: Exception, said: str) -> None:
    assert str(of_exception(error, "asking")) == said


def test_what_is_said_of_a_wrong_signature_is_not_repeated() -> None:
    error = client_error(
        "SignatureDoesNotMatch", "The canonical string was\nx-amz-security-token:hunter2", 403
    )

    told = str(of_answer(error, "connecting"))

    assert "hunter2" not in told
    assert "secret_access_key" in told


@pytest.mark.parametrize(
    "code, text, told",
    [
        (
            "InvalidParameterValue",
            "Value card 4111 for parameter MessageGroupId is invalid. Reason: Can only include x",
            "sending: InvalidParameterValue: parameter MessageGroupId",
        ),
        (
            "MissingParameter",
            "The request must contain the parameter MessageGroupId.",
            "sending: MissingParameter: parameter MessageGroupId",
        ),
        (
            "ValidationException",
            "1 validation error detected: Value 'card 4111' at 'messageBody' failed",
            "sending: ValidationException",
        ),
        ("Unheard", "could not store card 4111", "sending: Unheard"),
    ],
)
def test_what_the_service_quotes_of_a_message_goes_to_its_dead_letter_only(
    code: str, text: str, told: str
) -> None:
    entry = {"Id": "1", "Code": code, "Message": text}
    entries = [of_entry({**entry, "SenderFault": is_ours}, "sending") for is_ours in (True, False)]

    for error in (*entries, of_answer(client_error(code, text), "sending", is_publish=True)):
        assert str(error) == told
        assert text.rstrip(".") in error.quoting


@pytest.mark.parametrize("code", ["MessageTooLong", "KMS.DisabledException", "OverLimit"])
def test_a_limit_or_what_is_wrong_with_the_queue_is_told_in_the_services_words(code: str) -> None:
    error = of_answer(client_error(code, "at most 262144 bytes"), "x", is_publish=True)

    assert "262144" in str(error)


@pytest.mark.parametrize(
    "code", ["ThrottlingException", "ThrottledException", "RequestLimitExceeded", "SlowDown"]
)
def test_being_asked_to_slow_down_is_no_message_s_fault(code: str) -> None:
    assert type(of_answer(client_error(code, "slower"), "sending", is_publish=True)) is Outage


def test_what_tls_says_is_found_below_what_the_library_says() -> None:
    error = client.SSLError(endpoint_url="https://h", error="x")
    error.__context__ = ssl.SSLCertVerificationError(1, "unknown authority")

    ours = of_exception(error, "connecting")

    assert isinstance(ours, ConfigurationError)
    assert "tls_ca" in str(ours)


def test_an_error_of_ours_passes_unchanged() -> None:
    error = Outage("ours")

    with pytest.raises(Outage) as caught, mapped("connecting"):
        raise error

    assert caught.value is error


def test_a_mistake_in_our_own_code_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), mapped("connecting"):
        raise ZeroDivisionError


def test_a_code_is_found_in_an_answer_of_the_older_form() -> None:
    told = (
        "<ErrorResponse><Errors><Error><Code>AccessDenied</Code></Error></Errors></ErrorResponse>"
    )

    error = of_answer(client_error("403", told, 403), "asking")

    assert isinstance(error, AuthenticationRefused)
    assert "AccessDenied" in str(error)
