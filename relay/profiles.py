"""Connection profiles of the settings, checked before anything refers to them."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from relay.catalog import PipelineRow
from relay.errors import ConfigurationError, DriverMissing, suggestion
from relay.options import declared_keys
from relay.registry import SINKS, SOURCES, options_of


def check_profiles(profiles: Mapping[str, Mapping[str, object]]) -> None:
    """Raise `ConfigurationError` for an unknown type or key, with the nearest one.

    A profile whose driver is not installed is left to the pipeline that refers to it.
    """
    for name, profile in profiles.items():
        type_ = profile.get("type")
        known = sorted({*SINKS, *SOURCES})
        if type_ not in known:
            raise ConfigurationError(
                f"backends.{name}.type is missing"
                if type_ is None
                else f"backends.{name}.type is {type_!r}, which is not a backend",
                remedy=suggestion(str(type_), known),
            )
        try:
            keys = keys_of(str(type_))
        except DriverMissing:
            continue
        for key in profile:
            if key not in keys:
                raise ConfigurationError(
                    f"backends.{name}.{key} is not a known key of {type_}",
                    remedy=suggestion(key, keys, otherwise="see docs/RELAY.md"),
                )


def row_to_try(name: str, profile: Mapping[str, object]) -> PipelineRow | None:
    """A pipeline whose sink can be connected to see whether a profile is right, and only that.

    None where a connection needs more than the profile says, or none is made. Raises
    `DriverMissing`.
    """
    type_ = str(profile["type"])
    if type_ not in SINKS:
        return None
    struct = options_of("sink", type_)
    keys = declared_keys(struct)
    required = {field.encode_name for field in msgspec.structs.fields(struct) if field.required}
    if required - profile.keys() or not any(key.connection for key in keys.values()):
        return None
    # Where messages go is the pipelines' business, and is not looked for.
    somewhere = {
        key.required_unless: "none"
        for key_name, key in keys.items()
        if key.required_unless and not {key_name, key.required_unless} & profile.keys()
    }
    return PipelineRow(
        name=f"profile {name}",
        direction="forward",
        enabled=False,
        config={
            "source_type": "outbox",
            "source": {"outbox": "none"},
            "sink_type": type_,
            "sink": {"profile": name, **somewhere},
        },
    )


def keys_of(type_: str) -> set[str]:
    """What a profile of that type may say: the keys of its sink and of its source."""
    return {"type"} | {
        field
        for role, table in (("sink", SINKS), ("source", SOURCES))
        if type_ in table
        for field in options_of(role, type_).__struct_encode_fields__
    }
