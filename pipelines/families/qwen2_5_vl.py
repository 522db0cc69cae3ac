"""Qwen2.5-VL.

| what          | convention                                                                                         |
|---------------|----------------------------------------------------------------------------------------------------|
| resize        | smart_resize to multiples of 28; 3136..12845056 px published (the class default stops at 1003520)  |
| image tokens  | height * width / 784, between vision_start and vision_end                                          |
| boxes         | JSON bbox_2d in absolute pixels *of the resized image*, round(x * (new_w / w)), 0..new_w - 1       |
| template      | ChatML, system "You are a helpful assistant." where none is given                                  |
| not found     | an empty JSON list                                                                                 |

A box text is only right for the pixel limits it was made with: the frame contract carries them, and each row its resized size.
Predictions may overshoot the image; clip them (maintainers, QwenLM/Qwen3-VL#1035).

Checked against transformers 5.23.0 (qwen2_vl PIL image processor, qwen2_5_vl tokenizer and chat template) and
QwenLM/Qwen3-VL cookbooks/process_bbox.ipynb.
"""

from boxcar.pipelines.families import prompts
from boxcar.pipelines.families.box_text import EMPTY_JSON_LIST, JsonBoxText, ResizedPixelGrid
from boxcar.pipelines.families.chatml import QWEN2_SPECIAL_IDS, QWEN2_SPECIALS, chatml, qwen2_network, qwen2_vision
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.families.patches import PixelLimits, SmartResize

FAMILY = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL (3B, 7B, 32B, 72B)",
    upstream="transformers 5.23.0 qwen2_5_vl; QwenLM/Qwen3-VL cookbooks/process_bbox.ipynb",
    checkpoint="Qwen/Qwen2.5-VL-7B-Instruct",
    resize=SmartResize(patch=14, merge=2, published_limits=PixelLimits(3136, 12_845_056)),
    grid=ResizedPixelGrid(),
    box_text=JsonBoxText(),
    chat=chatml("You are a helpful assistant.", qwen2_vision, "<|image_pad|>", QWEN2_SPECIALS),
    prompts=prompts.with_shared(prompts.JSON_GROUNDING),
    not_found={"en": EMPTY_JSON_LIST, "zh": EMPTY_JSON_LIST},
    max_sequence=128_000,
    network=qwen2_network("qwen2_5_vl", "windowed_tower", vision_mlp="gate_proj|up_proj|down_proj", merger=r"merger\.mlp\.[02]"),
    published_special_ids=QWEN2_SPECIAL_IDS,
    llama_factory_template="qwen2_vl",
    notes="Boxes are pixels of the resized image: keep image_min_pixels and image_max_pixels the same when serving.",
)
