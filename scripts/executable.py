"""Makes the executable for this machine: `dist/pgtrickle-relay-VERSION-SYSTEM-ARCHITECTURE.tar.gz`.

A directory with the program, Python and every backend, of the same locked files as the image. A
directory and not one file: what unpacks itself at each start needs a place that it may write and
execute, and leaves a second process behind when the first is killed.

    scripts/executable.py [--python PYTHON]

`--python` is the one that goes into it. It needs to have its library shared, as those of Debian, of
python.org and of uv are, and decides with the machine how old a system may be that runs the result.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
NAME = "pgtrickle-relay"

# How others name what `platform` finds.
SYSTEMS = {"Linux": "linux", "Darwin": "macos"}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def archive_name() -> str:
    """Without the suffix."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    system, architecture = SYSTEMS[platform.system()], ARCHITECTURES[platform.machine()]
    return f"{NAME}-{project['version']}-{system}-{architecture}"


def modules_around_compiled(app: Path) -> Iterator[str]:
    """Of each package with compiled modules, everything: what those import can't be read."""
    for top in {path.relative_to(app).parts[0] for path in app.rglob("*.so")}:
        inside = (app / top).rglob("*") if (app / top).is_dir() else [app / top]
        for path in inside:
            if path.suffix in (".py", ".so"):
                parts = path.relative_to(app).with_name(path.name.partition(".")[0]).parts
                yield ".".join(parts).removesuffix(".__init__")


def build(work: Path, python: str) -> Path:
    """The directory of the program, made in `work`."""
    app, tools = work / "app", work / "tools"
    bundle = [sys.executable, str(ROOT / "scripts" / "bundle.py"), str(app)]
    subprocess.run([*bundle, "--python", python], check=True)
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", python, str(tools)], check=True)
    subprocess.run(
        [
            *(*uv, "pip", "install", "--quiet", "--no-config", "--no-deps", "--require-hashes"),
            *("--python", str(tools / "bin" / "python"), "-r", str(ROOT / "locks" / "build.txt")),
        ],
        check=True,
    )
    subprocess.run(
        [
            *(str(tools / "bin" / "python"), "-m", "PyInstaller"),
            *("--onedir", "--name", NAME, "--noconfirm", "--log-level", "WARN"),
            *("--distpath", str(work), "--workpath", str(work / "work"), "--specpath", str(work)),
            # Backends are imported by name, Hydra finds its own plugins and settings by looking.
            *("--collect-submodules", "relay", "--collect-data", "relay"),
            *("--collect-submodules", "hydra", "--collect-data", "hydra"),
            *(f"--hidden-import={name}" for name in modules_around_compiled(app)),
            # The versions that the relay tells others, and the licenses of all that is in it.
            *(f"--add-data={path}:{path.name}" for path in app.glob("*.dist-info")),
            str(app / "relay" / "__main__.py"),
        ],
        check=True,
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(app)},
    )
    return work / NAME


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the executable for this machine.")
    parser.add_argument("--python", default=sys.executable)
    python = shutil.which(parser.parse_args().python)
    if python is None:
        parser.error("there is no such Python")
    name = archive_name()
    with tempfile.TemporaryDirectory() as directory:
        program = build(Path(directory), python)
        shutil.copy(ROOT / "LICENSE", program)
        smoke = [sys.executable, str(ROOT / "scripts" / "smoke.py"), str(program / NAME)]
        subprocess.run(smoke, check=True)
        DIST.mkdir(exist_ok=True)
        with tarfile.open(DIST / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(program, arcname=name)
    print(DIST / f"{name}.tar.gz")


if __name__ == "__main__":
    main()
