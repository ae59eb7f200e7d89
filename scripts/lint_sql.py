"""Checks the house style of the SQL files: what a reader and a reviewer rely on in each of them.

Reads `sql/` of the checkout, or the files and directories named, prints one line for each finding,
and ends with 1 when there is one. It reads tokens, not grammar: strings, comments and quoted names
are left alone, bodies of functions and DO blocks are read like the rest. ``--fix`` writes the heads
of functions as they should stand.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SCHEMA = "@schema@"
WIDTH = 100
COMMENTED = ("table", "view", "function", "procedure", "type", "trigger", "index")
ATTRIBUTES = {
    "language": 0,
    "immutable": 1,
    "stable": 1,
    "volatile": 1,
    "security": 2,
    "set": 3,
}
ATTRIBUTE_NAMES = ("language", "volatility", "security", "set")

_TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<comment>--[^\n]*|/\*.*?\*/)
    | (?P<dollar>\$(?P<tag>[a-z_A-Z0-9]*)\$.*?\$(?P=tag)\$)
    | (?P<string>[eE]?'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")*")
    | (?P<word>@schema(?:_name)?@|[A-Za-z_\u0080-\uffff][\w$]*)
    | (?P<other>::|:=|=>|\d[\w.]*|.)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    """A piece of SQL that means something; ``text`` of a string keeps its quotes."""

    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Finding:
    """One breach of the style."""

    line: int
    rule: str
    text: str


@dataclass(frozen=True)
class Created:
    """An object that a statement creates, with the tokens of the statement."""

    kind: str
    name: str
    line: int
    statement: tuple[Token, ...]


def tokens(text: str, first_line: int = 1) -> Iterator[Token]:
    """All tokens but space and comments; bodies of code come as their own tokens."""
    line = first_line
    before = ""
    for match in _TOKEN.finditer(text):
        kind, piece = str(match.lastgroup if match.lastgroup != "tag" else "dollar"), match[0]
        if match["dollar"] is not None:
            kind = "dollar"
        if kind == "dollar" and before in ("as", "do"):
            mark = len(match["tag"]) + 2
            yield Token("body", "", line)
            yield from tokens(piece[mark:-mark], line)
            yield Token("body end", "", line + piece.count("\n"))
            before = ""
        elif kind not in ("space", "comment"):
            yield Token("string" if kind == "dollar" else kind, piece, line)
            before = piece.lower()
        line += piece.count("\n")


def statements(found: Iterable[Token]) -> Iterator[tuple[Token, ...]]:
    """Tokens up to each semicolon, with the attributes before a body but without the body."""
    current: list[Token] = []
    pending: list[list[Token]] = []
    for token in found:
        if token.kind == "body":
            pending.append(current)
            current = []
        elif token.kind == "body end":
            yield tuple(current)
            current = pending.pop()
        elif token.text == ";":
            yield tuple(current)
            current = []
        else:
            current.append(token)
    yield tuple(current)


def check(text: str) -> list[Finding]:
    """All findings in one file, by line."""
    every_token = list(tokens(text))
    parts = [part for part in statements(every_token) if part]
    created = [found for part in parts for found in _created(part)]
    findings = [
        *_layout(text),
        *_letter_case(every_token),
        *_qualification(created),
        *_comments(text, created, parts),
        *_functions(created, parts),
        *_heads(text),
    ]
    return sorted(set(findings), key=lambda finding: (finding.line, finding.rule))


def _layout(text: str) -> Iterator[Finding]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.lstrip().startswith(","):
            yield Finding(number, "comma", "a comma ends a line, it does not begin one")
        if line != line.rstrip() or "\t" in line:
            yield Finding(number, "space", "a tab, or space at the end of the line")
    if not text.endswith("\n"):
        yield Finding(text.count("\n") + 1, "space", "the file does not end with a new line")


def _letter_case(found: Iterable[Token]) -> Iterator[Finding]:
    for token in found:
        if token.kind == "string" and "@schema" in token.text:
            yield Finding(
                token.line, "schema", "the schema's name is put in by format, not by text"
            )
        if token.kind == "word" and token.text != token.text.lower():
            yield Finding(token.line, "case", f"{token.text} is not in lower case")


def _created(part: tuple[Token, ...]) -> Iterator[Created]:
    # A condition of plpgsql can stand before it: the last create of the part counts.
    words = [token.text.lower() for token in part]
    if "create" not in words:
        return
    start = len(words) - 1 - words[::-1].index("create")
    position = start + 1
    modifiers = {"or", "replace", "unlogged", "unique", "constraint", "recursive", "materialized"}
    while position < len(words) and words[position] in modifiers:
        position += 1
    if position >= len(words) or words[position] not in COMMENTED:
        return
    kind = words[position]
    position += 1
    while position < len(words) and words[position] in {"if", "not", "exists", "concurrently"}:
        position += 1
    yield Created(kind, _name(words, position), part[start].line, part[start:])


def _name(words: list[str], position: int) -> str:
    name = words[position] if position < len(words) else ""
    while position + 2 < len(words) and words[position + 1] == ".":
        position += 2
        name += "." + words[position]
    return name


def _qualification(created: Iterable[Created]) -> Iterator[Finding]:
    for found in created:
        if found.kind in ("trigger", "index"):
            words = [token.text.lower() for token in found.statement]
            name = _name(words, words.index("on") + 1) if "on" in words else ""
        else:
            name = found.name
        if "." not in name:
            yield Finding(
                found.line, "schema", f"{found.kind} {name or found.name} is created without schema"
            )


def _comments(
    text: str, created: Iterable[Created], parts: Iterable[tuple[Token, ...]]
) -> Iterator[Finding]:
    lines = text.split("\n")
    commented = Counter(
        (words[2], _name(words, 3))
        for part in parts
        if (words := _words_from(part, "comment")) and len(words) > 4 and words[1] == "on"
    )
    seen: Counter[tuple[str, str]] = Counter()
    for found in created:
        # An index lives in the schema of its table and is named without it.
        name = f"{SCHEMA}.{found.name}" if found.kind == "index" else found.name
        key = (found.kind, name)
        seen[key] += 1
        if commented[key] >= seen[key]:
            continue
        above = lines[max(0, found.line - 4) : found.line - 1]
        if found.kind == "index" and any(line.strip().startswith("-- serves:") for line in above):
            continue
        yield Finding(found.line, "comment", f"{found.kind} {found.name} has no comment")


def _words_from(part: tuple[Token, ...], first: str) -> list[str]:
    words = [token.text.lower() for token in part]
    return words[words.index(first) :] if first in words else []


def _functions(created: Iterable[Created], parts: list[tuple[Token, ...]]) -> Iterator[Finding]:
    reasons = {
        _name(words, 3)
        for part in parts
        if (words := _words_from(part, "comment"))[1:3] == ["on", "function"]
        and "definer" in words[-1]
    }
    for found in created:
        if found.kind != "function":
            continue
        attributes = _attributes(found.statement)
        order = [ATTRIBUTES[word] for word, _ in attributes]
        missing = [name for rank, name in enumerate(ATTRIBUTE_NAMES[:3]) if rank not in order]
        if missing:
            yield Finding(found.line, "attributes", f"{found.name} lacks {', '.join(missing)}")
        if order != sorted(order):
            yield Finding(
                found.line,
                "attributes",
                f"{found.name}: the order is {', '.join(ATTRIBUTE_NAMES)}",
            )
        if ("security", "definer") not in attributes:
            continue
        header = " ".join(token.text.lower() for token in found.statement)
        if "set search_path = pg_catalog , pg_temp" not in header:
            yield Finding(
                found.line, "definer", f"{found.name}: set search_path = pg_catalog, pg_temp"
            )
        if found.name not in reasons:
            yield Finding(
                found.line, "definer", f"{found.name}: the comment does not say why it is definer"
            )


def _attributes(statement: tuple[Token, ...]) -> list[tuple[str, str]]:
    """Attributes and the word after each, behind the closing parenthesis of the arguments."""
    depth = 0
    found: list[tuple[str, str]] = []
    for position, token in enumerate(statement):
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        word = token.text.lower()
        if depth == 0 and word in ATTRIBUTES:
            following = (
                statement[position + 1].text.lower() if position + 1 < len(statement) else ""
            )
            found.append((word, following))
    return found


_CREATED = re.compile(r"^create or replace (?:function|procedure) [\w.@]+", re.MULTILINE)
_ATTRIBUTES = re.compile(r"\s(language (?:sql|plpgsql)\b[^$]*\bas \$\w*\$)\n")
_APART = re.compile(r"(?<=\$;\n)\n(?=comment on (?:function|procedure) )")
_SHORT_COMMENT = re.compile(
    r"^(comment on (?:function|procedure|view|trigger) [^\n']+ is)\n    ('[^\n]*;)$", re.MULTILINE
)


def standing_form(text: str) -> str:
    """The same SQL with the heads of its functions as they should stand.

    Parameters, and the columns of a result, fill lines of `WIDTH`; what is returned stands behind
    them, all attributes stand in one line, and the comment follows the body.
    """
    pieces = []
    end = 0
    for found in _CREATED.finditer(text):
        arguments = _closing(text, found.end())
        attributes = _ATTRIBUTES.search(text, arguments)
        if attributes is None or "--" in text[arguments : attributes.end()]:
            continue
        head = _head(
            found[0],
            text[found.end() : arguments],
            re.sub(r"(?<=\() | (?=\))", "", " ".join(text[arguments : attributes.start()].split())),
            " ".join(attributes[1].split()),
        )
        pieces += [text[end : found.start()], "\n".join(head), "\n"]
        end = attributes.end()
    joined = _APART.sub("", "".join([*pieces, text[end:]]))
    return _SHORT_COMMENT.sub(
        lambda found: one if len(one := f"{found[1]} {found[2]}") <= WIDTH else found[0], joined
    )


def _head(start: str, arguments: str, returns: str, attributes: str) -> list[str]:
    lines = _listed(start, arguments)
    if len(f"{lines[-1]} {returns}") <= WIDTH:
        lines[-1] = f"{lines[-1]} {returns}".strip()
    elif returns.startswith("returns table ("):
        before = f"{lines.pop()} " if lines[-1] == ")" else ""
        lines += _listed(f"{before}returns table ", returns.removeprefix("returns table "))
    else:
        lines.append(returns)
    return [*lines, *_filled(re.split(" (?=set )", attributes))]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` has ended."""
    depth = 0
    for found in re.finditer(r"'[^']*'|[()]", text[start:]):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return start + found.end()
    return len(text)


def _listed(start: str, parenthesis: str) -> list[str]:
    """What is between parentheses, in one line or in as few as it fits into."""
    inner = " ".join(parenthesis[1:-1].split())
    one = f"{start}({inner})"
    if len(one) <= WIDTH:
        return [one]
    items = re.findall(r"(?:'[^']*'|\([^)]*\)|[^,'(])+,?", inner)
    return [f"{start}(", *(f"    {line}" for line in _filled(items, WIDTH - 4)), ")"]


def _filled(items: Iterable[str], width: int = WIDTH) -> list[str]:
    lines: list[str] = []
    for item in map(str.strip, items):
        if lines and len(f"{lines[-1]} {item}") <= width:
            lines[-1] += f" {item}"
        else:
            lines.append(item)
    return lines


def _heads(text: str) -> Iterator[Finding]:
    wanted = standing_form(text).split("\n")
    for number, (line, better) in enumerate(zip(text.split("\n"), wanted, strict=False), start=1):
        if line != better:
            yield Finding(number, "head", f"scripts/check --fix writes it as: {better}")
            return


def sql_files(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and all SQL files below the directories."""
    return sorted(
        file for path in paths for file in (path.rglob("*.sql") if path.is_dir() else [path])
    )


def main(arguments: list[str]) -> int:
    """Lint what was named, by default `sql/`; 1 when something was found."""
    root = Path(__file__).resolve().parent.parent
    named = [Path(argument) for argument in arguments if argument != "--fix"]
    files = sql_files(named or [root / "sql"])
    count = 0
    for file in files:
        if "--fix" in arguments:
            file.write_text(standing_form(file.read_text(encoding="utf-8")), encoding="utf-8")
        for finding in check(file.read_text(encoding="utf-8")):
            shown = file.relative_to(root) if file.is_relative_to(root) else file
            print(f"{shown}:{finding.line}: {finding.rule}: {finding.text}")
            count += 1
    if not files:
        print("there is no SQL file to check")
    return 1 if count or not files else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
