"""From the URL of a server to where it is and who we are there, for every backend that has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from relay.errors import ConfigurationError
from relay.tls import TlsKeys

T = TypeVar("T")


class Endpoint(msgspec.Struct, frozen=True):
    """Where a server is, and who we are there.

    ``path`` and ``query`` are the URL's, the path decoded and without the slash in front.
    """

    host: str
    port: int
    is_tls: bool
    username: str | None = None
    password: str | None = None
    path: str = ""
    query: str = ""

    @property
    def address(self) -> str:
        """``host:port``, as errors and logs name the server."""
        return address_of(self.host, self.port)


def address_of(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(addr: str, key: str) -> tuple[str | None, int]:
    """Host and port of ``host:port``, ``[v6]:port`` or ``:port`` (every address: None).

    Raises `ConfigurationError` naming the key that has it.
    """
    host, colon, port = addr.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and int(port) <= 65_535
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        is_port = False
    if not colon or not is_port:
        raise ConfigurationError(
            f"{key} {addr!r} is not host:port", remedy="for example 0.0.0.0:9090"
        )
    return host or None, int(port)


def endpoint_of(
    url: str, ports: Mapping[str, int], wrong: ConfigurationError, tls: TlsKeys | None = None
) -> Endpoint:
    """Take a URL apart. Raises ``wrong``, which is not to repeat it: it may hold a password.

    ``ports`` has the default port of two schemes, the one without TLS first; ``tls`` the keys that
    ask for TLS whatever the scheme.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ports or not host or port == 0 or not url.isprintable():
        raise wrong
    plain, secure = ports
    is_tls = parts.scheme == secure or (tls is not None and tls.wants_tls)
    return Endpoint(
        host=host,
        port=port or ports[secure if is_tls else plain],
        is_tls=is_tls,
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        path=unquote(parts.path[1:]),
        query=parts.query or parts.fragment,
    )


def refuse_query(endpoint: Endpoint, path: str) -> None:
    """Raise `ConfigurationError` for a URL with options in it; ``path`` is where its key stands."""
    if endpoint.query:
        raise ConfigurationError(
            f"{path}.url has a query", remedy="write its options as keys of their own"
        )


def either(path: str, name: str, in_url: T | None, beside: T | None) -> T | None:
    """What stands in the URL, or in the key ``name``. Raises `ConfigurationError` for both."""
    if in_url is not None and beside is not None:
        raise ConfigurationError(f"{path} has {name} in its url and beside it")
    return in_url if beside is None else beside
