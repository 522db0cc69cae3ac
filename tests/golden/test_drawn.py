"""The weights that are drawn again are those that the published code was run with."""

import json
from collections.abc import Callable

import pytest
import torch

from tests.golden.drawn import cogvlm_weights, qwen_vl_weights
from tests.places import GOLDEN

CASES = [
    pytest.param("v1", "cogvlm.json", "v1", cogvlm_weights, id="CogVLM"),
    pytest.param("v2", "cogvlm.json", "v2", cogvlm_weights, id="CogVLM2"),
    pytest.param("qwen_vl", "qwen_vl.json", "A_448_interp", qwen_vl_weights, id="Qwen-VL"),
]


@pytest.mark.parametrize(("network", "file", "section", "draw"), CASES)
def test_drawn_weights_are_the_recorded_ones(
    network: str, file: str, section: str, draw: Callable[[dict[str, tuple[int, ...]]], dict[str, torch.Tensor]]
) -> None:
    """Where this fails, torch draws other numbers than torch 2.13 did, and the tests of the native networks cannot pass either."""
    shapes = json.loads((GOLDEN / file).read_text())[section]["params"]
    found = draw({name: tuple(shape) for name, shape in shapes.items()})
    expected = json.loads((GOLDEN / "weights.json").read_text())["networks"][network]
    assert found.keys() == expected.keys()
    for name, (first, last, total) in expected.items():
        values = found[name].flatten()
        assert [values[0].item(), values[-1].item()] == pytest.approx([first, last], abs=1e-6), name
        assert values.double().sum().item() == pytest.approx(total, abs=1e-3), name
