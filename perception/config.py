"""Configuration: pydantic models beside the code they configure; YAML holds overrides only, unknown keys are errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from perception.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: immutable, and a key that the schema does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


def load_config(schema: type[C], path: Path | str | None = None, overrides: Sequence[str] = ()) -> C:
    """The configuration of a YAML file (or of the defaults alone), with `a.b=value` overrides applied.

    Raises ConfigError naming the file and the key for: a missing file, YAML that does not parse, an unknown key (with
    the nearest known one) and a value of the wrong type.
    """
    data = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(data, override)
    return validate(schema, data, str(path) if path is not None else "the command line")


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
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
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected keys and values, got {type(data).__name__}", "configs/ holds working examples"
        )
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` (the value is YAML) in nested mappings."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE", "for example  --set dataset.split=mini_val")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} holds a value, not keys", "drop the part after it")
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}", "quote it, or mend it") from error


def _explain(error: ValidationError, schema: type[Config], where: str, prefix: str) -> tuple[str, str]:
    """What is wrong and what to do, of the first error of a validation."""
    first = error.errors()[0]
    key = prefix + ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] != "extra_forbidden":
        return (
            f"{where}: {key}: {first['msg']}, got {first['input']!r}{more}",
            f"set {key} in {where}, or with --set {key}=...",
        )
    known = _fields(schema, first["loc"][:-1])
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{where}: unknown key {key!r}{more}", f"{hint}known keys: {', '.join(known)}"


def _fields(schema: type[BaseModel], parents: tuple[int | str, ...]) -> list[str]:
    """The keys known under a path of parent keys."""
    for parent in parents:
        info = schema.model_fields.get(str(parent))
        options = [info.annotation, *getattr(info.annotation, "__args__", ())] if info else []
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models:
            return []
        schema = models[0]
    return sorted(schema.model_fields)
