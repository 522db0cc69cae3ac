"""CogVLM v1: 490 px (base and chat templates) and 224 px (base).

| what          | convention                                                                                         |
|---------------|----------------------------------------------------------------------------------------------------|
| resize        | 490 x 490 (224 x 224) bicubic, aspect ratio not kept                                               |
| image tokens  | 1225 (256) and boi, eoi, which are features and not ids: 1227 (258) placeholders, but 3 positions  |
| boxes         | [[x0,y0,x1,y1]], several of one phrase [[b1;b2]]; thousandths, three digits, floor, 0..999         |
| template      | base: the question verbatim; chat: "Question: {q} Answer:"                                         |
| sequence      | <s> image question answer </s>; question and answer are encoded apart, each with its leading blank |
| not found     | a sentence                                                                                         |

Grounding checkpoints use the base template, which knows no history. One image stands right after <s>, so every turn pays for it.
The rounding is not published; floor fits the stated range 000-999.

Checked against zai-org/CogVLM utils/utils (vision.py, template.py, grounding_parser.py, chat.py) and modeling_cogvlm.py of
cogvlm-chat-hf (build_conversation_input_ids, build_position_ids). The tokenizer is that of lmsys/vicuna-7b-v1.5.
"""

from boxcar.pipelines.families import prompts
from boxcar.pipelines.families.box_text import BracketBoxText, ThousandthGrid
from boxcar.pipelines.families.family import ChatTemplate, Family
from boxcar.pipelines.families.patches import SquareResize
from boxcar.pipelines.families.visual_expert import NETWORK

# The published code fills the image's places with pad_token_id, which is <unk> in the Vicuna tokenizer.
_IMAGE_TOKEN = "<unk>"


def _header(_system: str | None, num_images: int) -> str:
    return "<s>" + _IMAGE_TOKEN * num_images


def _template(*, chat: bool) -> ChatTemplate:
    return ChatTemplate(
        default_system=None,
        header=_header,
        image_in_question=lambda _number: "",
        turn_open="",
        answer_open="",
        turn_close="</s>",
        image_token=_IMAGE_TOKEN,
        special_tokens=("<s>", "</s>", "<unk>"),
        reply_ends=("</s>",),
        reply_opens=("<s>",),
        question_prefix="Question: " if chat else "",
        question_suffix=" Answer:" if chat else "",
        extra_placeholders=2,
        one_question_per_image=True,
        supports_history=chat,
        max_images=1,
    )


def _family(name: str, title: str, side: int, checkpoint: str, *, chat: bool) -> Family:
    return Family(
        name=name,
        title=title,
        upstream="zai-org/CogVLM utils/utils; modeling_cogvlm.py of cogvlm-chat-hf",
        checkpoint=checkpoint,
        tokenizer="lmsys/vicuna-7b-v1.5",
        resize=SquareResize(side=side, patch=14, num_visual_tokens=(side // 14) ** 2, span=3),
        grid=ThousandthGrid("floor"),
        box_text=BracketBoxText(),
        chat=_template(chat=chat),
        prompts=prompts.with_shared(prompts.BRACKET_GROUNDING),
        not_found=prompts.NOT_FOUND,
        max_sequence=2048,
        network=NETWORK,
        published_special_ids={"<unk>": 0, "<s>": 1, "</s>": 2},
        notes="One fixed size: raising the resolution is impossible, tile instead.",
    )


COGVLM_490 = _family(
    "cogvlm",
    "CogVLM v1 490 px, base template (cogvlm-grounding-generalist, grounding-base)",
    490,
    "zai-org/cogvlm-grounding-generalist-hf",
    chat=False,
)
COGVLM_CHAT_490 = _family("cogvlm_chat", "CogVLM v1 490 px, chat template (cogvlm-chat)", 490, "zai-org/cogvlm-chat-hf", chat=True)
COGVLM_224 = _family("cogvlm_224", "CogVLM v1 224 px, base template (cogvlm-base-224)", 224, "zai-org/cogvlm-base-224-hf", chat=False)
