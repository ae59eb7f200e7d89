"""Writes the Homebrew formula of this version, for the tap grove/tap.

    scripts/formula.py dist/pgtrickle_relay-0.29.0.tar.gz > pgtrickle-relay.rb

The argument is the source distribution that the release publishes. Each dependency is the source
that the package index has for the version in `locks/relay.txt`, and its checksum is one of those
that stand there.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "locks" / "relay.txt"

# Homebrew has formulae of its own for these, and wants them used.
FORMULAE = {"certifi": "certifi", "cffi": "cffi", "pycparser": "cffi"}
DEPENDENCIES = ("certifi", "cffi", "libsodium", "libyaml", "python@3.13")

TEMPLATE = """\
class PgtrickleRelay < Formula
  include Language::Python::Virtualenv

  desc "{description}"
  homepage "{homepage}"
  url "{url}"
  sha256 "{sha256}"
  license "{license}"

  depends_on "rust" => :build
{dependencies}

{resources}

  def install
    ENV["SODIUM_INSTALL"] = "system"
    virtualenv_install_with_resources
    (buildpath/"local.yaml").write <<~YAML
      # @package _global_
      # What `brew services start pgtrickle-relay` runs with.
      postgres:
        url: postgresql://localhost:5432/postgres
    YAML
    (etc/"pgtrickle-relay/env").install "local.yaml"
  end

  service do
    run [opt_bin/"pgtrickle-relay", "run", "--config-dir", etc/"pgtrickle-relay", "+env=local"]
    keep_alive crashed: true
    log_path var/"log/pgtrickle-relay.log"
    error_log_path var/"log/pgtrickle-relay.log"
  end

  test do
    assert_match version.to_s, shell_output("#{{bin}}/pgtrickle-relay --version")
    assert_match "create", shell_output("#{{bin}}/pgtrickle-relay migrate --print")
    nowhere = "--postgres-url=postgresql://nobody@127.0.0.1:#{{free_port}}/nothing"
    assert_match "out of reach", shell_output("#{{bin}}/pgtrickle-relay #{{nowhere}} 2>&1", 3)
    %w[nats kafka redis sqs rabbitmq webhook].each do |type|
      profile = "'+backends.packaged={{type: #{{type}}, nonsense: 1}}'"
      assert_match "not a known key of #{{type}}",
                   shell_output("#{{bin}}/pgtrickle-relay #{{nowhere}} #{{profile}} 2>&1", 2)
    end
  end
end
"""

RESOURCE = """\
  resource "{name}" do
    url "{url}"
    sha256 "{sha256}"
  end"""


@dataclass(frozen=True)
class Resource:
    """A source distribution of the package index."""

    name: str
    url: str
    sha256: str


def resources() -> Iterator[Resource]:
    """What `locks/relay.txt` names, as sources, by name. Raises `SystemExit` where one has none."""
    lock = LOCK.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        resolved = Path(directory) / "pylock.toml"
        subprocess.run(
            [
                *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config"),
                *("--no-deps", "--universal", "--output-file", str(resolved), str(LOCK)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        packages = tomllib.loads(resolved.read_text(encoding="utf-8"))["packages"]
    for package in packages:
        name = package["name"]
        if name in FORMULAE:
            continue
        source = package.get("sdist")
        if source is None:
            raise SystemExit(f"{name} {package['version']} has no source on the package index")
        sha256 = source["hashes"]["sha256"]
        if f"--hash=sha256:{sha256}" not in lock:
            raise SystemExit(f"the source of {name} is another than the lock knows")
        yield Resource(name, source["url"], sha256)


def formula(source: Path) -> str:
    """The formula for that source distribution of ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    homepage, version = project["urls"]["Homepage"], project["version"]
    if source.name != f"pgtrickle_relay-{version}.tar.gz":
        raise SystemExit(f"{source.name} is not the source of {version}")
    by_name = sorted(resources(), key=lambda resource: resource.name)
    return TEMPLATE.format(
        description=described(project["description"]),
        homepage=homepage,
        url=f"{homepage}/releases/download/v{version}/{source.name}",
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        license=project["license"],
        dependencies="\n".join(f'  depends_on "{name}"' for name in DEPENDENCIES),
        resources="\n\n".join(RESOURCE.format_map(vars(resource)) for resource in by_name),
    )


def described(text: str) -> str:
    """As `brew audit` wants it: short, without a full stop, the verb without its s."""
    return re.sub(r"^Moves", "Move", text).partition(",")[0].rstrip(".")


def main() -> None:
    sys.stdout.write(formula(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
