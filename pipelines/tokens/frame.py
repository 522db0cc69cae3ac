"""A family, a tokenizer and a pixel budget, bound together: the frame that conversion, audit and prediction share."""

from dataclasses import dataclass, field
from functools import cached_property

from boxcar.pipelines.families import prompts
from boxcar.pipelines.families.box_text import render
from boxcar.pipelines.families.catalog import find_family
from boxcar.pipelines.families.family import Family, PromptBank
from boxcar.pipelines.families.patches import PixelLimits
from boxcar.pipelines.tokens.tokenizer import TextTokenizer, load_tokenizer
from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import ConfigError, TokenizerError
from boxcar.schemas.workflow import ConvertConfig

MAX_CACHED_HEADERS = 10_000
"""Almost all rows share one header; dialogues may bring system prompts of their own."""


@dataclass(frozen=True)
class Frame:
    """Everything that decides how a sample becomes tokens."""

    family: Family
    tokenizer: TextTokenizer
    limits: PixelLimits
    bank: PromptBank
    tokenizer_name: str
    _headers: dict[tuple[str | None, int], list[int]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def turn_open_ids(self) -> list[int]:
        return self.tokenizer.control_ids(self.family.chat.turn_open)

    @cached_property
    def answer_open_ids(self) -> list[int]:
        return self.tokenizer.control_ids(self.family.chat.answer_open)

    @cached_property
    def turn_close_ids(self) -> list[int]:
        return self.tokenizer.control_ids(self.family.chat.turn_close)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.special_ids[self.family.chat.image_token]

    def header_ids(self, system: str | None, num_images: int) -> list[int]:
        """Ids up to the first question, with one image token for each image."""
        key = (system, num_images)
        if key not in self._headers:
            if len(self._headers) >= MAX_CACHED_HEADERS:
                self._headers.clear()
            chat = self.family.chat
            self._headers[key] = self.tokenizer.control_ids(chat.header(chat.default_system if system is None else system, num_images))
        return self._headers[key]

    def contract(self) -> FrameContract:
        family, chat = self.family, self.family.chat
        two_boxes = [family.box_text.answer_gap(a, b, several_labels=False) for a, b in ((None, "x"), ("x", "x"), ("x", None))]
        return FrameContract(
            family=family.name,
            resize=family.resize.description,
            min_pixels=self.limits.min_pixels,
            max_pixels=self.limits.max_pixels,
            image_normalisation=family.image_normalisation,
            box_grid=family.grid.description,
            box_text_example=render(two_boxes, [[1, 2, 3, 4], [5, 6, 7, 8]], family.box_text),
            header_example=chat.header(chat.default_system, 1),
            turn_open=chat.turn_open,
            answer_open=chat.answer_open,
            turn_close=chat.turn_close,
            question_prefix=chat.question_prefix,
            question_suffix=chat.question_suffix,
            turn_open_ids=self.turn_open_ids,
            answer_open_ids=self.answer_open_ids,
            turn_close_ids=self.turn_close_ids,
            image_token_id=self.image_token_id,
            extra_placeholders=chat.extra_placeholders,
            one_question_per_image=chat.one_question_per_image,
            prompts={task: {language: list(texts) for language, texts in bank.items()} for task, bank in sorted(self.bank.items())},
            not_found={str(language): text for language, text in family.not_found.items()},
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            tokenizer=self.tokenizer_name,
        )


def build_frame(config: ConvertConfig) -> Frame:
    """Bind a workflow's family, tokenizer and budget. Raises ConfigError and TokenizerError where they do not fit each other."""
    family = find_family(config.family, "convert.family")
    tokenizer = load_tokenizer(config.tokenizer)
    if missing := [token for token in family.chat.special_tokens if token not in tokenizer.special_ids]:
        raise TokenizerError(
            config.tokenizer,
            found=f"no special token {', '.join(missing)}",
            expected=f"the tokenizer of {family.title}",
            fix="Check `tokenizer` and `family` in the workflow (for an audit: --family NAME=TOKENIZER).",
        )
    if config.cutoff_len > family.max_sequence:
        raise ConfigError(
            "convert.cutoff_len",
            found=f"{config.cutoff_len}",
            expected=f"at most {family.max_sequence}, the longest sequence of {family.name}",
        )
    return Frame(
        family,
        tokenizer,
        resolve_limits(family, config.image_min_pixels, config.image_max_pixels),
        prompts.with_overrides(family.prompts, config.tasks),
        config.tokenizer,
    )


def frame_of(contract: FrameContract, where: str, tokenizer: str = "") -> Frame:
    """The frame that a contract tells of, from the code and the tokenizer that are here. `tokenizer`: where it is now, if it has moved.

    Raises ContractError where what is here would ask or read otherwise, TokenizerError where the tokenizer cannot be read.
    """
    family = find_family(contract.family, where)
    name = tokenizer or contract.tokenizer
    bank: PromptBank = {task: _by_language(questions) for task, questions in contract.prompts.items()}  # type: ignore[misc]
    frame = Frame(family, load_tokenizer(name), PixelLimits(contract.min_pixels, contract.max_pixels), bank, name)
    contract.require_equal(frame.contract(), f"{where}: {name} and this version of Boxcar")
    return frame


def _by_language(questions: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {language: tuple(texts) for language, texts in questions.items()}


def resolve_limits(family: Family, image_min_pixels: int | None, image_max_pixels: int | None) -> PixelLimits:
    """The workflow's pixel limits, or the published ones. Raises ConfigError where the family cannot meet them."""
    return family.resize.limits(image_min_pixels, image_max_pixels, family.name)
