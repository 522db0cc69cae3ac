"""The families by name: the one place that sees them all."""

from boxcar.pipelines.families import cogvlm, cogvlm2, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from boxcar.pipelines.families.family import Family
from boxcar.schemas.errors import ConfigError

FAMILIES: dict[str, Family] = {
    "qwen2_vl": qwen2_vl.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "qwen_vl": qwen_vl.FAMILY,
    "cogvlm": cogvlm.COGVLM_490,
    "cogvlm_chat": cogvlm.COGVLM_CHAT_490,
    "cogvlm_224": cogvlm.COGVLM_224,
    "cogvlm2": cogvlm2.FAMILY,
}


def find_family(name: str, where: str = "family") -> Family:
    """The family of that name. Raises ConfigError with the names there are."""
    if name not in FAMILIES:
        raise ConfigError(where, found=repr(name), expected=f"one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
