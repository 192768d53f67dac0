"""Settings out of YAML and `key=value`: an unknown key is refused with the nearest known one, and so is a secret."""

import difflib
import typing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mica_ds.errors import UserError
from mica_ds.files import replace_text
from mica_ds.stores import holds_secret, sets_secret


class Section(BaseModel):
    """A file's settings, or those under one key: each an attribute, with what it means below it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Kind = typing.TypeVar("Kind", bound=Section)


def read_settings(kind: type[Kind], path: Path, overrides: list[str] | None = None) -> Kind:
    """Read a YAML file, apply `key=value` overrides (dotted keys, YAML values), and check all by name and type. Local.

    Raises: UserError that names the file and the key.
    """
    settings = _read_yaml(path)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} is not of the form key=value, as in adapter.r=32")
        _set(settings, key, _parse_value(key, text))
    _refuse_secrets(path, settings)
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error, kind)}") from None


def save_settings(settings: Section, path: Path) -> None:
    """Write the resolved settings, whole or not at all, as YAML that reads back to the same. Local."""
    replace_text(path, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys. Local."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nearest(key: str, known: typing.Iterable[str], section: list[str]) -> str:
    """The end of a sentence about an unknown key: the known one that is most like it, or all. Local."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*section, close[0]])}?"
    return f"; known here: {', '.join(known)}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {_place(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"config {path} must hold keys and values, as the files in configs/ do")
    return settings


def _place(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong where, without the text there, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "it is no text"
    mark = error.problem_mark
    return f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(error.problem)


def _parse_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: the value is not valid YAML") from None


def _refuse_secrets(path: Path, settings: Any, key: str = "") -> None:
    """Refuse addresses and variables with a secret in any setting, before a message or the run folder repeats one."""
    if isinstance(settings, dict | list):
        for name, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
            _refuse_secrets(path, value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, str) and sets_secret(settings):
        raise UserError(f"{path}: {key} sets a secret, which the run folder would keep: export it before the start")
    elif isinstance(settings, str) and "//" in settings and key != "tracking.uri":  # which has a message of its own
        try:
            is_telling = holds_secret(settings) or urlsplit(settings).username  # which may be a token
        except ValueError:
            is_telling = True
        if is_telling:
            raise UserError(
                f"{path}: {key} is an address with a secret in it, which the run folder would keep: take it out"
            )


def _set(settings: dict[str, Any], dotted_key: str, value: Any) -> None:
    *sections, key = dotted_key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise UserError(f"override {dotted_key}: {section} is a value, not a section")
    settings[key] = value


def _explain(error: ValidationError, kind: type[Section]) -> str:
    """The first problem as one sentence; for an unknown key with the nearest known one."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"][:2]]  # section and key; deeper parts are pydantic's own
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        *parts, unknown = problem["loc"]
        section: Any = kind
        for part in parts:  # a number is a place in a list of sections
            section = typing.get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
        if len(parts) > 1:
            return f"{key}: unknown key {unknown}{nearest(str(unknown), section.model_fields, [])}"
        return f"unknown key {key}{nearest(str(unknown), section.model_fields, where[:-1])}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    return complaint(key, error)


def complaint(key: str, error: ValidationError) -> str:
    """What pydantic finds wrong with a key's value, or first below it, as part of a sentence. Local."""
    problem = error.errors()[0]
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"
