"""TLS as every backend's connection has it: a context from PEM files, and what goes wrong in words.

Options are spelled alike everywhere: ``tls_ca``, ``tls_cert``, ``tls_key``, ``tls_insecure``.
"""

from __future__ import annotations

import ssl
from typing import Protocol

import msgspec

from relay.errors import AuthenticationRefused, ConfigurationError, NotConnected, RelayError
from relay.options import Connecting, ConnectingFlag, TlsCert, TlsInsecure, TlsKey

# By a part of what OpenSSL says of a certificate.
_OF_CERTIFICATE = {
    "certificate has expired": "renew the server's certificate, or set the clock of this machine",
    "certificate is not yet valid": "set the clock of this machine or of the server",
    "not valid for": "name the server as its certificate does",
}
# The peer, or what is between, breaks off; nothing is said of how TLS is set up.
_ENDED = frozenset(
    {
        "application data after close notify",
        "decryption failed or bad record mac",
        "tlsv1 alert internal error",
        "tlsv1 alert user cancelled",
        "unexpected eof while reading",
    }
)


class PemFiles(Protocol):
    """The keys that name files."""

    @property
    def tls_ca(self) -> str | None: ...
    @property
    def tls_cert(self) -> str | None: ...
    @property
    def tls_key(self) -> str | None: ...


class TlsOptions(PemFiles, Protocol):
    """The keys of a client that are about TLS."""

    @property
    def tls_insecure(self) -> bool: ...


class TlsKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of a backend that can do without TLS, for its options to begin with.

    tls: Speak TLS whatever the scheme of `url`.
    tls_ca: PEM file of the server's authority. Like `tls_cert` it implies `tls`.
    """

    tls: ConnectingFlag = False
    tls_ca: Connecting = None
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_insecure: TlsInsecure = False

    @property
    def wants_tls(self) -> bool:
        """Whether these keys ask for TLS."""
        return bool(self.tls or self.tls_ca or self.tls_cert or self.tls_insecure)


def context_of(options: TlsOptions, path: str) -> ssl.SSLContext:
    """A client's: trusts the authorities of ``tls_ca``, or the system's, and shows ``tls_cert``.

    ``path`` is where the options stand. ``tls_insecure`` accepts any certificate and name. Raises
    `ConfigurationError` for files that can't be used.
    """
    context = _context(options, path, ssl.Purpose.SERVER_AUTH)
    if options.tls_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def server_context_of(options: PemFiles, path: str) -> ssl.SSLContext:
    """A server's: shows ``tls_cert``, and demands one of ``tls_ca`` where that is set.

    Raises `ConfigurationError` for files that can't be used.
    """
    context = _context(options, path, ssl.Purpose.CLIENT_AUTH)
    if options.tls_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _context(files: PemFiles, path: str, purpose: ssl.Purpose) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(purpose, cafile=files.tls_ca)
        if files.tls_cert is not None:
            context.load_cert_chain(files.tls_cert, files.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"{path}: the TLS files can't be used: {error.strerror or type(error).__name__}",
            remedy="tls_ca, tls_cert and tls_key are paths of PEM files",
        ) from None
    return context


def why_not_trusted(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    """What is wrong with the server's certificate, and what helps, or "" for another authority."""
    why = str(getattr(error, "verify_message", "it does not verify"))
    return why, next((remedy for part, remedy in _OF_CERTIFICATE.items() if part in why), "")


def refuses_us(error: ssl.SSLError) -> str:
    """Why the server refuses our certificate, or "" where that is not what it says."""
    reason = _reason(error)
    return reason if "certificate" in reason or "unknown ca" in reason else ""


def _reason(error: ssl.SSLError) -> str:
    reason = getattr(error, "reason", None) or "the handshake failed"
    return str(reason).replace("_", " ").lower()


def of_tls(error: ssl.SSLError, doing: str) -> RelayError:
    """The relay's error for what TLS raised, on connecting and later."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why, remedy = why_not_trusted(error)
        return ConfigurationError(
            f"{doing}: the server's certificate is not trusted: {why}",
            remedy=remedy or "point tls_ca at the authority that signed it",
        )
    reason = _reason(error)
    if refuses_us(error):
        return AuthenticationRefused(
            f"{doing}: the server refuses our certificate: {reason}",
            remedy="set tls_cert and tls_key to a certificate that the server trusts",
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) or reason in _ENDED:
        return NotConnected(f"{doing}: TLS was ended by the server")
    return ConfigurationError(
        f"{doing}: TLS failed: {reason}", remedy="is this the server's TLS port?"
    )
