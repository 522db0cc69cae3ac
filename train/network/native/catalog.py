"""Networks that we bring ourselves, by the model_type of a base's config.json; and how such a config.json is opened."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from boxcar.schemas.errors import ConfigError
from boxcar.train.network.native.cogvlm import CogVLMConfig, CogVLMForCausalLM
from boxcar.train.network.native.native_model import NativeModel
from boxcar.train.network.native.qwen_vl import QWenLMHeadModel, QwenVLConfig


@dataclass(frozen=True)
class NativeNetwork:
    """A network of ours."""

    config: type[PreTrainedConfig]
    model: type[NativeModel]
    vision_section: str
    """Section of config.json without which it is another model of that name (Qwen without Qwen-VL's eyes)."""


NATIVE: dict[str, NativeNetwork] = {
    QwenVLConfig.model_type: NativeNetwork(QwenVLConfig, QWenLMHeadModel, "visual"),
    CogVLMConfig.model_type: NativeNetwork(CogVLMConfig, CogVLMForCausalLM, "vision_config"),
}


def open_config(base: str) -> PreTrainedConfig:
    """config.json of a folder or hub id. Raises ConfigError where the network is none of ours, OSError where there is no config.json."""
    raw, _ = PreTrainedConfig.get_config_dict(base)
    config = config_of(raw, base)
    config.name_or_path = base  # as transformers does: peft compares it with what an adapter's card says
    return config


def config_of(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    """The same from the contents of config.json; `where` is for the error."""
    name = raw.get("model_type") or ("cogvlm" if _is_cogvlm(raw) else None)
    if name not in NATIVE:
        described = f"model_type {name!r}, architectures {raw.get('architectures')}"
        raise ConfigError(
            f"{where}, config.json",
            found=described,
            expected=f"one of the networks that Boxcar brings: {', '.join(NATIVE)}",
            fix="Models of transformers are opened by transformers; for others, choose another base.",
        )
    network = NATIVE[name]
    if not isinstance(raw.get(network.vision_section), dict):
        raise ConfigError(
            f"{where}, config.json",
            found=f"model_type {name!r} without a section `{network.vision_section}`",
            expected="a vision-language model",
            fix="This is a text model of that name: choose its -VL sibling.",
        )
    return network.config.from_dict(raw)


def _is_cogvlm(raw: dict[str, Any]) -> bool:
    """CogVLM's config.json has no model_type. CogAgent's, and the video model's, look alike but name another architecture."""
    vision = raw.get("vision_config")
    if raw.get("architectures"):
        return "CogVLMForCausalLM" in raw["architectures"]
    return isinstance(vision, dict) and {"num_positions", "num_heads", "patch_size"} <= vision.keys()
