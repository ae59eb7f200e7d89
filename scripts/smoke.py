"""Looks whether a packaged relay is whole: an image, an executable, an installed directory.

    scripts/smoke.py COMMAND [ARGUMENT …]

calls the command as `pgtrickle-relay` and ends with 1 at the first thing that is not as it should
be: the version, the SQL that it carries, the driver of each backend, and one line with exit code 3
where no server listens.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120.0

BACKENDS = ("nats", "kafka", "redis", "sqs", "rabbitmq", "webhook", "pg-inbox", "file", "stdin")

# A port of the machine itself on which nobody listens.
NOWHERE = "--postgres-url=postgresql://nobody@127.0.0.1:1/nothing"


class NotWhole(Exception):
    """Something is missing in the package."""


def check(command: list[str], version: str) -> None:
    """Raises `NotWhole`."""
    _expect(command, ["--version"], 0, version)
    _expect(command, ["migrate", "--print"], 0, "relay_schema_version")
    for backend in BACKENDS:
        # A key that no backend has is found by what the backend's own module declares.
        profile = f"+backends.packaged={{type: {backend}, nonsense: 1}}"
        said = f"backends.packaged.nonsense is not a known key of {backend}"
        _expect(command, [NOWHERE, profile], 2, said)
    lines = _expect(command, [NOWHERE], 3, "out of reach").splitlines()
    if len(lines) != 1:
        raise NotWhole(f"{len(lines)} lines instead of one: {lines}")


def _expect(command: list[str], arguments: list[str], code: int, said: str) -> str:
    done = subprocess.run(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != code or said not in done.stdout:
        raise NotWhole(
            f"{' '.join(arguments)} should end with {code} and say {said!r}, and ended with"
            f" {done.returncode} and said {done.stdout[-2000:]!r}"
        )
    return done.stdout


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        check(sys.argv[1:], project["version"])
    except NotWhole as problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"{sys.argv[1]} is whole, with {', '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
