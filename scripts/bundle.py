"""Installs the relay with every backend into a directory, as locked, without what it never reads.

What the image holds, what its size is measured of, and what executables are made of:

    scripts/bundle.py DIRECTORY [--python PYTHON]

for that Python, by default the one that runs this. Each file has the hash that `locks/relay.txt`
gives it; what builds libraries without a wheel, and the relay itself, has those of
`locks/build.txt`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELAY_LOCK = ROOT / "locks" / "relay.txt"
BUILD_LOCK = ROOT / "locks" / "build.txt"

# Python alone on the index.
WITHOUT_WHEEL = ("antlr4-python3-runtime", "nkeys")

# What compilers and type checkers read, and nobody who runs the relay.
FOR_BUILDING = {".c", ".cpp", ".h", ".pxd", ".pxi", ".pyi", ".pyx"}

# A queue, and the roles by which a pipeline reaches it.
AWS_SERVICES = {"sqs", "sts"}

# The language of conditions imports its own command line, which nobody calls: these parse its
# arguments then, and the lexers of Pygments, below, color its output.
COMMAND_LINE_OF_CEL = ("pydantic", "pydantic_core")


def install(directory: Path, python: str) -> None:
    """The relay and its dependencies, each file checked against its hash."""
    into = [
        *(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-config", "--no-deps"),
        *("--python", python, "--target", str(directory)),
        *("--build-constraint", str(BUILD_LOCK)),
    ]
    wheels = ["--only-binary", ":all:"]
    for name in WITHOUT_WHEEL:
        wheels += ["--no-binary", name]
    subprocess.run([*into, *wheels, "--require-hashes", "-r", str(RELAY_LOCK)], check=True)
    # A build that uv remembers is of the checkout as it was then.
    subprocess.run([*into, "--refresh-package", "pgtrickle-relay", str(ROOT)], check=True)


def unread(directory: Path) -> Iterator[Path]:
    """Files and directories that the relay does without."""
    for name in ("bin", "boto3/data", "boto3/examples", *COMMAND_LINE_OF_CEL):
        yield directory / name
    for path in (directory / "botocore" / "data").iterdir():
        if path.is_dir() and path.name not in AWS_SERVICES:
            yield path
    for path in (directory / "pygments" / "lexers").glob("[a-z]*.py"):
        yield path
    for path in directory.rglob("*"):
        if path.suffix in FOR_BUILDING or (path.name == "tests" and path.is_dir()):
            yield path


def prune(directory: Path) -> None:
    """Remove what is unread, and from compiled modules the names that only debuggers look up."""
    for path in list(unread(directory)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if sys.platform == "linux":
        modules = [str(path) for path in directory.rglob("*.so")]
        subprocess.run(["strip", "--strip-unneeded", *modules], check=True)


def compile_bytecode(directory: Path, python: str) -> None:
    """Beside each module, valid whatever the times of the files: the place is never written to."""
    options = ["-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([python, "-m", "compileall", *options, str(directory)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Installs the relay, as locked and pruned.")
    parser.add_argument("directory", type=Path, help="must not exist, or be empty")
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    if arguments.directory.is_dir() and any(arguments.directory.iterdir()):
        parser.error(f"{arguments.directory} is not empty")
    install(arguments.directory, arguments.python)
    prune(arguments.directory)
    compile_bytecode(arguments.directory, arguments.python)


if __name__ == "__main__":
    main()
