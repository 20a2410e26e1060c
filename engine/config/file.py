"""A tree of dataclasses from YAML and command-line overrides; what does not fit is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from warpo.engine.errors import ConfigError

T = TypeVar("T")

_LONGEST_VALUE = 80  # characters of a value that a message shows


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are text, numbers, true or false, or null, as YAML 1.2 has them.

    YAML 1.1 also reads 017 as 15, 1:30 as 90, and 2026-11-29 as a date.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One setting: its dotted name, what it takes (in words), its default and its text."""

    name: str
    type: Any
    wanted: str
    required: bool
    default: Any
    text: str


def keys(tree: type, prefix: str = "") -> dict[str, Key]:
    """Every setting of the tree by dotted name, in the order of the source."""
    found: dict[str, Key] = {}
    for name, info in tree.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if isinstance(info.annotation, type) and is_dataclass(info.annotation):
            found |= keys(info.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = Key(
                name=prefix + name,
                type=info.annotation,
                wanted=_wanted(info.annotation, info.metadata),
                required=info.is_required(),
                default=info.default,
                text=" ".join((info.description or "").split()),
            )
    return found


def sections(tree: type) -> dict[str, str]:
    """The sections of the tree and what each is about."""
    return {
        name: info.annotation.__doc__ or ""
        for name, info in tree.__pydantic_fields__.items()  # type: ignore[attr-defined]
        if is_dataclass(info.annotation)
    }


def read_tree(tree: type[T], path: Path, overrides: Sequence[str]) -> T:
    """`tree` built from the YAML file at `path`, changed by `--section.key value`.

    Raises:
        ConfigError: one line for each fault: where it stands, the key, the value, what is wanted.
    """
    known = keys(tree)
    values, places = _read_yaml(path, known)
    for name, value, place in _parse_overrides(overrides, known):
        values[name], places[name] = value, place
    faults = [
        f"{places[name]}: {name} = {_short(value)}: wanted {known[name].wanted}"
        for name, value in values.items()
        if isinstance(value, bool) and known[name].type is not bool
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    nested: dict[str, Any] = {section: {} for section in sections(tree)}
    for name, value in values.items():
        section, dot, leaf = name.rpartition(".")
        (nested[section] if dot else nested)[leaf] = value
    try:
        return TypeAdapter(tree).validate_python(nested)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, known, values, places)) from None


def peek(path: Path, overrides: Sequence[str], name: str) -> str | None:
    """The value of a top-level key, before it is known what keys there are; None if not given.

    Raises:
        ConfigError: the file cannot be read as YAML.
    """
    for i, option in enumerate(overrides):
        if option.startswith(f"--{name}="):
            return option.partition("=")[2]
        if option == f"--{name}" and i + 1 < len(overrides):
            return overrides[i + 1]
    root = _compose(path)
    with _yaml_errors(path):
        leaves = _leaves(root, "", {}) if root is not None else []
    return next((str(value) for key, value, _ in leaves if key == name), None)


def _read_yaml(path: Path, known: dict[str, Key]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by dotted name, and the file and line of each."""
    root = _compose(path)
    with _yaml_errors(path):
        leaves = _leaves(root, "", known) if root else []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    faults: list[str] = []
    for name, value, line in leaves:
        place = f"{path}:{line}"
        if name not in known:
            faults.append(f"{place}: {_unknown(name, known)}")
        elif name in values:
            faults.append(f"{place}: {name} is set a second time, first at {places[name]}")
        else:
            values[name], places[name] = value, place
    if faults:
        raise ConfigError("\n".join(faults))
    return values, places


def _compose(path: Path) -> yaml.MappingNode | None:
    """The nodes of a file; None if it is empty."""
    with _yaml_errors(path):
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: wanted `key: value` lines")
    return root


@contextmanager
def _yaml_errors(path: Path) -> Iterator[None]:
    """Raise a ConfigError for what is wrong with a YAML file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{path}: not YAML: character {error.position} is "
            f"{chr(error.character)!r}: {error.reason}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep: wanted sections of `key: value`") from None


def _leaves(node: yaml.MappingNode, prefix: str, known: dict[str, Key]) -> list[tuple]:
    """(dotted name, value, line) of each setting."""
    found = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is not text", problem_mark=key.start_mark)
        name = prefix + key.value
        is_section = any(other.startswith(name + ".") for other in known)
        if is_section and isinstance(value, yaml.MappingNode):
            found += _leaves(value, name + ".", known)
        elif not (is_section and value.tag == "tag:yaml.org,2002:null"):
            found.append((name, _plain(value), line))
    return found


def _plain(node: yaml.Node) -> Any:
    """The value of a setting: a scalar or a list of scalars; of anything else, what it is."""
    if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
        return [
            _plain(item) if isinstance(item, yaml.ScalarNode) else _Nested() for item in node.value
        ]
    if not isinstance(node, yaml.ScalarNode):
        return _Nested()
    try:
        return _Loader("").construct_object(node)
    except (ValueError, KeyError, OverflowError, AttributeError, TypeError):
        # a number of too many digits, !!int or !!timestamp of a word, the 30th of February
        return node.value


class _Nested:
    """A value that no setting accepts."""

    def __repr__(self) -> str:
        return "a mapping or a list in a list"


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[: _LONGEST_VALUE - 20]}... ({len(text)} characters)"


def _parse_overrides(args: Sequence[str], known: dict[str, Key]) -> list[tuple[str, Any, str]]:
    """(dotted name, value as text, how the user wrote the option) of each override."""
    parsed = []
    rest = list(args)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"{_short(option)}: wanted --key value or --section.key value")
        flag, equals, text = option.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in known:
            raise ConfigError(f"{flag}: {_unknown(name, known)}")
        words = [text] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        parsed.append((name, _override_value(known[name], words, flag), flag))
    return parsed


def _override_value(key: Key, words: list[str], flag: str) -> Any:
    if Ellipsis in get_args(key.type):
        return words
    choices = [choice for part in get_args(key.type) for choice in get_args(part)]
    if any(get_origin(part) is tuple for part in (key.type, *get_args(key.type))):
        if len(words) == 1 and words[0] in choices:
            return words[0]
        return [part for word in words for part in word.replace(",", " ").split()]
    if key.type is bool and not words:
        return True
    if len(words) != 1:
        raise ConfigError(
            f"{flag}: wanted one value ({key.wanted}), got {len(words)}: {_short(words)}"
        )
    return words[0]


def _unknown(name: str, known: dict[str, Key]) -> str:
    inside = [key for key in known if key.startswith(name + ".")]
    if inside:
        return f"{name} is a section, wanted its keys: {', '.join(inside)}"
    section, _, leaf = name.rpartition(".")
    near = [key for key in known if key.rpartition(".")[2] == leaf]
    beside = [key for key in known if section and key.startswith(section + ".")]
    # In a known section, only its own keys are near: loss.beta is not update.betas.
    leaves = {key.rpartition(".")[2]: key for key in beside or known}
    # 0.75 lets transposed and missing letters through, and few words that merely share some.
    near = near or [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    names = [] if beside else [*known, *{key.partition(".")[0] for key in known}]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if near:
        return f"unknown key {name}: did you mean {' or '.join(near)}?"
    if beside:
        return f"unknown key {name}: {section} has {', '.join(beside)}"
    return f"unknown key {name}: `warpo train --help` lists all keys"


def _explain(
    error: ValidationError,
    path: Path,
    known: dict[str, Key],
    values: dict[str, Any],
    places: dict[str, str],
) -> str:
    lines: dict[str, str] = {}
    for fault in error.errors():
        # A fault inside a union or a tuple has a longer location: its key is where the user wrote.
        parts = [str(part) for part in fault["loc"]]
        name = next((n for n in (".".join(parts[:2]), *parts[:1]) if n in known), "")
        if not name:
            lines[fault["msg"]] = f"{path}: {fault['msg'].removeprefix('Value error, ')}"
        elif name not in values:
            lines[name] = f"{path}: {name} is required: {known[name].text} Or pass --{name} VALUE"
        else:
            wanted = known[name].wanted
            lines[name] = f"{places[name]}: {name} = {_short(values[name])}: wanted {wanted}"
    return "\n".join(lines.values())


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _wanted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describe the values that a key accepts: `a number > 0`."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        metadata = [m for item in metadata for m in getattr(item, "metadata", [item])]
        return _wanted(inner, metadata)
    if get_origin(annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple and Ellipsis in get_args(annotation):
        return f"{_wanted(get_args(annotation)[0])} or a list of it"
    if get_origin(annotation) is tuple:
        return f"{len(get_args(annotation))} values, each {_wanted(get_args(annotation)[0])}"
    if annotation not in _WORDS:
        return ", or ".join(_wanted(part) for part in get_args(annotation))
    bounds = []
    for bound in metadata:
        match bound:
            case Ge(ge=limit):
                bounds.append(f">= {limit}")
            case Gt(gt=limit):
                bounds.append(f"> {limit}")
            case Le(le=limit):
                bounds.append(f"<= {limit}")
            case Lt(lt=limit):
                bounds.append(f"< {limit}")
    return " ".join([_WORDS[annotation], " and ".join(bounds)]).strip()
