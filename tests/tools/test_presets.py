"""Every workflow that comes with the project can be read, with all of its sections."""

import pytest
import yaml

from boxcar.tools.workflows import load_workflow
from tests.places import ROOT

FILE = ROOT / "workflows.yaml"
WORKFLOWS = yaml.safe_load(FILE.read_text())
SECTIONS = [(name, section) for name, workflow in WORKFLOWS.items() for section in workflow if section not in ("description", "needs")]
NEEDS = [(name, other) for name, workflow in WORKFLOWS.items() for other in workflow.get("needs", ())]


@pytest.mark.parametrize(("name", "section"), SECTIONS)
def test_a_preset_is_valid(name: str, section: str) -> None:
    assert getattr(load_workflow(FILE, name, section), section) is not None


@pytest.mark.parametrize(("name", "other"), NEEDS)
def test_what_a_preset_needs_is_there_and_of_its_frame(name: str, other: str) -> None:
    mine, theirs = (load_workflow(FILE, one, "convert").convert for one in (name, other))
    assert mine is not None
    assert theirs is not None
    for key in ("family", "tokenizer", "image_max_pixels", "cutoff_len"):
        assert getattr(mine, key) == getattr(theirs, key)
    assert mine.output != theirs.output
