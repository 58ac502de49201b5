"""Strict YAML, and the check of what it holds against the types of a dataclass.

Of YAML's scalars true, false, null and decimal numbers such as `1e-3` are read as what they say,
all others, `010`, `yes` and `0x1F` too, are text. Repeated keys,
aliases and tags are refused, so a file cannot run code, and cannot grow when it is read. No text of
it may hold a control character: it may become a path, a name or a line of a script.
"""

import copy
import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml

from common.running.errors import CONTROL, ConfigError, listed, regular

LARGEST_FILE = 65536  # characters; no config comes near it
NO_CONTROL = "holds a control character, such as a line break, which no path and no name may"

FilePath = typing.NewType("FilePath", str)  # text in which a leading `~` is expanded


@dataclass(frozen=True)
class Range:
    """Allowed interval of a number; both ends belong to it unless `open` is set."""

    low: float = float("-inf")
    high: float = float("inf")
    open: bool = False

    def __contains__(self, x):
        return self.low < x < self.high if self.open else self.low <= x <= self.high

    def __str__(self):
        if self.high == float("inf"):
            return f"above {self.low:g}" if self.open else f"of at least {self.low:g}"
        return f"{'inside' if self.open else 'from'} {self.low:g} to {self.high:g}"


Count = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Proportion = Annotated[float, Range(0, 1)]
InnerProportion = Annotated[float, Range(0, 1, open=True)]
Share = Annotated[float, Range(1e-6, 1)]  # of something that must not be empty
Momentum = Annotated[float, Range(0, 0.9999)]


class StrictLoader(yaml.SafeLoader):
    """SafeLoader with few kinds of scalars, no aliases, no tags, no repeated keys."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        for what in ("anchor", "tag"):
            if getattr(event, what, None) not in (None, "!"):
                raise yaml.MarkedYAMLError(
                    problem=f"a YAML {what} is not allowed here", problem_mark=event.start_mark
                )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                problem = f"key '{key.value}' stands twice, first in line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[str(key.value)] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


NO_LEADING_ZERO = r"(?![-+]?0[0-9])"
for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", NO_LEADING_ZERO + r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        NO_LEADING_ZERO + r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
):
    _regex = re.compile(f"^(?:{_pattern})$")
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regex, list(_first))


def parse_yaml(text, where):
    """text -> plain Python data. Raises ConfigError naming `where` and the line."""
    return copy.deepcopy(_parsed(text, where))


@functools.lru_cache(maxsize=512)  # a grid asks for each of its few texts a hundred times
def _parsed(text, where):
    if len(text) > LARGEST_FILE:
        raise ConfigError(f"{where}: larger than 64 KB, which no config is")
    try:
        loader = StrictLoader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(f"{where}, line {mark.line + 1}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: not readable as YAML ({type(error).__name__})") from None
    held = [
        f"{key}{text[:80]!r} {NO_CONTROL}" for key, text in _texts(data) if CONTROL.search(text)
    ]
    if held:
        raise ConfigError(listed(where, held))
    return data


def _texts(data, path=""):
    """(`section.key: `, text) of every text in nested data; a key is a text of what is above it."""
    if isinstance(data, str):
        yield CONTROL.sub("?", f"{path}: " if path else ""), data
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value, path)
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from _texts(key, path)
            yield from _texts(value, f"{path}.{key}" if path else str(key))


def parse_override(override):
    """`section.key=value` -> (`section.key`, value): YAML, but that ` #` is text, not a comment."""
    if CONTROL.search(override):
        raise ConfigError(f"override {override[:80]!r} {NO_CONTROL}")
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected section.key=value")
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in override)  # private use
    try:
        value = parse_yaml(text.replace("#", mark), f"override '{override}'")
    except ConfigError as error:
        told = str(error).replace(mark, "#").replace(repr(mark)[1:-1], "#")
        raise ConfigError(told) from None
    return key, json.loads(json.dumps(value, ensure_ascii=False).replace(mark, "#"))


def read_yaml(path):
    """A YAML file -> plain Python data. Raises ConfigError naming the file."""
    try:
        return parse_yaml(Path(regular(os.path.expanduser(path))).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None


def _describe(kind):
    """A type in the words of a config's author."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        base, limits = typing.get_args(kind)
        return f"{_describe(base)} {limits}"
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_describe(arm) for arm in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true | false"}
    names |= {str: "text", FilePath: "a path"}
    return names.get(kind, "null")


def _convert(value, kind):
    """value as `kind`; raises ValueError where it is of another type or out of range."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        base, limits = typing.get_args(kind)
        value = _convert(value, base)
        if value not in limits:
            raise ValueError
        return value
    if origin is Literal:
        if not any(value == v and type(value) is type(v) for v in typing.get_args(kind)):
            raise ValueError
        return value
    if origin in (typing.Union, types.UnionType):
        for arm in typing.get_args(kind):
            try:
                return _convert(value, arm)
            except ValueError:
                continue
        raise ValueError
    if kind is FilePath:
        return os.path.expanduser(_convert(value, str))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or value in (float("inf"), float("-inf")):
        raise ValueError
    if (kind is str and not value) or (kind is int and abs(value) >= 2**63):
        raise ValueError
    return value


def build(cls, values, problems, path=""):
    """values: nested dict -> an instance of the dataclass `cls`.

    Problems are appended to the list as sentences that name the key; with any, the result is None.
    A field with a default in `cls` may be left out.
    """
    before = len(problems)
    if not isinstance(values, dict):
        problems.append(f"{path or 'the file'}: expected keys and values, got {values!r}"[:160])
        return None
    kinds = typing.get_type_hints(cls, include_extras=True)
    optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    at = f"{path}." if path else ""
    for key in values:
        if key not in kinds:
            close = difflib.get_close_matches(str(key), list(kinds), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(kinds)}"
            problems.append(f"{at}{key}: unknown key{hint}")
    built = {}
    for key, kind in kinds.items():
        if key not in values:
            if key not in optional:
                problems.append(f"{at}{key}: missing")
        elif dataclasses.is_dataclass(kind):
            built[key] = build(kind, values[key], problems, f"{at}{key}")
        else:
            try:
                built[key] = _convert(values[key], kind)
            except (ValueError, OverflowError):
                shown = json.dumps(values[key], default=str)[:60]
                problems.append(f"{at}{key}: expected {_describe(kind)}, got {shown}")
    return cls(**built) if len(problems) == before else None
