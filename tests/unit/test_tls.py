"""What TLS says, and whose trouble it is."""

from __future__ import annotations

import ssl

import pytest

from relay.errors import AuthenticationRefused, ConfigurationError, NotConnected, RelayError
from relay.postgres import postgres_errors
from relay.tls import of_tls


def untrusted(message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, f"certificate verify failed: {message}")
    error.verify_message = message
    return error


def alert(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


NAME_IT = "name the server as its certificate does"


@pytest.mark.parametrize(
    "message, remedy",
    [
        ("certificate has expired", "renew the server's certificate"),
        ("certificate is not yet valid", "set the clock"),
        ("Hostname mismatch, certificate is not valid for 'db'.", NAME_IT),
        ("IP address mismatch, certificate is not valid for '::1'.", NAME_IT),
        ("unable to get local issuer certificate", "point tls_ca at the authority"),
    ],
)
def test_a_certificate_that_is_not_trusted_says_what_helps(message: str, remedy: str) -> None:
    error = of_tls(untrusted(message), "connecting")

    assert type(error) is ConfigurationError
    assert message in error.problem
    assert error.remedy.startswith(remedy)
    if "tls_ca" not in remedy:
        with pytest.raises(AuthenticationRefused) as caught, postgres_errors("connecting"):
            raise untrusted(message)
        assert caught.value.remedy == error.remedy


@pytest.mark.parametrize(
    "reason, kind",
    [
        ("TLSV1_ALERT_INTERNAL_ERROR", NotConnected),
        ("TLSV1_ALERT_USER_CANCELLED", NotConnected),
        ("APPLICATION_DATA_AFTER_CLOSE_NOTIFY", NotConnected),
        ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", NotConnected),
        ("UNEXPECTED_EOF_WHILE_READING", NotConnected),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", AuthenticationRefused),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", AuthenticationRefused),
        ("TLSV1_ALERT_UNKNOWN_CA", AuthenticationRefused),
        ("WRONG_VERSION_NUMBER", ConfigurationError),
    ],
)
def test_a_connection_that_breaks_off_is_no_wrong_setting(
    reason: str, kind: type[RelayError]
) -> None:
    assert type(of_tls(alert(reason), "connecting")) is kind


def test_a_certificate_that_postgresql_refuses_is_no_outage() -> None:
    with pytest.raises(AuthenticationRefused, match="sslcert"), postgres_errors("connecting"):
        raise alert("TLSV13_ALERT_CERTIFICATE_REQUIRED")
    with pytest.raises(NotConnected), postgres_errors("connecting"):
        raise alert("TLSV1_ALERT_INTERNAL_ERROR")
