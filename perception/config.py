"""Configuration: pydantic models beside the code they configure; YAML holds overrides only, unknown keys are errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from perception.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: immutable, and a key that the schema does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="after")
    @classmethod
    def _home(cls, value: Any) -> Any:
        # No shell stands between a YAML file, or --set root=~/data, and us.
        return value.expanduser() if isinstance(value, Path) else value


C = TypeVar("C", bound=Config)

_COMMAND_LINE = "the command line"


def load_config(schema: type[C], path: Path | str | None = None, overrides: Sequence[str] = ()) -> C:
    """The configuration of a YAML file (or of the defaults alone), with `a.b=value` overrides applied.

    Raises ConfigError naming the file and the key for: a missing file, YAML that does not parse, an unknown key (with
    the nearest known one) and a value of the wrong type.
    """
    data = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(data, override)
    return validate(schema, data, str(path) if path is not None else _COMMAND_LINE)


def validate(schema: type[C], data: Mapping[str, Any], where: str, prefix: str = "") -> C:
    """The configuration in `data`; ConfigError names `where` and the key, which follows `prefix` ("dataset.")."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(*_explain(error, schema, where, prefix)) from error


def schema_of(table: Mapping[str, str], section: str, data: Mapping[str, Any], where: str) -> type[Config]:
    """`ClassConfig` of the "module:Class" that a table has for `data["name"]`."""
    name = data.get("name")
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{where}: {section}.name: {name!r} is not known", f"set it to one of: {', '.join(table)}")
    module, _, cls = table[name].partition(":")
    schema: type[Config] = getattr(import_module(module), f"{cls}Config")
    return schema


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, an empty one of an empty file, with `a.b=value` overrides applied."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise ConfigError(
            f"{path}: no such configuration file", f"{path.parent} holds: {near or 'no .yaml file'}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: {(error.strerror or str(error)).lower()}", "name a YAML file you may read"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}", "mend the file; configs/ holds working examples") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected keys and values, got {type(data).__name__}", "configs/ holds working examples"
        )
    for override in overrides:
        apply_override(data, override)
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` (the value is YAML) in nested mappings."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE", "for example  --set dataset.split=mini_val")
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:  # absent, or left empty in the file
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} holds a value, not keys", "drop the part after it")
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}", "quote it, or mend it") from error


def _explain(error: ValidationError, schema: type[Config], where: str, prefix: str) -> tuple[str, str]:
    """What is wrong and what to do, of the first key that a validation found at fault."""
    errors = error.errors()
    first = errors[0]
    loc, siblings = _locate(schema, first["loc"])
    key = prefix + ".".join(map(str, loc))
    # One value that fits no branch of a union is one error of each branch, some of them deeper inside it.
    same = [e for e in errors if _locate(schema, e["loc"])[0][: len(loc)] == loc]
    more = f" (and {len(errors) - len(same)} more)" if len(errors) > len(same) else ""
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), siblings, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: unknown key {key!r}{more}", f"{hint}known keys: {', '.join(siblings)}"
    if not loc:  # a check across keys, which names them itself
        return f"{where}: {first['msg'].removeprefix('Value error, ')}{more}", "change one of the keys it names"
    do = f"--set {key}=..." if where == _COMMAND_LINE else f"set {key} in {where}, or with --set {key}=..."
    if first["type"] == "missing":
        return f"{where}: {key} is missing{more}", do
    if any(e["type"] == "string_type" and isinstance(e["input"], int | float) for e in same):
        do += "; put in quotes what YAML would read as a number: '00'"
    wrong = ", or: ".join(dict.fromkeys(e["msg"] for e in same))
    return f"{where}: {key}: {wrong}, got {first['input']!r}{more}", do


def _locate(schema: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], list[str]]:
    """The keys of an error's location that a user wrote, and those that are known beside the last of them.

    pydantic puts the name of the branch, such as `tuple[str, ...]`, behind a key whose type is a union.
    """
    kept: list[int | str] = []
    here, parent, in_branch = [schema], [schema], True
    for part in loc:
        below = _below(here, part)
        if not below and len(here) > 1 and not in_branch:
            in_branch = True
            continue
        kept.append(part)
        here, parent, in_branch = below, here, False
    models = [kind for kind in parent if _is_model(kind)]
    return tuple(kept), sorted(name for model in models for name in model.model_fields)


def _below(kinds: Sequence[Any], part: int | str) -> list[Any]:
    """The types of what a key, or a place in a sequence, leads to; none where no type of `kinds` has it."""
    found: list[Any] = []
    for kind in kinds:
        if _is_model(kind):
            found += _branches(kind.model_fields[part].annotation) if part in kind.model_fields else []
        elif get_origin(kind) is dict:
            found += _branches(get_args(kind)[1])
        elif isinstance(part, int):
            found += [branch for item in get_args(kind) if item is not ... for branch in _branches(item)]
    return found


def _branches(annotation: Any) -> list[Any]:
    """The types of a union but None, or the one type."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        options = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
        return [branch for option in options for branch in _branches(option)]
    return [] if annotation is type(None) else [annotation]


def _is_model(kind: Any) -> bool:
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)
