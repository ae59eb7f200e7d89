"""Keys out of the bytes that a terminal sends."""

from __future__ import annotations

import codecs
import re

# What terminals send in normal and in application mode; xterm's table of PC-style function keys.
# https://invisible-island.net/xterm/ctlseqs/ctlseqs.html
_SEQUENCES = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1bOH": "home",
    "\x1b[1~": "home",
    "\x1b[F": "end",
    "\x1bOF": "end",
    "\x1b[4~": "end",
}
_SINGLE = {
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\x0c": "redraw",
    "\x15": "clear",
}
_WHOLE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|[^\[O\x1b])", re.DOTALL)
_BEGUN = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|O)?")


class KeyReader:
    """Gives a key's name, or the character itself for what can be typed.

    A sequence may come in pieces: `feed` what arrives; when nothing follows for a moment while
    `is_waiting`, `flush` gives the lone escape that it then was.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._rest = ""

    @property
    def is_waiting(self) -> bool:
        """True while a sequence has begun and not ended."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """The keys that are complete now; sequences that mean nothing here are left out."""
        text = self._rest + self._decoder.decode(data)
        self._rest = ""
        keys: list[str] = []
        while text:
            if not text.startswith("\x1b"):
                key = _SINGLE.get(text[0], text[0] if text[0].isprintable() else "")
                keys.append(key)
                text = text[1:]
            elif whole := _WHOLE.match(text):
                keys.append(_SEQUENCES.get(whole[0], ""))
                text = text[whole.end() :]
            elif _BEGUN.fullmatch(text):
                self._rest = text
                break
            else:
                keys.append("escape")
                text = text[1:]
        return [key for key in keys if key]

    def flush(self) -> list[str]:
        """Nothing follows: it was the escape key."""
        keys = ["escape"] if self._rest else []
        self._rest = ""
        return keys
