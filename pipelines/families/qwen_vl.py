"""Qwen-VL and Qwen-VL-Chat (version 1).

| what          | convention                                                                                         |
|---------------|----------------------------------------------------------------------------------------------------|
| resize        | 448 x 448 bicubic, aspect ratio not kept                                                           |
| image tokens  | 256 between <img> and </img>; the published code writes the path there and overwrites it with      |
|               | features, <imgpad> in its place gives the same result                                              |
| boxes         | <ref>label</ref><box>(x1,y1),(x2,y2)</box>, [0, 1000): floor, 0..999                               |
| template      | ChatML, system "You are a helpful assistant."; "Picture N: <img>..</img>" and a newline per image  |
| not found     | a sentence                                                                                         |

No published code fixes the rounding; floor satisfies [0, 1000) and is within 1 of the alternatives.
Checked against QwenLM/Qwen-VL tokenization_qwen.py (specials from 151851), finetune.py and README.
"""

from boxcar.pipelines.families import prompts
from boxcar.pipelines.families.box_text import TaggedBoxText, ThousandthGrid
from boxcar.pipelines.families.chatml import chatml
from boxcar.pipelines.families.family import Family, Network
from boxcar.pipelines.families.patches import SquareResize

_TAGS = ("<ref>", "</ref>", "<box>", "</box>")


def _picture(number: int) -> str:
    return f"Picture {number}: <img><imgpad></img>\n"


FAMILY = Family(
    name="qwen_vl",
    title="Qwen-VL-Chat and Qwen-VL (version 1)",
    upstream="QwenLM/Qwen-VL tokenization_qwen.py, visual.py, finetune.py",
    checkpoint="Qwen/Qwen-VL-Chat",
    resize=SquareResize(side=448, patch=14, num_visual_tokens=256, span=258),
    grid=ThousandthGrid("floor"),
    box_text=TaggedBoxText(*_TAGS),
    chat=chatml("You are a helpful assistant.", _picture, "<imgpad>", ("<img>", "</img>", "<imgpad>", *_TAGS)),
    prompts=prompts.with_shared(
        {
            "detect": {
                "en": ("Detect all {label} in the image.", "Locate every {label} in the image."),
                "zh": ("框出图中{label}的位置", "框出图中的{label}", "输出{label}的检测框"),
            },
            "refer": {
                "en": ("Give the bounding box of {label}.", "Locate {label} in the image."),
                "zh": ("框出图中{label}的位置", "框出图中的{label}", "输出{label}的检测框"),
            },
            "detect_joint": {
                "en": ("Detect all of these in the image: {label}.",),
                "zh": ("请给我框出图中{label}",),
            },
        }
    ),
    not_found=prompts.NOT_FOUND,
    max_sequence=2048,
    network=Network(
        model_type="qwen",
        part_names={
            "merger": r"transformer\.visual\.(attn_pool|ln_post|proj)\b",
            "vision": r"transformer\.visual\.(?!(attn_pool|ln_post|proj)\b)",
            "language": r"(transformer\.(wte|h|ln_f)|lm_head)\.",
        },
        lora_targets={
            "language": r"transformer\.h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(w1|w2))",
            "vision": r"transformer\.visual\.transformer\.resblocks\.\d+\.(attn\.(in_proj|out_proj)|mlp\.(c_fc|c_proj))",
            "merger": r"transformer\.visual\.attn_pool\.kv_proj",
        },
        vision_module="transformer.visual",
        decoder_layers="transformer.h",
        positions="sequential",
        architecture="resampler",
        image_input="squares",
        trains_frame=True,
    ),
    published_special_ids={
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<ref>": 151851,
        "</ref>": 151852,
        "<box>": 151853,
        "</box>": 151854,
        "<quad>": 151855,
        "</quad>": 151856,
        "<img>": 151857,
        "</img>": 151858,
        "<imgpad>": 151859,
    },
    notes="One fixed size: raising the resolution is impossible, tile instead.",
)
