"""workflows.yaml and overrides -> schemas. The one door for YAML; every message names the file, the path within it, what was found and what
is allowed.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.workflow import Workflow

DEFAULT_FILE = "workflows.yaml"
BUILT_IN = Path(__file__).with_name("quickstart") / "quickstart.yaml"
"""Workflows that are there where the user's file has none of their name."""


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key written twice: YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<` may stand there more than once, and what it brings may be overridden
            key = self.construct_object(key_node, deep=deep)
            where = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
            if not isinstance(key, Hashable):
                raise ConfigError(where, found=f"the key {key!r}", expected="a word")
            if key in seen:
                raise ConfigError(where, found=f"the key {key!r} a second time", expected="each key once")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(str(path), found="no such file", expected="a file of workflows", fix="Name it with --file.") from error
    except IsADirectoryError as error:
        raise ConfigError(str(path), found="a folder", expected="a file of workflows") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), found=str(error), expected="a readable UTF-8 file") from error
    try:
        loader = _Loader(text)
        loader.name = str(path)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(str(path), found=f"broken YAML: {error}", expected="YAML") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"{type(content).__name__} at the top"
        raise ConfigError(str(path), found=found, expected="workflow names with their sections")
    return content


def has_workflow(path: Path, name: str) -> bool:
    """Whether the file is there and names the workflow. Raises ConfigError for a file that cannot be read."""
    return path.is_file() and name in _read_yaml(path)


def load_any(path: Path, name: str, overrides: Sequence[str] = ()) -> Workflow:
    """The named workflow, whatever sections it has; overrides begin with a section's name: train.epochs=2. Raises ConfigError."""
    raw = _raw_workflow(path, name)
    try:
        return Workflow.model_validate(_with_overrides(dict(raw), overrides))
    except ValidationError as error:
        raise config_error(str(path), error, name) from error


def load_workflow(path: Path, name: str, section: str, overrides: Sequence[str] = ()) -> Workflow:
    """The named workflow with `key=value` overrides of one section. Raises ConfigError."""
    raw = _raw_workflow(path, name)
    if section not in raw:
        raise ConfigError(f"{path}, {name}", found=f"the sections {', '.join(raw) or 'none'}", expected=f"a section `{section}:`")
    settings = raw[section] or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}, {name}.{section}", found=repr(settings), expected="keys and values such as `cutoff_len: 4096`")
    merged = dict(raw)
    merged[section] = _with_overrides(dict(settings), overrides)
    try:
        return Workflow.model_validate(merged)
    except ValidationError as error:
        raise config_error(str(path), error, name) from error


def file_of(path: Path, name: str) -> Path:
    """The file that has the workflow: the user's own, else the built-in one where it is named there."""
    return BUILT_IN if not has_workflow(path, name) and has_workflow(BUILT_IN, name) else path


def _raw_workflow(path: Path, name: str) -> dict[str, Any]:
    path = file_of(path, name)
    workflows = _read_yaml(path)
    if name not in workflows:
        known = ", ".join(sorted(map(str, workflows))) or "none"
        raise ConfigError(str(path), found=f"no workflow {name!r}", expected=f"one of: {known}")
    raw = workflows[name]
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}, {name}", found=repr(raw), expected="sections such as `convert:`")
    return raw


def _with_overrides(section: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError("command line", found=repr(override), expected="key=value, such as cutoff_len=2048 or tasks.caption.share=0")
        at = section
        *parents, last = key.split(".")
        for parent in parents:
            child = at.get(parent)
            at[parent] = dict(child) if isinstance(child, dict) else {}
            at = at[parent]
        try:
            at[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError("command line", found=repr(override), expected="a value in YAML") from error
    return section


def config_error(where: str, error: ValidationError, *prefix: str) -> ConfigError:
    """All mistakes at once, each with its place, what was found and what is allowed. prefix: what stands before a place."""
    problems = []
    for entry in error.errors(include_url=False):
        place = ".".join(str(part) for part in (*prefix, *entry["loc"]))
        if entry["type"] == "extra_forbidden":
            problems.append(f"{place}: unknown key, expected {_known_keys(entry['loc'][:-1])}")
        elif entry["type"] == "missing":
            problems.append(f"{place}: missing")
        elif entry["type"] == "value_error":  # of several keys at once: the message says which, the input would be the whole section
            problems.append(f"{place}: {entry['msg'].removeprefix('Value error, ')}")
        else:
            problems.append(f"{place}: found {entry['input']!r}, {entry['msg'][:1].lower()}{entry['msg'][1:]}")
    shown = problems[0] if len(problems) == 1 else "\n  " + "\n  ".join(problems) + "\n"
    return ConfigError(where, found=shown, expected="the keys and values that `boxcar schema` describes")


def _known_keys(location: Sequence[int | str]) -> str:
    """The keys of the model at a place, in words."""
    model: type[BaseModel] = Workflow
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            break
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [candidate for candidate in candidates if isinstance(candidate, type) and issubclass(candidate, BaseModel)]
        if not models:
            break
        model = models[0]
    return "one of " + ", ".join(model.model_fields)


def json_schema(readers: Sequence[str], families: Sequence[str]) -> dict[str, Any]:
    """JSON Schema of workflows.yaml for editors, with the names of readers and families in it."""
    schema = TypeAdapter(dict[str, Workflow]).json_schema()
    properties = schema["$defs"]["ConvertConfig"]["properties"]
    properties["reader"]["enum"] = list(readers)
    properties["family"]["enum"] = list(families)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Boxcar workflows", **schema}
