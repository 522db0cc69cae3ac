"""CogVLM2 (Llama-3, 19B).

| what          | convention                                                                                         |
|---------------|----------------------------------------------------------------------------------------------------|
| resize        | 1344 x 1344 bicubic, aspect ratio not kept                                                         |
| image tokens  | 96 x 96 patches, conv 2 x 2: 2304 and boi, eoi, which are features: 2306 placeholders, 3 positions |
| boxes         | none published: CogVLM v1's form is used, and a model learns it from scratch                       |
| template      | chat: "Question: {q} Answer:"                                                                      |
| sequence      | <|begin_of_text|> image question answer <|end_of_text|>                                            |

No grounding checkpoint exists (maintainers, zai-org/CogVLM2#130, #45).
Checked against modeling_cogvlm.py of cogvlm2-llama3-chat-19B; the tokenizer is Llama-3's.
"""

from dataclasses import replace

from boxcar.pipelines.families import prompts
from boxcar.pipelines.families.box_text import BracketBoxText, ThousandthGrid
from boxcar.pipelines.families.family import ChatTemplate, Family
from boxcar.pipelines.families.patches import SquareResize
from boxcar.pipelines.families.visual_expert import NETWORK

# The published code fills the image's places with the literal 128002.
_IMAGE_TOKEN = "<|reserved_special_token_0|>"


def _header(_system: str | None, num_images: int) -> str:
    return "<|begin_of_text|>" + _IMAGE_TOKEN * num_images


FAMILY = Family(
    name="cogvlm2",
    title="CogVLM2 19B (Llama-3 chat)",
    upstream="modeling_cogvlm.py of cogvlm2-llama3-chat-19B",
    checkpoint="zai-org/cogvlm2-llama3-chat-19B",
    resize=SquareResize(side=1344, patch=14, num_visual_tokens=2304, span=3),
    grid=ThousandthGrid("floor"),
    box_text=BracketBoxText(),
    chat=ChatTemplate(
        default_system=None,
        header=_header,
        image_in_question=lambda _number: "",
        turn_open="",
        answer_open="",
        turn_close="<|end_of_text|>",
        image_token=_IMAGE_TOKEN,
        special_tokens=("<|begin_of_text|>", "<|end_of_text|>", _IMAGE_TOKEN),
        reply_ends=("<|end_of_text|>", "<|eot_id|>"),
        reply_opens=("<|begin_of_text|>",),
        question_prefix="Question: ",
        question_suffix=" Answer:",
        extra_placeholders=2,
        one_question_per_image=True,
        max_images=1,
    ),
    prompts=prompts.with_shared(prompts.BRACKET_GROUNDING),
    not_found=prompts.NOT_FOUND,
    max_sequence=8192,
    network=replace(NETWORK, architecture="grouped_visual_expert"),
    published_special_ids={"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, _IMAGE_TOKEN: 128002},
    notes="No grounding checkpoint was ever published: the box format is learned from scratch.",
)
