"""Names and texts that somebody else chose, in places where some characters mean something.

`value_escape` is for templates, the rest for headers: a name keeps the characters that HTTP allows
in a token; others, and ``%`` itself, become ``%XX`` of their UTF-8 bytes. A text that a transport
can't carry travels as RFC 8187 writes it: the name gets a ``*`` behind it and the text is
``UTF-8''`` and percent-encoded (https://www.rfc-editor.org/rfc/rfc8187#section-3.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from urllib.parse import quote, unquote, unquote_to_bytes

from relay.errors import MessageTooLarge, NameInvalid
from relay.message import text_of

_NAME_ESCAPED = re.compile(r"[^!#$&'*+\-.^_`|~0-9A-Za-z]|\*$")
_EXTENDED = "UTF-8''"


def value_escape(meaningful: str) -> Callable[[str], str]:
    """A function that escapes one value of a template: what matches the pattern, and ``%``.

    An empty value becomes ``_`` and the value ``_`` becomes ``%5F``, so that it can be undone.
    """
    to_escape = re.compile(rf"[%\s\x00-\x20\x7f\ud800-\udfff]|{meaningful}")

    def escape(value: str) -> str:
        if value in ("", "_"):
            return "%5F" if value else "_"
        return to_escape.sub(_percent, value)

    return escape


def fitting(name: str, what: str, limit_bytes: int) -> str:
    """The name, where it can be sent; ``what`` it is the name of.

    Raises `NameInvalid` where it has no UTF-8 form, `MessageTooLarge` naming the limit.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise NameInvalid(f"{what} has no UTF-8 form") from None
    if size > limit_bytes:
        raise MessageTooLarge(f"{what} has {size} bytes, the limit is {limit_bytes} bytes")
    return name


def header_name(name: str, *, is_reserved: bool) -> str:
    """A name as it is written; a reserved one is escaped until nobody takes it for that."""
    if is_reserved:
        return f"%{ord(name[0]):02X}{_NAME_ESCAPED.sub(_percent, name[1:])}"
    return _NAME_ESCAPED.sub(_percent, name) or "%"


def quoted(text: str) -> str:
    """A text percent-encoded."""
    return quote(text, safe="", errors="surrogatepass")


def extended(text: str) -> str:
    """A text as RFC 8187 writes it, for a name with a ``*`` behind it."""
    return _EXTENDED + quoted(text)


def headers_from(written: Mapping[str, str]) -> dict[str, str]:
    """The headers that were written with `header_name` and `extended`."""
    headers: dict[str, str] = {}
    for name, value in written.items():
        if name.endswith("*") and value.startswith(_EXTENDED):
            headers[_own_name(name[:-1])] = _unquoted(value.removeprefix(_EXTENDED))
        else:
            headers[_own_name(name)] = value
    return headers


def _own_name(name: str) -> str:
    if "%" not in name:
        return name
    return "" if name == "%" else _unquoted(name)


def _unquoted(text: str) -> str:
    try:
        return unquote(text, errors="surrogatepass")
    except UnicodeDecodeError:
        return text_of(unquote_to_bytes(text))


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogatepass"))
