"""Locks what the image, the executables and the formula are made of, each file with its hash.

`locks/relay.txt` has the relay's dependencies with every extra but `demo` and `dev`, for every
platform and Python that the relay runs on; `locks/build.txt` what builds them.

    scripts/lock.py              after a change of dependencies; what is locked stays where it may
    scripts/lock.py --upgrade    the newest of everything
    scripts/lock.py --check      ends with 1 where pyproject.toml asks for something else by now
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELAY = ROOT / "locks" / "relay.txt"
BUILD = ROOT / "locks" / "build.txt"
LOWEST_PYTHON = "3.11"

# hatchling builds the relay, setuptools the libraries without a wheel, PyInstaller executables.
BUILDERS = ("hatchling", "setuptools", "uv", "pyinstaller")


def digest() -> str:
    """Of everything in pyproject.toml that a lock depends on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {name: extras[name] for name in extras if name not in ("demo", "dev")}
    text = json.dumps([project["dependencies"], wanted, BUILDERS], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def header() -> str:
    """The first line of each lock."""
    return f"# Written by scripts/lock.py, for the dependencies {digest()[:16]}\n"


def stale() -> list[str]:
    """The locks that were made for other dependencies, or are missing."""
    return [
        str(lock.relative_to(ROOT))
        for lock in (RELAY, BUILD)
        if not lock.exists() or not lock.read_text(encoding="utf-8").startswith(header())
    ]


def write(lock: Path, arguments: list[str], requirements: str = "") -> None:
    """Resolve and write one lock."""
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config"),
            *("--universal", "--python-version", LOWEST_PYTHON, "--generate-hashes"),
            *("--no-annotate", "--no-header", "--output-file", str(lock), *arguments),
        ],
        input=requirements,
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lock.write_text(header() + lock.read_text(encoding="utf-8"), encoding="utf-8")


def main() -> int:
    if "--check" in sys.argv[1:]:
        for name in stale():
            print(f"{name} is not what pyproject.toml asks for: run scripts/lock.py")
        return 1 if stale() else 0
    upgrade = sys.argv[1:]
    RELAY.parent.mkdir(exist_ok=True)
    write(RELAY, [*upgrade, "--extra", "all", str(ROOT / "pyproject.toml")])
    write(BUILD, [*upgrade, "-"], "\n".join(BUILDERS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
