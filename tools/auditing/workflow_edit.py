"""Settings into workflows.yaml, every comment kept: the text is changed where the values stand, and proved by reading it again."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from boxcar.pipelines.storage import atomic_write
from boxcar.schemas.errors import ConfigError


def write_settings(path: Path, name: str, settings: Mapping[str, int]) -> list[str]:
    """Put settings into the convert section of a workflow. Returns what changed, a line each; [] where nothing did.

    Raises ConfigError where the file cannot be changed without changing something else (an alias, say); the file then stays as it was.
    """
    text = path.read_text(encoding="utf-8")
    before = yaml.safe_load(text)
    own = before[name]["convert"]
    changes = {key: value for key, value in settings.items() if own.get(key) != value}
    if not changes:
        return []
    changed = text
    for key, value in changes.items():
        changed = _with(changed, name, key, value, str(path))
    expected = {**before, name: {**before[name], "convert": {**own, **changes}}}
    if yaml.safe_load(changed) != expected:
        raise ConfigError(
            f"{path}, {name}.convert",
            found="a section that other workflows share (an anchor), or text that cannot be changed safely",
            expected="keys of its own",
            fix=f"Write these yourself: {', '.join(f'{key}: {value}' for key, value in changes.items())}.",
        )
    with atomic_write(path) as stream:
        stream.write(changed.encode())
    return [f"{key}: {own.get(key, 'not set')} -> {value}" for key, value in changes.items()]


def _with(text: str, name: str, key: str, value: int, where: str) -> str:
    section = _section(text, name, where)
    for key_node, value_node in section.value:
        if key_node.value == key and isinstance(value_node, yaml.ScalarNode):
            return text[: value_node.start_mark.index] + str(value) + text[value_node.end_mark.index :]
    first_key = section.value[0][0]
    at = first_key.start_mark.index
    if section.flow_style:
        return f"{text[:at]}{key}: {value}, {text[at:]}"
    return f"{text[:at]}{key}: {value}\n{' ' * first_key.start_mark.column}{text[at:]}"


def _section(text: str, name: str, where: str) -> yaml.MappingNode:
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    for step in (name, "convert"):
        assert isinstance(node, yaml.MappingNode), "the file was loaded as workflows before"
        node = next((value for key, value in node.value if key.value == step), None)
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise ConfigError(f"{where}, {name}", found="no convert section of its own", expected="one with keys")
    return node
