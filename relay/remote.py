"""One relay, asked over HTTP: also where the database does not answer."""

from __future__ import annotations

import httpx
import msgspec

from relay.board import RelayStatus
from relay.endpoint import parse_address
from relay.errors import ConfigurationError, NotConnected

_TIMEOUT_S = 5.0


async def status_of(address: str) -> RelayStatus:
    """What the relay says of itself whose ``metrics.addr`` can be reached at this ``host:port``.

    Raises `ConfigurationError` where the address is none, or not that of a relay of this version,
    `NotConnected` where nothing answers within 5 s.
    """
    host, port = parse_address(address, "--relay")
    try:
        url = httpx.URL(scheme="http", host=host or "localhost", port=port, path="/status")
        async with httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT_S) as client:
            response = await client.get(url)
        return msgspec.json.decode(response.content, type=RelayStatus)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"--relay {address!r}: {error}") from error
    except httpx.TransportError as error:
        raise NotConnected(
            f"no relay answers at {address}: {str(error) or 'it took more than 5 s'}",
            remedy="the first line of a relay's log says where it listens; metrics.addr sets it",
        ) from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"what answers at {address} is not a relay, or one of another version",
            remedy="name the address of a relay's metrics",
        ) from error
