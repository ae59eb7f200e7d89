"""Connection profiles of the settings, checked before anything refers to them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from relay.errors import ConfigurationError, DriverMissing
from relay.registry import SINKS, SOURCES, options_of


def check_profiles(profiles: Mapping[str, Mapping[str, object]]) -> None:
    """Raise `ConfigurationError` for an unknown type or key, with the nearest one.

    A profile whose driver is not installed is left to the pipeline that refers to it.
    """
    for name, profile in profiles.items():
        type_ = profile.get("type")
        known = sorted({*SINKS, *SOURCES})
        if type_ not in known:
            near = get_close_matches(str(type_), known, n=1)
            raise ConfigurationError(
                f"backends.{name}.type is missing"
                if type_ is None
                else f"backends.{name}.type is {type_!r}, which is not a backend",
                remedy=f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}",
            )
        try:
            keys = keys_of(str(type_))
        except DriverMissing:
            continue
        for key in profile:
            if key not in keys:
                near = get_close_matches(key, keys, n=1)
                raise ConfigurationError(
                    f"backends.{name}.{key} is not a known key of {type_}",
                    remedy=f"did you mean {near[0]}?" if near else "see docs/RELAY.md",
                )


def keys_of(type_: str) -> set[str]:
    """What a profile of that type may say: the keys of its sink and of its source."""
    return {"type"} | {
        field
        for role, table in (("sink", SINKS), ("source", SOURCES))
        if type_ in table
        for field in options_of(role, type_).__struct_encode_fields__
    }
