"""Prints the lowest version of each library that `pyproject.toml` lets the relay run on.

As constraints for pip: what `scripts/test --lowest` installs. Those of `dev` and `demo` are for
whoever works on the relay, and stay the newest.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
LOWEST = re.compile(r"([\w-]+)(?:\[[\w,-]+\])?>=([\w.]+)")


def main() -> None:
    """One line a library."""
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"]]
    needed += [one for name in extras if name not in ("all", "demo", "dev") for one in extras[name]]
    for requirement in needed:
        found = LOWEST.match(requirement)
        if found is None:
            raise SystemExit(f"{requirement} has no lowest version")
        print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
    main()
