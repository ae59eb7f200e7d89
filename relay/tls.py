"""TLS as every backend's connection has it: a context from PEM files, and what goes wrong in words.

Options are spelled alike everywhere: ``tls_ca``, ``tls_cert``, ``tls_key``, ``tls_insecure``.
"""

from __future__ import annotations

import ssl
from typing import Protocol

from relay.errors import AuthenticationRefused, ConfigurationError, NotConnected, RelayError


class TlsOptions(Protocol):
    """The keys of a backend that are about TLS."""

    @property
    def tls_ca(self) -> str | None: ...
    @property
    def tls_cert(self) -> str | None: ...
    @property
    def tls_key(self) -> str | None: ...
    @property
    def tls_insecure(self) -> bool: ...


def context_of(options: TlsOptions, path: str) -> ssl.SSLContext:
    """The context that these options ask for; see `client_context`."""
    return client_context(
        path,
        ca=options.tls_ca,
        cert=options.tls_cert,
        key=options.tls_key,
        is_insecure=options.tls_insecure,
    )


def client_context(
    path: str, *, ca: str | None, cert: str | None, key: str | None, is_insecure: bool
) -> ssl.SSLContext:
    """A context that trusts the authorities of ``ca``, or the system's, and shows ``cert``.

    ``path`` is where the options stand. ``is_insecure`` accepts any certificate and name. Raises
    `ConfigurationError` for files that can't be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"{path}: the TLS files can't be used: {error.strerror or type(error).__name__}",
            remedy="tls_ca, tls_cert and tls_key are paths of PEM files",
        ) from None
    if is_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def of_tls(error: ssl.SSLError, doing: str) -> RelayError:
    """The relay's error for what TLS raised, on connecting and later."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"{doing}: the server's certificate is not trusted:"
            f" {getattr(error, 'verify_message', 'it does not verify')}",
            remedy="point tls_ca at the authority that signed it",
        )
    reason = str(getattr(error, "reason", None) or "the handshake failed").replace("_", " ").lower()
    if "certificate" in reason or "unknown ca" in reason:
        return AuthenticationRefused(
            f"{doing}: the server refuses our certificate: {reason}",
            remedy="set tls_cert and tls_key to a certificate that the server trusts",
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return NotConnected(f"{doing}: TLS was ended by the server")
    return ConfigurationError(
        f"{doing}: TLS failed: {reason}", remedy="is this the server's TLS port?"
    )
