"""Qwen2-VL.

| what          | convention                                                                                         |
|---------------|----------------------------------------------------------------------------------------------------|
| resize        | smart_resize to multiples of 28; 3136..12845056 px published (the class default stops at 1003520)  |
| image tokens  | height * width / 784, between vision_start and vision_end                                          |
| boxes         | tags, thousandths of width and height, round, 0..1000 (process_bbox.ipynb)                         |
| template      | ChatML, system "You are a helpful assistant." where none is given                                  |
| not found     | a sentence: the tags have no empty form                                                            |

Checked against transformers 5.23.0 (qwen2_vl) and QwenLM/Qwen3-VL cookbooks/process_bbox.ipynb, convert_to_qwen2vl_format.
"""

from boxcar.pipelines.families import prompts
from boxcar.pipelines.families.box_text import TaggedBoxText, ThousandthGrid
from boxcar.pipelines.families.chatml import QWEN2_SPECIAL_IDS, QWEN2_SPECIALS, chatml, qwen2_network, qwen2_vision
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.families.patches import PixelLimits, SmartResize

_TAGS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")

FAMILY = Family(
    name="qwen2_vl",
    title="Qwen2-VL (2B, 7B, 72B)",
    upstream="transformers 5.23.0 qwen2_vl; QwenLM/Qwen3-VL cookbooks/process_bbox.ipynb",
    checkpoint="Qwen/Qwen2-VL-7B-Instruct",
    resize=SmartResize(patch=14, merge=2, published_limits=PixelLimits(3136, 12_845_056)),
    grid=ThousandthGrid("round"),
    box_text=TaggedBoxText(*_TAGS),
    chat=chatml("You are a helpful assistant.", qwen2_vision, "<|image_pad|>", (*QWEN2_SPECIALS, *_TAGS)),
    prompts=prompts.with_shared(
        {
            "detect": {
                "en": ("Locate every {label} in the image.", "Detect all instances of {label} and give their bounding boxes."),
                "zh": ("框出图中所有{label}的位置。", "检测图像中的所有{label}并给出检测框。"),
            },
            "refer": {
                "en": ("Locate {label} in the image.", "Give the bounding box of {label}."),
                "zh": ("框出图中{label}的位置。", "给出{label}的检测框。"),
            },
            "detect_joint": {
                "en": ("Locate every instance of these categories in the image: {label}.",),
                "zh": ("框出图中属于以下类别的所有物体：{label}。",),
            },
        }
    ),
    not_found=prompts.NOT_FOUND,
    max_sequence=32_768,
    network=qwen2_network("qwen2_vl", "full_tower", vision_mlp="fc1|fc2", merger=r"merger\.mlp\.[02]"),
    published_special_ids=QWEN2_SPECIAL_IDS,
    llama_factory_template="qwen2_vl",
)
