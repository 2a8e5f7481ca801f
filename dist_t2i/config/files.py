"""Configurations as files: defaults <- YAML <- `section.key=value`, every problem in one report, and back to YAML.

Numbers, booleans and texts are read as YAML 1.2 has them, where YAML 1.1 (PyYAML's habit) surprises: `1e-4` is a
number, `off`, `no` and `y` are texts, `012` is twelve, `12:30` is a text.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_t2i.config.fields import build, expected, field_types, keys
from dist_t2i.config.sections import Config
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
    """Quotes what either YAML 1.1 or our reader would take for something else than a text."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {  # type: ignore[misc]
        k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


@dataclasses.dataclass(frozen=True)
class _Problem:
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"

    def order(self) -> tuple[int, int]:
        """Lines of the file first and in order, then overrides as they were given."""
        return (0, int(self.where.split()[1])) if self.where.startswith("line ") else (1, 0)


class _Reading:
    """Values collected from a file and overrides, with where each came from and what is wrong with it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.problems: list[_Problem] = []
        self.wrong: set[str] = set()

    def refuse(self, where: str, key: str, text: str) -> None:
        self.problems.append(_Problem(where, f"{key}: {text}" if key else text))
        self.wrong.add(key)

    def section(self, loader: _Loader, node: yaml.Node, section: type, prefix: str, where: str = "") -> None:
        """Take the keys of one mapping node; `where` replaces the line number (overrides have none)."""
        if isinstance(node, yaml.ScalarNode) and loader.construct_object(node) is None:
            return  # `data:` with nothing beneath it
        if isinstance(node, yaml.ScalarNode) and "kind" in field_types(section):
            self.entry(loader, node, section, prefix, "kind", where or _line(node), where)
            return  # `generator: attn` is short for `generator: {kind: attn}`
        if not isinstance(node, yaml.MappingNode):
            name = prefix.rstrip(".") or "a configuration"
            self.refuse(where or _line(node), "", f"{name} is a section: expected `key: value` lines beneath it")
            return
        first: dict[str, str] = {}
        for key_node, _ in node.value:
            name, place = str(key_node.value), where or _line(key_node)
            if name in first:
                self.refuse(place, prefix + name, f"given twice (first on {first[name]})")
            first.setdefault(name, place)
        loader.flatten_mapping(node)  # `<<: *other` becomes entries ahead of the mapping's own
        for key_node, value_node in node.value:
            self.entry(loader, value_node, section, prefix, str(key_node.value), where or _line(key_node), where)

    def entry(
        self, loader: _Loader, node: yaml.Node, section: type, prefix: str, name: str, place: str, where: str
    ) -> None:
        type_ = field_types(section).get(name)
        if type_ is None:
            self.refuse(place, prefix + name, f"unknown key{_suggestion(section, prefix, name)}")
        elif dataclasses.is_dataclass(type_):
            self.section(loader, node, typing.cast(type, type_), f"{prefix}{name}.", where)
        else:
            self.value(prefix + name, type_, loader.construct_object(node, deep=True), place)

    def value(self, key: str, type_: Any, raw: Any, where: str) -> None:
        try:
            self.values[key] = convert(raw, type_)
        except ValueError as error:
            self.refuse(where, key, f"expected {expected(type_)}, got {error}{_nearest_choice(raw, type_)}")
        self.where[key] = where

    def override(self, text: str) -> None:
        """Take one `section.key=value`; the value is YAML, or the text as it stands where a text is expected."""
        key, equals, value = text.partition("=")
        key, where = key.strip(), f"override {text!r}"
        if not equals:
            self.refuse(where, "", "expected section.key=value")
            return
        known = keys().get(key)
        if known is not None and (known.type is str or (known.type == str | tuple[str, ...] and "[" not in value[:1])):
            self.value(key, str, value, where)
            return
        if known is not None and typing.get_origin(known.type) is tuple and not value.lstrip().startswith("["):
            value = f"[{value}]"
        *parents, name = key.split(".")
        section: type = Config
        for depth, parent in enumerate(parents):
            inner = field_types(section).get(parent)
            if not dataclasses.is_dataclass(inner):
                prefix = "".join(f"{p}." for p in parents[:depth])
                leaf = ".".join([*parents[depth:], name])
                self.refuse(where, key, f"unknown key{_suggestion(section, prefix, leaf)}")
                return
            section = typing.cast(type, inner)
        try:
            loader = _Loader(value)
            node = loader.get_single_node() or yaml.ScalarNode("tag:yaml.org,2002:null", "")
            self.entry(loader, node, section, "".join(f"{p}." for p in parents), name, where, where)
        except yaml.YAMLError as error:
            self.refuse(where, key, f"the value is not YAML ({_yaml_reason(error)})")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a YAML file with overrides such as `train.global_batch=128` on top.

    Raises `ConfigError` with every problem at once: unknown keys with their nearest match and line, wrong types,
    values out of range, combinations that cannot work.
    """
    return _load(_read(Path(path)), str(path), overrides)


def loads(text: str, overrides: Sequence[str] = (), source: str = "configuration") -> Config:
    """As `load`, from YAML text; `source` heads the error report."""
    return _load(text, source, overrides)


def parse(text: str) -> Any:
    """Plain data from YAML, with numbers and texts as in a configuration. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def check(config: Config) -> None:
    """Raise `ConfigError` if a value is out of range or a combination cannot work."""
    problems = [f"{found[0]}: {text}" for found, text in problems_of(config)]
    if problems:
        raise _error("configuration", problems)


def dump(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load` turns into an equal one."""
    plain = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _load(text: str, source: str, overrides: Sequence[str]) -> Config:
    reading = _Reading()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            reading.section(loader, node, Config, "")
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {_yaml_reason(error)}") from None
    for override in overrides:
        reading.override(override)
    config = build(reading.values)
    for involved, problem in problems_of(config):
        if reading.wrong.isdisjoint(involved):
            place = next((reading.where[key] for key in involved if key in reading.where), "default")
            reading.refuse(place, involved[0], problem)
    if reading.problems:
        raise _error(source, [str(problem) for problem in sorted(reading.problems, key=_Problem.order)])
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, (entry.name for entry in path.parent.glob("*")))
        hint = f"; did you mean {path.with_name(near)}?" if near else ""
        raise ConfigError(f"no configuration file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None


def _error(source: str, problems: Sequence[str]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems), problems)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _suggestion(section: type, prefix: str, name: str) -> str:
    """`; did you mean data.image_size?`: a key of this section, or the same word in another one."""
    leaf = name.rpartition(".")[2]
    same_word = next((key for key in keys() if key.rpartition(".")[2] == leaf), "")
    near = nearest(name, field_types(section))
    if suggestion := (prefix + near if near else same_word or nearest(prefix + name, keys())):
        return f"; did you mean {suggestion}?"
    known = ", ".join(field_types(section))
    return f"; {prefix.rstrip('.') or 'the file'} has {known}"


def _nearest_choice(raw: Any, type_: Any) -> str:
    """`; did you mean bf16?` where one of a few texts was expected and `raw` is close to one."""
    if typing.get_origin(type_) is not Literal or not isinstance(raw, str):
        return ""
    near = nearest(raw, map(str, typing.get_args(type_)))
    return f"; did you mean {near}?" if near else ""


def convert(value: Any, type_: Any) -> Any:
    """A value from YAML, `value` as `type_`; `ValueError(what it is instead)` if it is not one. 1e6 counts as a whole number."""
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
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (write it in quotes if it is a text)"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "a section" if isinstance(value, dict) else f"a {type(value).__name__}"


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
            near = nearest(str(name), known)
            hint = f"did you mean {prefix}{near}?" if near else f"known are {', '.join(known)}"
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
