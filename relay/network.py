"""What the network says of a connection, in the same words for everything that we connect to."""

from __future__ import annotations

import errno
import os
import socket

from relay.errors import NotConnected

# asyncio's words where a name has several addresses and none of them answers.
_REFUSED_EVERYWHERE = "Connect call failed"

_NOBODY_THERE = "start the server, or correct the address"
_REMEDIES = {
    errno.ECONNREFUSED: _NOBODY_THERE,
    errno.EHOSTUNREACH: _NOBODY_THERE,
    errno.ENETUNREACH: _NOBODY_THERE,
    errno.ETIMEDOUT: _NOBODY_THERE,
    errno.ENOENT: _NOBODY_THERE,  # a local socket
}


def not_connected(error: OSError, doing: str) -> NotConnected:
    """The relay's error for one of the network; ``doing`` names what was tried and where."""
    reason, remedy = words_of(error)
    return NotConnected(f"{doing}: {reason}", remedy=remedy)


def words_of(error: OSError) -> tuple[str, str]:
    """What is the case, and what can be done about it or nothing. Never an address or a secret."""
    if isinstance(error, socket.gaierror):
        # Whether the name is wrong or nobody could be asked differs by resolver, and by mood.
        return "the name of the host is not known", "correct the address"
    number = error.errno
    if number is None and _REFUSED_EVERYWHERE in str(error):
        number = errno.ECONNREFUSED
    if number is None or number <= 0:
        return error.strerror or type(error).__name__, ""
    return os.strerror(number), _REMEDIES.get(number, "")
