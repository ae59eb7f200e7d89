from __future__ import annotations

import pytest

from relay.status.keys import KeyReader


@pytest.mark.parametrize(
    "data,keys",
    [
        (b"jq?", ["j", "q", "?"]),
        (b"\x1b[A\x1bOB\x1b[5~", ["up", "down", "page up"]),
        (b"\r\n\x7f", ["enter", "enter", "backspace"]),
        ("ä/".encode(), ["ä", "/"]),
        (b"\x1b[200~x\x1b[201~", ["x"]),
        (b"\x1b\x1b[A", ["escape", "up"]),
        (b"\x00\x01", []),
    ],
)
def test_bytes_become_keys(data: bytes, keys: list[str]) -> None:
    assert KeyReader().feed(data) == keys


@pytest.mark.parametrize("cut", range(1, 4))
def test_a_sequence_may_come_in_pieces(cut: int) -> None:
    reader = KeyReader()
    data = b"\x1b[5~"

    assert reader.feed(data[:cut]) == []
    assert reader.is_waiting
    assert reader.feed(data[cut:]) == ["page up"]


def test_an_escape_that_nothing_follows_is_the_escape_key() -> None:
    reader = KeyReader()

    assert reader.feed(b"\x1b") == []
    assert reader.flush() == ["escape"]
    assert not reader.is_waiting


def test_a_character_may_come_in_pieces() -> None:
    reader = KeyReader()

    assert reader.feed("é".encode()[:1]) + reader.feed("é".encode()[1:]) == ["é"]
