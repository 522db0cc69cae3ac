"""A network's numbers from its config.json are those of the network itself."""

import json
from pathlib import Path

import pytest

from boxcar.pipelines.families.catalog import find_family
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.training import LoraConfig
from boxcar.train.network.flops import shape_of
from boxcar.train.network.model import attach_lora
from boxcar.train.network.model_shape import size_of_config
from tests.train.tiny import FAMILIES, tiny_base

EVERY_PART = LoraConfig(rank=4, parts=("language", "merger", "vision"))


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), EVERY_PART], ids=["language", "every part"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_of_a_config_is_that_of_the_network(family: str, lora: LoraConfig, tmp_path: Path) -> None:
    base = tiny_base(tmp_path, family)
    num_weights = sum(parameter.numel() for parameter in base.model.parameters())
    attach_lora(base, lora, seed=0)
    config = json.loads((tmp_path / family / "config.json").read_text())
    size = size_of_config(config, base.family.network, lora, "config.json")
    assert size.shape == shape_of(base)
    assert size.all_weights == num_weights
    assert size.trained == sum(parameter.numel() for parameter in base.model.parameters() if parameter.requires_grad)


def test_a_config_of_another_model_is_refused() -> None:
    network = find_family("qwen2_5_vl").network
    with pytest.raises(ConfigError, match="model_type 'llama'"):
        size_of_config({"model_type": "llama"}, network, None, "config.json")
    with pytest.raises(ConfigError, match="vision_config"):
        size_of_config({"model_type": "qwen2_5_vl"}, network, None, "config.json")
