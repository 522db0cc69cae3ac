"""What a model family must answer. A family is data: a resize rule, a coordinate grid, a box text, a chat template, prompts.

How to add a family: one file in this folder that builds a `Family`, one line in `catalog.py`, one table of golden numbers in its test.
Whoever writes `if family == ...` outside this folder has found a missing answer: move the question here.
`python -m tools.floors` fails on it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from boxcar.pipelines.families.box_text import BoxText, CoordinateGrid
from boxcar.pipelines.families.patches import ResizeRule
from boxcar.schemas.record import Language
from boxcar.schemas.task import TaskName
from boxcar.schemas.training import NetworkPart

PromptBank = Mapping[TaskName, Mapping[Language, tuple[str, ...]]]
"""Questions by task and language. `{label}` is the label, phrase or list of labels; `{box}` the place of a box (describe)."""


PositionRule = Literal["mrope", "shared_image", "sequential"]
"""mrope: time, row, column (Qwen2-VL and later). shared_image: one position for all patches of an image (CogVLM). sequential: 0, 1, ..."""

TokenKind = Literal["image", "text"]

ImageInput = Literal["patches", "squares"]
"""What a vision tower takes. patches: rows of patches grouped by merge window, and the grid of each image. squares: images of one size."""

Architecture = Literal["full_tower", "windowed_tower", "deepstack", "resampler", "visual_expert", "grouped_visual_expert"]
"""How a network is built, where weights are counted or a small one is made. full_tower: attention over the whole image (Qwen2-VL).
windowed_tower: over windows, but for some layers (Qwen2.5-VL). deepstack: image features also go into early decoder layers (Qwen3-VL).
resampler: a fixed number of queries read the image (Qwen-VL v1). visual_expert: decoder weights of their own for image tokens (CogVLM);
grouped_visual_expert: these, with heads that share keys (CogVLM2)."""

Normalisation = Literal["clip", "half"]
"""clip: CLIP's mean and standard deviation. half: 0.5 and 0.5."""


@dataclass(frozen=True)
class ChatTemplate:
    """What stands around questions and answers. A conversation is

        header + question + answer_open + answer + turn_close   then, for each further turn,
        turn_open + question + answer_open + answer + turn_close

    Control text is split at special tokens and encoded apart from questions and answers. Where the family encodes question and frame as one
    string, the frame stands in `question_prefix` and `question_suffix` instead.
    """

    default_system: str | None
    """System prompt where a dialogue brings none."""
    header: Callable[[str | None, int], str]
    """(system prompt, number of images) -> control text from the beginning to the first question, with those images in it."""
    image_in_question: Callable[[int], str]
    """Number of the image within the conversation, from 1 -> its control text inside a question."""
    turn_open: str
    answer_open: str
    turn_close: str
    image_token: str
    """The special token that stands once for each image in stored ids and is expanded when a row is loaded."""
    special_tokens: tuple[str, ...]
    """Every special token that the template and the box text write; a tokenizer without one of them does not fit."""
    reply_ends: tuple[str, ...]
    """Special tokens that end a reply, first the one that closes a turn: what a base writes after it is no part of the answer."""
    reply_opens: tuple[str, ...] = ()
    """Special tokens that a decoded reply may begin with."""
    question_prefix: str = ""
    question_suffix: str = ""
    extra_placeholders: int = 0
    """Placeholders beyond the visual tokens (CogVLM's boi and eoi are features, not ids)."""
    boundary_tokens: int = 2
    """Tokens that open and close an image, whichever way they are made."""
    one_question_per_image: bool = False
    """True: every turn is a sequence of its own and pays for the image."""
    supports_history: bool = True
    """False: a question cannot refer to an earlier turn (CogVLM base)."""
    max_images: int | None = None
    """Images that one conversation can hold; None: any number."""


@dataclass(frozen=True)
class Network:
    """What training must know of the published network: names and rules as data, so that nothing here imports torch."""

    model_type: str
    """`model_type` of the base's config.json; "cogvlm" where the published config has none."""
    part_names: Mapping[NetworkPart, str]
    """Regular expression that a parameter's name begins with, for each part of the network."""
    lora_targets: Mapping[NetworkPart, str]
    """Regular expression that the whole name of a linear layer matches. Anchored: q_proj alone would also hit vision layers."""
    vision_module: str
    """Path of the vision tower within the network."""
    decoder_layers: str
    """Path of the list of decoder layers."""
    positions: PositionRule
    architecture: Architecture
    image_input: ImageInput
    experts: Mapping[TokenKind, str] = field(default_factory=dict)
    """Regular expression within the names of the decoder weights that only tokens of this kind pass; all others every token passes."""
    trains_frame: bool = False
    """Qwen-VL v1 also trains what opens and closes each message (<|im_start|>, <|im_end|> and its newline), of every role."""


@dataclass(frozen=True)
class Family:
    """One model family's conventions."""

    name: str
    title: str
    """The name that people know, with the checkpoints it covers."""
    upstream: str
    """The code that these conventions were checked against."""
    checkpoint: str
    """Hugging Face id of a published checkpoint that people start from."""
    resize: ResizeRule
    grid: CoordinateGrid
    box_text: BoxText
    chat: ChatTemplate
    prompts: PromptBank
    not_found: Mapping[Language, str]
    """The reply when nothing matches; may name `{label}`."""
    max_sequence: int
    """Longest sequence the published checkpoints take, in tokens."""
    network: Network
    published_special_ids: Mapping[str, int] = field(default_factory=dict)
    """Ids of special tokens in the published tokenizers, where known: a tokenizer that differs is reported by the audit, not refused."""
    image_normalisation: Normalisation = "clip"
    tokenizer: str = ""
    """Hugging Face id of the tokenizer where the checkpoint does not hold it."""
    llama_factory_template: str = ""
    """LLaMA-Factory's name of its template; "" where it and ms-swift do not train this family as Boxcar does. ms-swift finds its own."""
    notes: str = ""
    """What a user should know before choosing this family."""

    def tokenizer_notes(self, special_ids: Mapping[str, int]) -> list[str]:
        """One sentence to report where these special tokens or their ids are not the published ones; [] where they are."""
        differing = [token for token, index in self.published_special_ids.items() if special_ids.get(token) != index]
        if not differing:
            return []
        found = f"id {special_ids[differing[0]]}" if differing[0] in special_ids else "no id"
        return [
            f"the tokenizer is not the published one of {self.title}: {len(differing)} of {len(self.published_special_ids)} special tokens "
            f"differ, for example {differing[0]} with {found}, published {self.published_special_ids[differing[0]]}; "
            "it fits only a base that was made with it"
        ]
