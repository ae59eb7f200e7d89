"""Compare every place that states the product's version; exit 1 when they disagree.

`pyproject.toml` leads. Files that a checkout need not have (Dockerfile, CHANGELOG, SECURITY.md) are
compared when they are there. The formula and the executables take theirs from `pyproject.toml`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Statement:
    """One place and the version that it states; None when the place does not state any."""

    place: str
    version: str | None


def leading_version(root: Path) -> str:
    """The version in pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def statements(root: Path) -> Iterator[Statement]:
    """Every other place that states the version."""
    yield _stated(root, "relay/__init__.py", r'^__version__ = "([^"]+)"')
    yield Statement("sql/migrations, the newest file", _newest_migration(root))
    yield Statement("sql, relay_schema_version()", _schema_version(root))
    for path, pattern in OPTIONAL_PLACES:
        if (root / path).exists():
            yield _stated(root, path, pattern)
    for pattern in PLACES_WITH_NAMES:
        for path in sorted(root.glob(pattern)):
            yield from _names(root, path)


OPTIONAL_PLACES = (
    ("CHANGELOG.md", r"^## \[?(\d+\.\d+\.\d+)"),
    ("Dockerfile", r"^ARG VERSION=(\S+)"),
    ("SECURITY.md", r"^\| (\d+\.\d+\.\d+), the newest \|"),
    ("deploy/kubernetes/deployment.yaml", r"app\.kubernetes\.io/version: (\S+)"),
)

# Where the image, the archives, the distribution, a release's files and the job that migrates are
# named with their version.
PLACES_WITH_NAMES = ("README.md", "docs/**/*.md", "docker-compose.yaml", "deploy/**/*.yaml")
NAME = re.compile(
    r"pgtrickle[-_]relay(?:(?:-migrate)?[:-]|==|/(?:releases/download/)?v)(\d+[.-]\d+[.-]\d+)"
)


def disagreements(root: Path) -> list[str]:
    """One line per place that does not state the leading version."""
    wanted = leading_version(root)
    return [
        f"{statement.place}: {statement.version or 'no version found'}, "
        f"but pyproject.toml says {wanted}"
        for statement in statements(root)
        if statement.version != wanted
    ]


def _stated(root: Path, path: str, pattern: str) -> Statement:
    try:
        text = (root / path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Statement(path, None)
    match = re.search(pattern, text, re.MULTILINE)
    return Statement(path, match.group(1) if match else None)


def _names(root: Path, path: Path) -> Iterator[Statement]:
    """Each name with a full version in it, as the image's tag is."""
    for version in NAME.findall(path.read_text(encoding="utf-8")):
        yield Statement(f"{path.relative_to(root)}, a name", version.replace("-", "."))


def _newest_migration(root: Path) -> str | None:
    targets = [
        path.stem.rpartition("--")[2]
        for path in (root / "sql" / "migrations").glob("pg_trickle--*.sql")
    ]
    return max(targets, key=_as_numbers, default=None)


def _schema_version(root: Path) -> str | None:
    pattern = re.compile(
        r"function\s+@schema@\.relay_schema_version\s*\(\s*\).*?'(\d+\.\d+\.\d+)'",
        re.IGNORECASE | re.DOTALL,
    )
    for path in sorted((root / "sql").rglob("*.sql")):
        match = pattern.search(path.read_text(encoding="utf-8"))
        if match:
            return match.group(1)
    return None


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    found = disagreements(root)
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print(f"every place says {leading_version(root)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
