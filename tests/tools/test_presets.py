"""Every workflow that comes with the project can be read, with all of its sections."""

from typing import Any

import pytest
import yaml

from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.readers.catalog import find_reader
from boxcar.pipelines.tokens.frame import resolve_limits
from boxcar.tools.workflows import load_workflow
from tests.places import ROOT

FILE = ROOT / "workflows.yaml"
WORKFLOWS = yaml.safe_load(FILE.read_text())
SECTIONS = [(name, section) for name, workflow in WORKFLOWS.items() for section in workflow if section not in ("description", "needs")]
NEEDS = [(name, other) for name, workflow in WORKFLOWS.items() for other in workflow.get("needs", ())]


@pytest.mark.parametrize(("name", "section"), SECTIONS)
def test_a_preset_says_what_the_file_says(name: str, section: str) -> None:
    """Every key of the file arrives with its value, and nothing is dropped on the way."""
    loaded = getattr(load_workflow(FILE, name, section), section).model_dump(mode="json")
    assert differences(WORKFLOWS[name][section], loaded) == []


def differences(written: Any, loaded: Any, place: str = "") -> list[str]:
    if isinstance(written, dict):
        return [entry for key, value in written.items() for entry in differences(value, loaded.get(key, "missing"), f"{place}.{key}")]
    return [] if loaded == written else [f"{place}: {written} in the file, {loaded} loaded"]


@pytest.mark.parametrize("name", [name for name, section in SECTIONS if section == "convert"])
def test_the_settings_of_a_preset_fit_its_family(name: str) -> None:
    config = load_workflow(FILE, name, "convert").convert
    assert config is not None
    family = find_family(config.family)
    find_reader(config.reader)
    assert config.cutoff_len <= family.max_sequence
    limits = resolve_limits(family, config.image_min_pixels, config.image_max_pixels)
    if config.image_max_pixels or not family.resize.limits_matter:
        largest = family.resize(6000, 4000, limits.min_pixels, limits.max_pixels)
        assert int(largest.visual_tokens) < config.cutoff_len, "the largest image leaves tokens for text"


def test_the_token_counts_in_the_comments() -> None:
    """1003520 px are 1280 visual tokens of Qwen2.5-VL."""
    pixels_per_token = find_family("qwen2_5_vl").resize.pixels_per_token
    assert WORKFLOWS["coco_qwen25vl"]["convert"]["image_max_pixels"] == 1280 * pixels_per_token[0] * pixels_per_token[1]


@pytest.mark.parametrize(("name", "other"), NEEDS)
def test_what_a_preset_needs_is_there_and_of_its_frame(name: str, other: str) -> None:
    mine, theirs = (load_workflow(FILE, one, "convert").convert for one in (name, other))
    assert mine is not None
    assert theirs is not None
    for key in ("family", "tokenizer", "image_max_pixels", "cutoff_len"):
        assert getattr(mine, key) == getattr(theirs, key)
    assert mine.output != theirs.output
