"""What the network says of a connection, in the same words for everything that we connect to."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from relay.errors import ConfigurationError, NotConnected, Outage, RelayError, TimedOut
from relay.tls import of_tls

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
# The machine is short of something at the moment; all else is for somebody to mend.
_SHORTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.EINTR}
)
_DEEPEST = 10


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


def of_network(error: BaseException, doing: str) -> RelayError | None:
    """The relay's error for what TLS or the network raised, also where a library wrapped it.

    None for what is of neither.
    """
    for cause in causes(error):
        if isinstance(cause, ssl.SSLError):
            return of_tls(cause, doing)
        if isinstance(cause, TimeoutError):
            return TimedOut(f"{doing}: no answer in time")
        if isinstance(cause, EOFError):
            return NotConnected(f"{doing}: the connection was ended")
        if isinstance(cause, OSError):
            return not_connected(cause, doing)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it came from, as far as it is about the same attempt."""
    seen: BaseException | None = error
    for _ in range(_DEEPEST):
        # What was raised while an error of ours was handled has nothing to do with that error.
        if seen is None or isinstance(seen, RelayError):
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


@contextmanager
def mapped_by(
    of_exception: Callable[[BaseException, str], RelayError | None], doing: str
) -> Iterator[None]:
    """Turn what a driver raises inside into the error that ``of_exception`` makes of it.

    Where that is None the exception passes unchanged.
    """
    try:
        yield
    except Exception as error:
        ours = of_exception(error, doing)
        if ours is None or ours is error:
            raise
        raise ours from error


@contextmanager
def listening(where: str, if_taken: str) -> Iterator[None]:
    """Turn what keeps a server from listening into an error of the relay.

    ``where`` is the key and its address, ``if_taken`` the remedy where somebody else listens there.
    """
    try:
        yield
    except OSError as error:
        (reason, _), remedy = words_of(error), ""
        kind: type[RelayError] = ConfigurationError
        if isinstance(error, ssl.SSLError):
            reason = f"TLS can't be used: {reason}"
        elif isinstance(error, socket.gaierror):
            remedy = "name an address of this machine, or none, as in :8080"
        elif error.errno in _SHORTAGES:
            kind = Outage
        elif error.errno == errno.EADDRINUSE:
            reason, remedy = "the address is in use", if_taken
        raise kind(f"{where}: {reason}", remedy=remedy) from error
