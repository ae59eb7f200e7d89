"""`scripts/setup` with uv on the path, as on a machine without pip or Python's venv module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relay import __version__
from tests.servers.process import REPOSITORY


@pytest.mark.slow
def test_uv_makes_the_environment_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").symlink_to(Path(sys.executable).parent / "uv")
    venv = tmp_path / "venv"

    made = subprocess.run(
        [REPOSITORY / "scripts" / "setup", "webhook"],
        env={
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "VENV": str(venv),
            # Whatever falls back on pip fails.
            "PIP_NO_INDEX": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert (made.returncode, made.stdout) == (0, f"{venv}\n"), made.stderr
    said = subprocess.run(
        [venv / "bin" / "pgtrickle-relay", "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"pgtrickle-relay {__version__}\n"
