"""Puts conf and sql inside the package of a wheel.

An editable installation finds them beside the package and gets no copy, which would go stale.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackageData(BuildHookInterface):
    """Build hook of the wheel target."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before each build; `version` is "editable" or "standard"."""
        if version == "standard":
            for directory in ("conf", "sql"):
                build_data["force_include"][directory] = f"relay/{directory}"
