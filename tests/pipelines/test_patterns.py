"""Regular expressions that every supported Python matches the same way."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", ["schemas", "pipelines", "train", "tools"])
def test_no_group_is_repeated_possessively(folder: str) -> None:
    """Python 3.11.0 to 3.11.4 matches `(?:...)*+` wrongly (github.com/python/cpython/issues/106052); `(?>(?:...)*)` says the same."""
    files = list((ROOT / folder).rglob("*.py"))
    assert len(files) > 10
    assert [str(file) for file in files if re.search(r"\)[*+?]\+", file.read_text("utf-8"))] == []
