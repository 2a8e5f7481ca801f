"""YAML files that are not a run's configuration, as frozen dataclasses: every mistake in one list."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any

from dist_t2i.configfile import convert
from dist_t2i.configschema import expected, field_types


def read_section(found: Any, section: type, prefix: str, problems: list[str], what: str = "a file") -> Any:
    """`section` from a mapping that YAML gave; what is wrong with it is appended to `problems`, a line each.

    Fields may be what a configuration's may be, further dataclasses, `dict[str, str]`, or dicts of dataclasses. What is
    wrong keeps its default; keys without a value do as well. `prefix` goes before the keys in messages.
    """
    if not isinstance(found, dict):
        problems.append(f"{prefix.rstrip('.') or what}: expected `key: value` lines")
        found = {}
    known, values = field_types(section), {}
    for name, value in found.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            problems.append(f"{prefix}{name}: unknown key; {hint}")
        elif dataclasses.is_dataclass(known[name]):
            values[name] = read_section(value, typing.cast(type, known[name]), f"{prefix}{name}.", problems)
        elif value is not None:
            values[name] = _value(f"{prefix}{name}", value, known[name], problems)
    return section(**{name: value for name, value in values.items() if value is not None})


def _value(key: str, value: Any, type_: Any, problems: list[str]) -> Any:
    if typing.get_origin(type_) is dict:
        return _mapping(key, value, typing.get_args(type_)[1], problems)
    try:
        return convert(value, type_)
    except ValueError as error:
        quotes = "; put it in quotes (YAML takes 12:00:00 for a number, too)" if type_ is str else ""
        problems.append(f"{key}: expected {expected(type_)}, got {error}{quotes}")
        return None


def _mapping(key: str, value: Any, inner: Any, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(inner) and isinstance(value, dict):
        sections = ((str(name), {} if one is None else one) for name, one in value.items())
        return {name: read_section(one, typing.cast(type, inner), f"{key}.{name}.", problems) for name, one in sections}
    if isinstance(value, dict) and all(isinstance(one, (str, int, float)) for one in value.values()):
        return {str(name): _text(one) for name, one in value.items()}
    problems.append(f"{key}: expected `name: value` lines")
    return None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
