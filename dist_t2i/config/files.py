"""Reads and writes configurations. YAML replaces defaults, and `section.key=value` replaces YAML.

Scalars follow YAML 1.2, unlike PyYAML's YAML 1.1: `1e-4` is a number, `off`, `no` and `y` are texts, `012` is twelve,
`12:30` is a text.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_t2i.config.fields import build, expected, field_types, keys, show
from dist_t2i.config.sections import RENAMED, Config
from dist_t2i.config.validation import problems_of
from dist_t2i.errors import ConfigError
from dist_t2i.utils.text import nearest


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain scalars."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}  # type: ignore[misc]

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(node.value).replace("_", "")
        return int(text, 0) if re.match(r"[-+]?0[xob]", text) else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or `_Loader` would not read as texts."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {  # type: ignore[misc]
        k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


_SIGNED, _DECIMAL = "-+0123456789", r"(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)"
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", _SIGNED),
    "float": (rf"[-+]?{_DECIMAL}([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", f"{_SIGNED}."),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


class _Reading:
    """The values of a file and of overrides, the origin of each value, and the problems."""

    def __init__(self, origin: str) -> None:
        self.origin, self.overriding, self.loader = origin, "", _Loader("")
        self.values: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.problems: list[tuple[float, str]] = []  # pairs of line number and text
        self.wrong: set[str] = set()

    def refuse(self, where: str, key: str, text: str) -> None:
        line = int(where.split()[1]) if where.startswith("line ") else math.inf
        self.problems.append((line, f"{where}: {key}: {text}" if key else f"{where}: {text}"))
        self.wrong.add(key)

    def place(self, node: yaml.Node) -> str:
        return self.overriding or f"line {node.start_mark.line + 1}"

    def current(self, key: str, where: str) -> str:
        """The present name of `key`. Warns once per process, on rank 0, if `key` is a name from an earlier version."""
        name = RENAMED.get(key, key)
        if name != key and key not in _WARNED and os.environ.get("RANK", "0") == "0":
            _WARNED.add(key)
            print(f"warning: {self.origin}: {where}: {key} has a new name, {name}", file=sys.stderr)
        return name

    def section(self, node: yaml.Node, section: type, prefix: str) -> None:
        if isinstance(node, yaml.ScalarNode) and self.loader.construct_object(node) is None:
            return  # an empty section, such as `data:`
        if isinstance(node, yaml.ScalarNode) and "kind" in field_types(section):
            self.entry(node, section, prefix, "kind", self.place(node))
            return  # `generator: attn` is short for `generator: {kind: attn}`
        if not isinstance(node, yaml.MappingNode):
            name = prefix.rstrip(".") or "a configuration"
            self.refuse(self.place(node), "", f"{name} is a section: expected `key: value` lines beneath it")
            return
        first: dict[str, str] = {}
        for key_node, _ in node.value:
            key, place = prefix + str(key_node.value), self.place(key_node)
            name = RENAMED.get(key, key)
            if name in first:
                self.refuse(place, key, f"given twice (first on {first[name]})")
            first.setdefault(name, place)
        self.loader.flatten_mapping(node)  # turns `<<: *other` into entries before the mapping's own entries
        for key_node, value_node in node.value:
            self.entry(value_node, section, prefix, str(key_node.value), self.place(key_node))

    def entry(self, node: yaml.Node, section: type, prefix: str, name: str, place: str) -> None:
        key = self.current(prefix + name, place)
        type_ = field_types(section).get(key.removeprefix(prefix))
        if type_ is None:
            self.refuse(place, key, f"unknown key{_suggestion(section, prefix, name)}")
        elif dataclasses.is_dataclass(type_):
            self.section(node, typing.cast(type, type_), f"{key}.")
        else:
            self.value(key, type_, self.loader.construct_object(node, deep=True), place)

    def value(self, key: str, type_: Any, raw: Any, where: str) -> None:
        try:
            self.values[key] = convert(raw, type_)
        except ValueError as error:
            self.refuse(where, key, f"expected {expected(type_)}, got {error}{_nearest_choice(raw, type_)}")
        self.where[key] = where

    def override(self, text: str) -> None:
        """Reads one `section.key=value`. A value is read literally if the key expects a text, and as YAML otherwise."""
        key, equals, value = text.partition("=")
        where = self.overriding = f"override {text!r}"
        if not equals:
            self.refuse(where, "", "expected section.key=value")
            return
        key = self.current(key.strip(), where)
        known = keys().get(key)
        if known is not None and (known.type is str or (known.type == str | tuple[str, ...] and "[" not in value[:1])):
            self.value(key, str, value, where)
            return
        if known is not None and typing.get_origin(known.type) is tuple and not value.lstrip().startswith("["):
            value = f"[{value}]"
        section, prefix, name = _section_of(key)
        if "." in name:
            self.refuse(where, key, f"unknown key{_suggestion(section, prefix, name)}")
            return
        try:
            node = yaml.compose(value, _Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
            self.entry(node, section, prefix, name, where)
        except yaml.YAMLError as error:
            self.refuse(where, key, f"the value is not YAML ({_yaml_reason(error)})")


_WARNED: set[str] = set()
"""Keys of earlier versions about which this process has warned."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a YAML file with overrides such as `train.global_batch=128`.

    Raises `ConfigError` with all problems: unknown keys, wrong types, values out of range, impossible combinations.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, (entry.name for entry in path.parent.glob("*")))
        hint = f"; did you mean {path.with_name(near)}?" if near else ""
        raise ConfigError(f"no configuration file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    return loads(text, overrides, str(path))


def loads(text: str, overrides: Sequence[str] = (), origin: str = "configuration") -> Config:
    """Like `load`, but reads YAML from `text`, which messages call `origin`."""
    reading = _Reading(origin)
    try:
        if node := yaml.compose(text, _Loader):
            reading.section(node, Config, "")
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {_yaml_reason(error)}") from None
    _complete(reading.values)
    for override in overrides:
        reading.override(override)
    config = build(reading.values)
    for involved, problem in problems_of(config):
        if reading.wrong.isdisjoint(involved):
            where = next((reading.where[key] for key in involved if key in reading.where), "default")
            reading.refuse(where, involved[0], problem)
    if reading.problems:  # problems of the file by line, then problems of overrides
        problems = [text for _, text in sorted(reading.problems, key=itemgetter(0))]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{origin}: {count}", *problems]), problems)
    return config


def _complete(values: dict[str, Any]) -> None:
    """Adds the keys that a recorded file lacks because its version did not know them, with what that version did.

    `dump` writes every key. So a section that has all keys except some with an `absent` value was recorded.
    """
    for name, key in keys().items():
        if key.absent is not None and name not in values:
            section = name.rpartition(".")[0]
            others = (other for other in keys().values() if other.name.rpartition(".")[0] == section)
            if all(other.name in values for other in others if other.absent is None):
                values[name] = key.absent


def parse(text: str) -> Any:
    """Plain data from YAML, with scalars read as in a configuration. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def dump(config: Config) -> str:
    """The complete configuration, defaults included, as YAML that `load` turns into an equal configuration."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _section_of(key: str) -> tuple[type, str, str]:
    """The innermost section of a dotted key, the section's prefix, and the rest of the key (dotted if unknown)."""
    section: type = Config
    prefix, rest = "", key
    while "." in rest and dataclasses.is_dataclass(inner := field_types(section).get(rest.partition(".")[0])):
        parent, _, rest = rest.partition(".")
        section, prefix = typing.cast(type, inner), f"{prefix}{parent}."
    return section, prefix, rest


def _suggestion(section: type, prefix: str, name: str) -> str:
    """A hint such as `; did you mean data.image_size?`, with a similar key of this section or of another section."""
    leaf = name.rpartition(".")[2]
    same_word = next((key for key in keys() if key.rpartition(".")[2] == leaf), "")
    near = nearest(name, field_types(section))
    if suggestion := (prefix + near if near else same_word or nearest(prefix + name, keys())):
        return f"; did you mean {suggestion}?"
    return f"; {prefix.rstrip('.') or 'the file'} has {', '.join(field_types(section))}"


def _nearest_choice(raw: Any, type_: Any) -> str:
    """A hint such as `; did you mean bf16?` if `raw` is similar to a text that `type_` allows, otherwise empty."""
    is_choice = typing.get_origin(type_) is Literal and isinstance(raw, str)
    near = nearest(raw, map(str, typing.get_args(type_))) if is_choice else ""
    return f"; did you mean {near}?" if near else ""


def convert(value: Any, type_: Any) -> Any:
    """A value from YAML as `type_`, where 1e6 is a valid int. Raises ValueError with a description of a wrong value."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and (arguments[-1] is Ellipsis or len(value) == len(arguments)):
            wanted: Iterable[Any] = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
            return tuple(convert(item, item_type) for item, item_type in zip(value, wanted, strict=True))
    elif origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return convert(value, choice)
            except ValueError:
                continue
    elif type_ is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type_ is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif type(value) is type_:
        return value
    raise ValueError(_describe(value))


def _describe(value: Any) -> str:
    match value:
        case None | dict():
            return "nothing" if value is None else "a section"
        case bool():
            return f"{str(value).lower()} (write a text in quotes)"
        case int() | float():
            return f"the number {value}"
        case list():
            return f"a list of {len(value)}"
    return f"the text {value!r}" if isinstance(value, str) else f"a {type(value).__name__}"


def read_section(raw: Any, section: type, prefix: str, problems: list[str], what: str = "a file") -> Any:
    """Build `section` from a mapping that was read from YAML; appends a line to `problems` for each mistake.

    The type of a field is a type of configuration keys, a dataclass, `dict[str, str]`, or a dict of dataclasses. Keys
    without a value or with a wrong value keep their default. `prefix` precedes the keys in messages.
    """
    if not isinstance(raw, dict):
        problems.append(f"{prefix.rstrip('.') or what}: expected `key: value` lines")
        raw = {}
    known, values = field_types(section), {}
    for name, value in raw.items():
        if name not in known:
            near = nearest(str(name), known)
            hint = f"did you mean {prefix}{near}?" if near else f"known are {', '.join(known)}"
            problems.append(f"{prefix}{name}: unknown key; {hint}")
        elif dataclasses.is_dataclass(known[name]):
            values[name] = read_section(value, typing.cast(type, known[name]), f"{prefix}{name}.", problems)
        elif value is not None:
            values[name] = _value(f"{prefix}{name}", value, known[name], problems)
    return section(**{name: value for name, value in values.items() if value is not None})


def _value(key: str, value: Any, type_: Any, problems: list[str]) -> Any:
    if typing.get_origin(type_) is not dict:
        try:
            return convert(value, type_)
        except ValueError as error:
            quotes = "; put the text in quotes, because YAML reads 12:00:00 as a number" if type_ is str else ""
            problems.append(f"{key}: expected {expected(type_)}, got {error}{quotes}")
            return None
    inner = typing.cast(type, typing.get_args(type_)[1])
    if isinstance(value, dict) and dataclasses.is_dataclass(inner):
        entries = {str(name): {} if entry is None else entry for name, entry in value.items()}
        return {name: read_section(entry, inner, f"{key}.{name}.", problems) for name, entry in entries.items()}
    if isinstance(value, dict) and all(isinstance(entry, (str, int, float)) for entry in value.values()):
        return {str(name): show(entry) if isinstance(entry, bool) else str(entry) for name, entry in value.items()}
    problems.append(f"{key}: expected `name: value` lines")
    return None
