"""Qwen3-VL.

| what          | convention                                                                                         |
|---------------|----------------------------------------------------------------------------------------------------|
| resize        | smart_resize to multiples of 32 (patch 16); 65536..16777216 px published                           |
| image tokens  | height * width / 1024, between vision_start and vision_end                                         |
| boxes         | JSON bbox_2d in thousandths of width and height, round, 0..1000; independent of the resize         |
| template      | ChatML, no system prompt where none is given                                                       |
| not found     | an empty JSON list                                                                                 |
| normalisation | mean = std = 0.5                                                                                   |

Checked against transformers 5.23.0 (qwen3_vl) and the maintainers' answers in QwenLM/Qwen3-VL#1486, #1623, #2008.
"""

from boxcar.pipelines.families import prompts
from boxcar.pipelines.families.box_text import EMPTY_JSON_LIST, JsonBoxText, ThousandthGrid
from boxcar.pipelines.families.chatml import QWEN2_SPECIAL_IDS, QWEN2_SPECIALS, chatml, qwen2_network, qwen2_vision
from boxcar.pipelines.families.family import Family
from boxcar.pipelines.families.patches import PixelLimits, SmartResize

FAMILY = Family(
    name="qwen3_vl",
    title="Qwen3-VL (2B, 4B, 8B, 32B, 30B-A3B, 235B-A22B; Instruct)",
    upstream="transformers 5.23.0 qwen3_vl; QwenLM/Qwen3-VL evaluation/ODinW-13",
    checkpoint="Qwen/Qwen3-VL-8B-Instruct",
    resize=SmartResize(patch=16, merge=2, published_limits=PixelLimits(65_536, 16_777_216)),
    grid=ThousandthGrid("round"),
    box_text=JsonBoxText(),
    chat=chatml(None, qwen2_vision, "<|image_pad|>", QWEN2_SPECIALS),
    prompts=prompts.with_shared(prompts.JSON_GROUNDING),
    not_found={"en": EMPTY_JSON_LIST, "zh": EMPTY_JSON_LIST},
    max_sequence=262_144,
    network=qwen2_network(
        "qwen3_vl", "deepstack", vision_mlp="linear_fc1|linear_fc2", merger=r"(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
    ),
    published_special_ids=QWEN2_SPECIAL_IDS,
    llama_factory_template="qwen3_vl_nothink",
    image_normalisation="half",
    notes="The Thinking checkpoints answer after a <think> block and are not covered by this template.",
)
