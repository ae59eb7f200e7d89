"""How large the image is, compressed as a registry keeps it; ends with 1 above 50 MB.

    scripts/image-size                   of the layer that the Dockerfile adds, built here from the
                                         same lock by the same script, and of the base below it
    scripts/image-size image.tar         of an image that was built, for each platform in it
                                         (docker buildx build --output type=oci,dest=image.tar)

Without an image the layer is also looked at: every backend is imported from it, SQS and STS give
their clients, and without a server the relay ends with 3 and one line. `PYTHON` names the Python to
build for, by default the one that runs this; the image has 3.13, and what differs is little.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BOUND_BYTES = 50_000_000

# gcr.io/distroless/python3-debian13:nonroot, one gzipped layer for each Debian package that its
# build files list (static, base, cc and python3), as trixie had them in November 2026.
BASE_BYTES: Mapping[str, int] = {"x86_64": 22_463_768, "aarch64": 22_530_529}

# Files of the checkout, and where the first stage puts them.
COPIED = re.compile(r"^COPY ((?!--)\S.*) (\S+)$", re.MULTILINE)

# The index of an image also lists what attests it, under this platform.
NO_PLATFORM = "unknown"


def layer(directory: Path, python: str) -> Path:
    """The layer that the Dockerfile copies into the image, of what it copies into its build."""
    for names, into in COPIED.findall((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        for name in map(Path, names.split()):
            target = directory / "build" / (name.name if into == "./" else into)
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, target)
    bundle, app = directory / "build" / "scripts" / "bundle.py", directory / "app"
    subprocess.run([sys.executable, str(bundle), str(app), "--python", python], check=True)
    return app


def compressed_bytes(directory: Path) -> int:
    """What a layer with this directory takes in a registry."""
    with tempfile.TemporaryFile() as file:
        with (
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w|") as layer_tar,
        ):
            layer_tar.add(directory, arcname="app")
        return file.tell()


def look(app: Path, python: str) -> None:
    """Raises `SystemExit` where the layer is not whole."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(app),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PGTRICKLE_RELAY_POSTGRES_URL": "postgresql://nobody@127.0.0.1:1/nothing",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *arguments],
            env=environment,
            cwd=app.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    imported = run(str(ROOT / "scripts" / "import_backends.py"))
    if imported.returncode != 0:
        raise SystemExit(f"the layer is not whole: {imported.stderr}")
    alone = run("-m", "relay")
    if alone.returncode != 3 or len(alone.stderr.splitlines()) != 1:
        raise SystemExit(f"without a server it ended with {alone.returncode}: {alone.stderr}")


def image_bytes(image: Path) -> dict[str, int]:
    """The compressed layers of an image in the OCI layout, by platform."""
    with tarfile.open(image) as archive:

        def read(name: str) -> Any:
            file = archive.extractfile(name)
            return json.load(file) if file is not None else {}

        def manifests(index: Any) -> dict[str, int]:
            found: dict[str, int] = {}
            for entry in index["manifests"]:
                content = read(f"blobs/{entry['digest'].replace(':', '/')}")
                if "manifests" in content:
                    found |= manifests(content)
                    continue
                described = entry.get("platform") or {}
                architecture = described.get("architecture", platform.machine())
                if architecture != NO_PLATFORM:
                    found[architecture] = sum(layer["size"] for layer in content["layers"])
            return found

        return manifests(read("index.json"))


def report(name: str, size: int) -> bool:
    """Say it, and whether it is small enough."""
    is_small = size <= BOUND_BYTES
    verdict = "below" if is_small else "ABOVE"
    print(f"{name}: {size / 1e6:.1f} MB, {verdict} {BOUND_BYTES / 1e6:.0f} MB")
    return is_small


def main() -> int:
    if len(sys.argv) > 1:
        sizes = image_bytes(Path(sys.argv[1]))
        if not sizes:
            raise SystemExit(f"{sys.argv[1]} has no image in it")
        are_small = [report(name, size) for name, size in sizes.items()]
        return 0 if all(are_small) else 1
    python = os.environ.get("PYTHON", sys.executable)
    machine = platform.machine()
    base = BASE_BYTES.get("aarch64" if machine == "arm64" else machine)
    if base is None:
        raise SystemExit(f"no image is made for {machine}")
    with tempfile.TemporaryDirectory() as directory:
        app = layer(Path(directory), python)
        look(app, python)
        size = compressed_bytes(app)
    print(f"base {base / 1e6:.1f} MB and layer {size / 1e6:.1f} MB")
    return 0 if report(machine, base + size) else 1


if __name__ == "__main__":
    sys.exit(main())
