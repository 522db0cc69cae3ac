"""Every workflow that comes with the project can be read, with all of its sections."""

from pathlib import Path

import pytest
import yaml

from tools.workflows import load_workflow

FILE = Path(__file__).parents[2] / "workflows.yaml"
SECTIONS = [
    (name, section) for name, workflow in yaml.safe_load(FILE.read_text()).items() for section in workflow if section != "description"
]


@pytest.mark.parametrize(("name", "section"), SECTIONS)
def test_a_preset_is_valid(name: str, section: str) -> None:
    assert getattr(load_workflow(FILE, name, section), section) is not None
