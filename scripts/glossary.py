"""Keeps words that only this project would know out of it, where the field has a word.

Prints each with its place and the better word; ends with 1 where there is any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Frozen by checksum, or the list itself.
EXEMPT = ("sql/migrations/", "scripts/glossary.py", "tests/unit/test_glossary.py")
SEARCHED = (
    "relay",
    "scripts",
    "sql",
    "docs",
    "tests",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)

# An underscore parts words, as a blank does.
BETTER = {
    r"far[ _-]?sides?": "broker, or destination",
    r"under[ _-]way": "in flight",
    r"(is|are|was|were|not)[ _]out(?![ _](of|there|loud))": "in flight, or unacknowledged",
    r"bur(y|ied|ies|ying)": "dead-letter",
    r"condemn(s|ed|ing)?": "suspect, or reject",
    r"ground(ed|s)[ _](the|it|a)[ _]": "stop",
    r"anew": "again, or what happens: reconnect, recreate, rewrite",
    r"let(s|ting)?[ _]((it|them|us|what)[ _])?go": "release",
    r"(gives?|gave|given|giving)[ _]((it|them|everything|all)[ _])?back": "release, or nack",
    r"(asks?|asked)[ _]for[ _](a[ _])?rest": "ask to back off",
    r"grant(s|ed)?[ _](a[ _])?rest": "back off",
    r"heed[ _]cancellation": "reraise_cancellation",
    r"roster": "membership",
    r"painter": "renderer",
}
PRIVATE = re.compile(
    "|".join(f"(?P<w{n}>{word})" for n, word in enumerate(BETTER)).join(
        (r"(?<![a-z])(?:", r")(?![a-z])")
    ),
    re.IGNORECASE,
)


def private_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Each with the number of its line and the better word."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in PRIVATE.finditer(line):
            word = next(name for name, found in match.groupdict().items() if found)
            yield number, match[0], list(BETTER.values())[int(word[1:])]


def main() -> int:
    """Look through every text of the repository; the exit code."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SEARCHED],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    is_clean = True
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(EXEMPT) or not (ROOT / name).is_file():
            continue
        for number, word, better in private_words((ROOT / name).read_text("utf-8", "replace")):
            print(f"{name}:{number}: {word}: say {better}")
            is_clean = False
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
