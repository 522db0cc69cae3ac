"""LLaMA-Factory's dataset_info.json: each entry that our reader of conversations takes, and why the others are left.

dataset_info.json                                            workflow
name of the entry                                            name of the workflow
file_name (relative to the file's folder)                    annotations
formatting: sharegpt                                         reader: sharegpt (ms_swift where the rows have `objects`)
columns: messages, images; tags                              the published names are read; others are not
media_dir of LLaMA-Factory's settings, by default the folder images
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from boxcar.schemas.errors import ConfigError
from boxcar.tools.starting.folder import Listing
from boxcar.tools.starting.sniff import Found, sniff_rows

NAME = "dataset_info.json"
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
_COLUMNS = {"messages": {"messages", "conversations"}, "images": {"images", "image"}, "system": {"system"}}
_TAGS = {"role_tag": {"role", "from"}, "content_tag": {"content", "value"}}


def entries(path: Path, listing: Listing) -> Iterator[tuple[str, Found]]:
    """(name, source) of each entry; one that cannot be read is Found without a reader. Raises ConfigError where the file is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(str(path), found=f"{error}", expected="LLaMA-Factory's dataset_info.json") from error
    if not isinstance(content, dict):
        raise ConfigError(str(path), found=type(content).__name__, expected="an object with an entry for each data set")
    for name, entry in content.items():
        if isinstance(entry, dict):
            yield str(name), _entry(path, entry, listing)


def _entry(path: Path, entry: dict[str, Any], listing: Listing) -> Found:
    file = path.parent / str(entry.get("file_name", ""))
    if problem := _problem(file, entry):
        return Found(file, "", problem)
    found = sniff_rows(file, listing)
    if found is None or found.reader not in ("sharegpt", "ms_swift", "qwen_vl_chat"):
        return Found(file, "", "no rows with messages or conversations")
    if found.images is None and "images" not in entry.get("columns", {}):
        return Found(file, "", "text without images")
    return replace(found, images=found.images or path.parent)


def _problem(file: Path, entry: dict[str, Any]) -> str:
    """Why an entry is no file that our readers take; an empty string where it is one."""
    remote = next((key for key in _REMOTE if key in entry), None)
    if not entry.get("file_name"):
        return f"{remote}: on a hub; download it and give it a file_name" if remote else "an entry without file_name"
    if not file.is_file():
        return "a folder: name its file" if file.is_dir() else "no such file"
    if entry.get("formatting", "alpaca") != "sharegpt":
        return f"formatting: {entry.get('formatting', 'alpaca')}; Boxcar reads sharegpt"
    for what, allowed in ((entry.get("columns", {}), _COLUMNS), (entry.get("tags", {}), _TAGS)):
        for key, names in allowed.items():
            if what.get(key) is not None and what[key] not in names:
                return f"{key}: {what[key]!r}; Boxcar reads {' or '.join(sorted(names))}"
    return ""
