r"""ChatML, as the Qwen families write it.

<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n
"""

from collections.abc import Callable

from boxcar.pipelines.families.family import Architecture, ChatTemplate, Network

TURN_OPEN = "<|im_start|>user\n"
ANSWER_OPEN = "<|im_end|>\n<|im_start|>assistant\n"
TURN_CLOSE = "<|im_end|>\n"


def chatml(default_system: str | None, image: Callable[[int], str], image_token: str, special_tokens: tuple[str, ...]) -> ChatTemplate:
    """A ChatML template; `image` gives the control text of the n-th image of a conversation."""

    def header(system: str | None, num_images: int) -> str:
        opening = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        return opening + TURN_OPEN + "".join(image(number) for number in range(1, num_images + 1))

    return ChatTemplate(
        default_system=default_system,
        header=header,
        image_in_question=image,
        turn_open=TURN_OPEN,
        answer_open=ANSWER_OPEN,
        turn_close=TURN_CLOSE,
        image_token=image_token,
        special_tokens=("<|im_start|>", "<|im_end|>", *special_tokens),
        reply_ends=("<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    )


def qwen2_vision(_number: int) -> str:
    """An image in Qwen2-VL, Qwen2.5-VL and Qwen3-VL; their templates number images only on request."""
    return "<|vision_start|><|image_pad|><|vision_end|>"


QWEN2_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")

QWEN2_SPECIAL_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
"""The same in Qwen2-VL, Qwen2.5-VL and Qwen3-VL (transformers configs)."""


def qwen2_network(model_type: str, architecture: Architecture, *, vision_mlp: str, merger: str) -> Network:
    """The transformers modules of Qwen2-VL, Qwen2.5-VL and Qwen3-VL differ in the names of the vision MLP and of the merger's layers."""
    return Network(
        model_type=model_type,
        part_names={
            "merger": r"model\.visual\.(merger|deepstack_merger_list)\.",
            "vision": r"model\.visual\.(?!merger\.|deepstack_merger_list\.)",
            "language": r"(model\.language_model|lm_head)\.",
        },
        lora_targets={
            "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
            "vision": rf"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.({vision_mlp}))",
            "merger": rf"model\.visual\.{merger}",
        },
        vision_module="model.visual",
        decoder_layers="model.language_model.layers",
        positions="mrope",
        architecture=architecture,
        image_input="patches",
    )
