"""What the network says, in words that help."""

from __future__ import annotations

import errno
import socket

import pytest

from relay.errors import NotConnected
from relay.network import not_connected, words_of


@pytest.mark.parametrize(
    "error, words",
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), "Connection refused (start the server"),
        (
            OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 5432, 0, 0)"),
            "Connection refused (start the server",
        ),
        (socket.gaierror(socket.EAI_NONAME, "x"), "the name of the host is not known (correct"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "the name of the host is not known (correct"),
        (OSError(errno.EHOSTUNREACH, "x"), "No route to host (start the server"),
    ],
)
def test_what_keeps_a_server_from_being_reached_says_what_to_do(error: OSError, words: str) -> None:
    said = not_connected(error, "connecting to db:1")

    assert type(said) is NotConnected
    assert str(said).startswith(f"connecting to db:1: {words}")


def test_a_connection_that_breaks_needs_nobody_to_do_anything() -> None:
    assert words_of(ConnectionResetError(errno.ECONNRESET, "x")) == ("Connection reset by peer", "")
    assert words_of(OSError()) == ("OSError", "")
