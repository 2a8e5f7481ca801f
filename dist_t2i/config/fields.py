"""The keys of a configuration: dotted names, types, defaults, ranges, and documentation.

The documentation is read from the code of the sections, because the strings beneath fields do not exist at run time.
This module does not import torch, so that `--help-config` answers at once.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from dist_t2i.config.sections import Config
from dist_t2i.models.config import default_channels
from dist_t2i.utils.settings import NOT_NEGATIVE, Bounds, Resume


@dataclasses.dataclass(frozen=True)
class Key:
    """One leaf of the configuration, such as `data.image_size`."""

    name: str
    type: Any
    default: Any
    doc: str
    bounds: Bounds  # for a number, or for each number of a tuple
    resume: Resume
    absent: Any  # the value in recorded files that lack the key; None: the default
    earlier: Any  # the default of earlier versions; None: the default never changed


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """The resolved types of a config dataclass by field name, in order."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@functools.cache
def keys() -> dict[str, Key]:
    """Every `Key` by its dotted name, in the order of the code."""
    return {key.name: key for key in _keys(Config(), "", Resume.CHECKED)}


def _keys(section: Any, prefix: str, inherited: Resume) -> Iterator[Key]:
    class_: type = type(section)
    types_of, docs = field_types(class_), _docs(inspect.getmodule(class_)).get(class_.__name__, {})
    for field in dataclasses.fields(section):
        name, value = field.name, getattr(section, field.name)
        resume = field.metadata.get("resume") or inherited
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{name}.", resume)
        else:
            bounds = field.metadata.get("bounds", NOT_NEGATIVE)
            doc, absent, earlier = docs.get(name, ""), field.metadata.get("absent"), field.metadata.get("earlier")
            yield Key(prefix + name, types_of[name], value, doc, bounds, resume, absent, earlier)


@functools.cache
def _docs(module: Any) -> dict[str, dict[str, str]]:
    """The strings beneath fields in a module, by class name and then by field name."""
    docs: dict[str, dict[str, str]] = {}
    classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    for class_, pair in ((node.name, pair) for node in classes for pair in itertools.pairwise(node.body)):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs.setdefault(class_, {})[name] = inspect.cleandoc(text)
    return docs


def expected(type_: Any) -> str:
    """A description of the values of `type_` for an error message, such as `a whole number` or `one of none, cpu`."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        many = {int: "whole numbers", float: "numbers", str: "texts"}.get(arguments[0], "values")
        return f"a list of {many}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {many}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(choice) for choice in arguments)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}[type_]


def show(value: Any) -> str:
    """A default value as YAML text."""
    if isinstance(value, tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value else repr(value).replace("'", '"')


def reference(width: int = 100) -> str:
    """The text of `--help-config`: each key with its default, type and documentation."""
    lines = ["Keys of a configuration file, with their defaults. The command line also accepts section.key=value."]
    section = ""
    for key in keys().values():
        head, _, leaf = key.name.rpartition(".")
        if head != section:
            lines += ["", f"{head}:"]
            section = head
        lines.append(f"  {leaf}: {show(key.default)}    ({expected(key.type)})")
        lines += textwrap.wrap(key.doc, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def flatten(config: Config) -> dict[str, Any]:
    """The values of a configuration by dotted key."""
    return {name: value_of(config, name) for name in keys()}


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def build(values: Mapping[str, Any]) -> Config:
    """A configuration from values by dotted key, which are not checked. Keys without a value keep their defaults.

    The default numbers of channels depend on the size of the pictures.
    """
    size = values.get("data.image_size")
    if isinstance(size, int) and size >= 4:
        channels = default_channels(size)
        values = {"model.generator.channels": channels, "model.discriminator.channels": channels[::-1], **values}
    return _build(Config, "", values)


def _build(section: type, prefix: str, values: Mapping[str, Any]) -> Any:
    arguments = {}
    for name, type_ in field_types(section).items():
        if dataclasses.is_dataclass(type_):
            arguments[name] = _build(typing.cast(type, type_), f"{prefix}{name}.", values)
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    return section(**arguments)
