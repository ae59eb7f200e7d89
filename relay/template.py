"""Subject, topic and key templates, compiled once and rendered for each message.

``pgtrickle.{stream_table}.{op}`` with the variables of `VARIABLES` and ``{payload.a.b}``, which
looks into the row. ``{{`` and ``}}`` are literal braces. A routing map gives some events another
template: it is looked up by event type (the ``event_type`` header of the message, where the
publisher set one), then by ``op``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches

from relay.errors import MessageUndecodable, TemplateInvalid
from relay.mapping import found_in, single_value
from relay.message import RelayMessage

VARIABLES: Mapping[str, Callable[[RelayMessage], str]] = {
    "stream_table": lambda message: message.stream_table,
    "op": lambda message: message.op,
    "key": lambda message: message.key or "",
    "outbox_id": lambda message: "" if message.outbox_id is None else str(message.outbox_id),
    "refresh_id": lambda message: message.refresh_id or "",
    "dedup_key": lambda message: message.dedup_key,
    "event_type": lambda message: message.headers.get("event_type", ""),
    "subject": lambda message: message.headers.get("subject", ""),
}

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PAYLOAD_PATH = re.compile(r"payload(\.[^.{}]+)+")
_VARIABLE = re.compile(r"\{\{|\}\}|\{[^{}]*\}")

Escape = Callable[[str], str]
Check = Callable[[str], str]
Render = Callable[[RelayMessage], str]
_Part = str | Render


def unescaped(value: str) -> str:
    """The escape rule of destinations in which every character is harmless."""
    return value


def anything(rendered: str) -> str:
    """The check of destinations that take every text."""
    return rendered


def compile_template(text: str, *, escape: Escape = unescaped, check: Check = anything) -> Render:
    """Compile a template; ``escape`` is applied to the rendered values, not to the text around.

    ``check`` gives what was rendered, or raises `MessageRejected` where the destination has no such
    name; a text that comes again and again is not checked each time.

    Raises `TemplateInvalid` naming the unknown variable or the stray brace. The returned function
    raises `MessageUndecodable` where a payload path leads to nothing that has a text form, and what
    ``check`` raises.
    """
    parts = _parse(text, escape)
    if _has_few_values(text):
        return _remembering(parts, check)
    return lambda message: check(_join(parts, message))


def compile_routing(
    default: str,
    routing: Mapping[str, str],
    *,
    escape: Escape = unescaped,
    check: Check = anything,
) -> Render:
    """Compile a default template with overrides by event type or op. Raises `TemplateInvalid`."""
    render = compile_template(default, escape=escape, check=check)
    if not routing:
        return render
    overrides = {
        name: compile_template(text, escape=escape, check=check) for name, text in routing.items()
    }

    def route(message: RelayMessage) -> str:
        event_type = message.headers.get("event_type")
        chosen = overrides.get(event_type) if event_type is not None else None
        return (chosen or overrides.get(message.op) or render)(message)

    return route


def filled(text: str, value: str) -> str:
    """The template with this value in the place of each variable, unescaped."""
    return _VARIABLE.sub(value, text)


def payload_field(payload: bytes, path: tuple[str, ...]) -> str:
    """The text of one scalar inside a JSON payload: strings bare, all else as JSON spells it.

    Raises `MessageUndecodable` where the path leads nowhere, to an object, an array or null.
    """
    text = single_value(found_in(payload, path), path)
    if text is None:
        raise MessageUndecodable(f"the payload has no value at {'.'.join(path)}")
    return text


def _parse(text: str, escape: Escape) -> list[_Part]:
    parts: list[_Part] = []
    end = 0
    for token in _TOKEN.finditer(text):
        parts.append(text[end : token.start()])
        end = token.end()
        if token[0] in ("{{", "}}"):
            parts.append(token[0][0])
        elif token[1] is None:
            raise TemplateInvalid(
                f"the template {text!r} has a stray {token[0]!r}",
                remedy="write {{ and }} for literal braces",
            )
        else:
            parts.append(_escaped(_variable(token[1], text), escape))
    parts.append(text[end:])
    return [part for part in parts if part != ""]


def _variable(name: str, text: str) -> Render:
    known = VARIABLES.get(name)
    if known is not None:
        return known
    if _PAYLOAD_PATH.fullmatch(name):
        path = tuple(name.split(".")[1:])
        return lambda message: payload_field(message.payload, path)
    near = get_close_matches(name, VARIABLES, n=1)
    hint = f"did you mean {{{near[0]}}}? " if near else ""
    raise TemplateInvalid(
        f"the template {text!r} has an unknown variable {{{name}}}",
        remedy=f"{hint}known are {', '.join(VARIABLES)} and payload.<field>",
    )


def _escaped(value_of: Render, escape: Escape) -> Render:
    if escape is unescaped:
        return value_of
    return lambda message: escape(value_of(message))


def _join(parts: list[_Part], message: RelayMessage) -> str:
    return "".join(part if isinstance(part, str) else part(message) for part in parts)


def _has_few_values(text: str) -> bool:
    names = {token[1] for token in _TOKEN.finditer(text) if token[1] is not None}
    return names <= {"stream_table", "op"}


def _remembering(parts: list[_Part], check: Check) -> Render:
    """Render and check once for each stream table and op."""
    rendered: dict[tuple[str, str], str] = {}

    def render(message: RelayMessage) -> str:
        slot = (message.stream_table, message.op)
        found = rendered.get(slot)
        if found is None:
            found = rendered[slot] = check(_join(parts, message))
        return found

    return render
